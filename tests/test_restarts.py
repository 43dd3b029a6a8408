"""Trials that start again: what they left is flushed, and back where they go on.

Real nodes with disks of their own, real storage. A trial is moved by taking its node's CPUs away.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback, SyncConfig

pytestmark = pytest.mark.usefixtures("cluster")

# Of the two CPUs of a node: a trial that fails leaves room for the blocker, and then none is left
# for the trial.
TRIAL_CPUS, BLOCKER_CPUS = 1.5, 0.6


@ray.remote(num_cpus=BLOCKER_CPUS)
class _Blocker:
    def ping(self) -> None:
        pass


def move_away_when_this_ends() -> None:
    """Let the trial that calls this go on elsewhere than on this node."""
    node = ray.get_runtime_context().get_node_id()
    unblock({other["NodeID"] for other in ray.nodes()} - {node})
    _Blocker.options(
        name=f"blocker-{node[:8]}",
        namespace="blockers",
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()


def unblock(nodes: Iterable[str]) -> None:
    for node in nodes:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(f"blocker-{node[:8]}", namespace="blockers"))


@pytest.fixture(autouse=True)
def _no_blockers() -> Iterator[None]:
    yield
    unblock(node["NodeID"] for node in ray.nodes())


def train(config: dict[str, Any]) -> None:
    """Appends a line to a log and checkpoints, ten times; fails when asked, each time elsewhere."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    node = ray.get_runtime_context().get_node_id()[:8]
    seen = Path("log.txt").read_text() if Path("log.txt").exists() else ""
    Path(f"attempt_at_{start}.txt").write_text(f"{node}\n{seen}")
    trial_dir = Path(tune.get_context().get_trial_dir())
    for step in range(start, 10):
        for log in (Path("log.txt"), trial_dir / "log2.txt"):
            with log.open("a") as out:
                out.write(f"{step}\n")
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(directory))
        mark = Path(f"failed_after_{step}")
        if step in config["fails_after"] and not mark.exists():
            mark.touch()
            move_away_when_this_ends()
            time.sleep(0.5)
            raise RuntimeError(f"as asked, after {step}")


def fit(
    storage_path: str, *, trainable: Any = train, space: dict[str, Any], **settings: Any
) -> tuple[Any, SyncCallback]:
    callback = SyncCallback()
    sync_config = {"sync_artifacts": True, "sync_period": 300, **settings}
    results = tune.Tuner(
        tune.with_resources(trainable, {"CPU": TRIAL_CPUS}),
        param_space=space,
        run_config=tune.RunConfig(
            name="exp",
            storage_path=storage_path,
            sync_config=SyncConfig(**sync_config),
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    return results, callback


@pytest.fixture(params=["shared directory", "S3"])
def place(request: pytest.FixtureRequest) -> tuple[str, Callable[[str], bytes]]:
    """A storage path, and how to read a stored file by its name."""
    if request.param == "S3":
        link: Link = request.getfixturevalue("link")
        prefix = link.prefix()

        def of_s3(name: str) -> bytes:
            (key,) = (k for k in link.s3.keys(prefix) if k.endswith(f"/{name}"))
            return link.s3.get(key)

        return link.s3.uri(prefix, port=link.proxy.port), of_s3
    storage: Path = request.getfixturevalue("storage")

    def of_directory(name: str) -> bytes:
        (path,) = (p for p in storage.glob(f"exp/*/{name}"))
        return path.read_bytes()

    return str(storage), of_directory


@pytest.mark.parametrize("on_checkpoint", [True, False])
def test_a_log_goes_on_on_another_node(
    place: tuple[str, Callable[[str], bytes]], on_checkpoint: bool, figure: Callable[..., None]
) -> None:
    """Without syncs at checkpoints only the flush before the move can have brought the lines."""
    storage_path, read = place
    results, callback = fit(
        storage_path,
        space={"fails_after": [4, 7]},
        sync_artifacts_on_checkpoint=on_checkpoint,
    )
    assert not results.errors
    everything = "".join(f"{step}\n" for step in range(10)).encode()
    assert read("log.txt") == everything
    assert read("log2.txt") == everything
    nodes, seen = zip(
        *(read(f"attempt_at_{n}.txt").decode().split("\n", 1) for n in (0, 5, 8)), strict=True
    )
    assert nodes[0] != nodes[1] != nodes[2], "it went on on another node, and came back"
    assert seen[1] == "0\n1\n2\n3\n4\n", "and found what it had written"
    assert seen[2] == "0\n1\n2\n3\n4\n5\n6\n7\n", "not what it had left there"
    (trial,) = callback.report.trials.values()
    assert not callback.report.failures
    # Two logs, two marks. Then one mark more, and the logs that are not as they were left.
    assert [report.files_restored for report in trial.restored] == [4, 4]
    assert all(report.from_index for report in trial.restored)
    figure(
        f"trial raises twice, moves, on_checkpoint={on_checkpoint}, {storage_path[:2]}",
        written=2 * len(everything),
        stored=len(read("log.txt") + read("log2.txt")),
    )
