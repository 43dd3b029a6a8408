"""See tune_sync_plugin at work: four Tune trials on two worker nodes, everything in one directory.

    python examples/quickstart.py [RESULTS]

RESULTS is where the results go; by default ./tune_sync_results, each run in a directory of its own.
The "cluster" is three Ray nodes on this machine, each with a temporary directory in place of a disk
of its own, so that a trial's files are not in RESULTS unless something brings them there.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

# Where the nodes live. RAY_TMPDIR keeps them apart from any other Ray on this machine; the path is
# short because Ray puts unix sockets below it.
NODES_DIR = Path(tempfile.mkdtemp(prefix="nodes", dir="/tmp"))
os.environ["RAY_TMPDIR"] = str(NODES_DIR)

import ray
from ray import tune
from ray.cluster_utils import Cluster

from tune_sync_plugin import SyncCallback, SyncConfig

STEPS = 4


def train_model(config: dict) -> None:
    """Train as usual: whatever is written into the trial's directory is an artifact."""
    for step in range(1, STEPS + 1):
        time.sleep(0.5)
        with open("log.txt", "a") as log:
            log.write(f"lr {config['lr']}, step {step}\n")
        Path("embeddings.bin").write_bytes(bytes([step]) * 300_000)
        Path("plots").mkdir(exist_ok=True)
        Path("plots/loss.svg").write_text(f"<svg><title>Step {step}</title></svg>\n")
        # Another directory than the working directory, and synced just the same.
        trial_dir = Path(tune.get_context().get_trial_dir())
        (trial_dir / "notes.md").write_text(f"{step} steps done\n")

        metrics = {"loss": 1 / step, "node_id": ray.get_runtime_context().get_node_id()}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "model.txt").write_text(f"{step}\n")
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))


def expected_artifacts(lr: float) -> dict[str, bytes]:
    """What `train_model` leaves behind, by path and content."""
    log = "".join(f"lr {lr}, step {step}\n" for step in range(1, STEPS + 1))
    return {
        "log.txt": log.encode(),
        "embeddings.bin": bytes([STEPS]) * 300_000,
        "plots/loss.svg": f"<svg><title>Step {STEPS}</title></svg>\n".encode(),
        "notes.md": f"{STEPS} steps done\n".encode(),
    }


def start_nodes(cluster: Cluster) -> dict[str, str]:
    """Start a head node that runs no trials and two workers; return their names by node id."""
    names = {}
    for name in ("head", "worker-1", "worker-2"):
        node = cluster.add_node(
            num_cpus=0 if name == "head" else 1,
            temp_dir=str(NODES_DIR / ("ray" if name == "head" else name)),
            object_store_memory=80_000_000,
            include_dashboard=False,
        )
        names[node.node_id] = name
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    return names


def run_experiment(storage_path: Path) -> tuple[tune.ResultGrid, SyncCallback]:
    """Run four trials. The lines with `Sync` in them are all there is to do."""
    callback = SyncCallback()
    tuner = tune.Tuner(
        train_model,
        param_space={"lr": tune.grid_search([0.1, 0.2, 0.4, 0.8])},
        run_config=tune.RunConfig(
            storage_path=str(storage_path),
            sync_config=SyncConfig(sync_artifacts=True, sync_period=1),
            callbacks=[callback],
            verbose=0,
        ),
    )
    return tuner.fit(), callback


def show_what_arrived(result: tune.Result, node: str) -> list[str]:
    """Print one trial's files in storage; return the artifacts that are missing or differ."""
    trial_dir, expected = Path(result.path), expected_artifacts(result.config["lr"])
    files = [path for path in trial_dir.rglob("*") if path.is_file()]
    arrived = {path.relative_to(trial_dir).as_posix(): path.read_bytes() for path in files}

    def kind(name: str) -> str:
        if name in expected:
            return "artifact"
        if name.startswith(".tune_sync/"):
            return "our own"
        return "checkpoint" if name.startswith("checkpoint_") else "from Ray"

    print(f"\nlr {result.config['lr']} on {node}: {trial_dir.name}/")
    for name in sorted(arrived, key=lambda name: (kind(name), name)):
        print(f"  {kind(name):10} {len(arrived[name]):>9,} B  {name}")
    return [str(trial_dir / name) for name in expected if arrived.get(name) != expected[name]]


def main() -> None:
    """Run the experiment and show where its files are; exit with 1 if an artifact is not there."""
    storage_path = Path(sys.argv[1] if len(sys.argv) > 1 else "tune_sync_results").resolve()
    print(f"Three Ray nodes and four trials, about half a minute. Results go to {storage_path}")
    cluster = Cluster()
    try:
        node_names = start_nodes(cluster)
        results, callback = run_experiment(storage_path)
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(NODES_DIR, ignore_errors=True)

    if results.errors:
        sys.exit(f"FAILED: a trial ended with an error.\n{results.errors[0]}")
    # The nodes and their directories are gone. What is shown now is what arrived.
    lost = []
    for result in results:
        lost += show_what_arrived(result, node_names[result.metrics["node_id"]])
    print(f"\n{results.experiment_path}\n{callback.report.summary()}")
    if lost:
        sys.exit("\n".join(["FAILED: these artifacts are missing or not as written:", *lost]))
    print("Every artifact of every trial arrived.")


if __name__ == "__main__":
    main()
