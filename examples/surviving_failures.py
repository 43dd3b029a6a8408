# %% [markdown]
# # Surviving failures: a node dies, its trial goes on elsewhere
#
# Spot machines are taken away, drivers crash, memory runs out. Ray Tune then starts a trial again
# on another node, from its last checkpoint. What the trial had written beside it (its log, its
# plots) is on the disk of the machine that is gone.
#
# This example kills a node with SIGKILL in the middle of training. You see where the trial goes on,
# what it finds there, and what the report says was lost. It takes about a minute and writes into
# `./tune_sync_results`.

# %% [markdown]
# ## 1. A cluster
#
# Real Ray nodes on this machine, each with a directory in place of a disk of its own: a head that
# runs no trials, and three workers with room for one trial each. On a cluster of yours this is
# `ray.init()`. `_system_config` has Ray notice a dead node in some two seconds instead of fifteen.

# %%
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

# Short, since Ray puts sockets below it; RAY_TMPDIR keeps this apart from any other Ray here.
NODES_DIR = Path(tempfile.mkdtemp(prefix="nodes", dir="/tmp"))
os.environ["RAY_TMPDIR"] = str(NODES_DIR)

import numpy as np
import ray
from ray import tune
from ray.cluster_utils import Cluster

noticing = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}
cluster = Cluster()
names = {}
for name in ("head", "worker-1", "worker-2", "worker-3"):
    node = cluster.add_node(
        num_cpus=0 if name == "head" else 1,
        temp_dir=str(NODES_DIR / ("ray" if name == "head" else name)),
        object_store_memory=80_000_000,
        include_dashboard=False,
        **({"_system_config": noticing} if name == "head" else {}),
    )
    names[node.node_id] = name
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

# %% [markdown]
# ## 2. A training function
#
# A linear model, fitted by gradient descent. Each epoch adds a line to `log.txt` and writes
# `weights/epoch_<n>.npy`; every second epoch is a checkpoint. There is nothing in it for syncing.
# If there is a checkpoint, it goes on from there, as every Tune function should.

# %%
EPOCHS = 10


def train_model(config):
    node = names[ray.get_runtime_context().get_node_id()]
    random = np.random.default_rng(0)
    inputs = random.normal(size=(500, 20))
    targets = inputs @ np.arange(20.0)
    weights, start = np.zeros(20), 1
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            weights = np.load(Path(directory, "weights.npy"))
            start = json.loads(Path(directory, "epoch.json").read_text()) + 1
    Path("weights").mkdir(exist_ok=True)

    for epoch in range(start, EPOCHS + 1):
        time.sleep(1)  # a longer training
        errors = inputs @ weights - targets
        weights -= config["lr"] * inputs.T @ errors / len(inputs)
        loss = float(np.mean(errors**2))
        with open("log.txt", "a") as log:
            log.write(f"epoch {epoch:2} on {node}: loss {loss:.3f}\n")
        np.save(f"weights/epoch_{epoch}.npy", weights)
        # The process that starts all others of a node is this one's parent.
        metrics = {"epoch": epoch, "loss": loss, "node": node, "node_pid": os.getppid()}
        if epoch % 2:
            tune.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as directory:
            np.save(Path(directory, "weights.npy"), weights)
            Path(directory, "epoch.json").write_text(json.dumps(epoch))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))


# %% [markdown]
# ## 3. The accident
#
# Nothing of this is for your own code: it is what happens to you. The node of one trial dies when
# the trial has just ended an epoch that has no checkpoint, so that there is something to lose.


# %%
class KillANode(tune.Callback):
    killed = None

    def on_trial_result(self, iteration, trials, trial, result, **info):
        if self.killed or trial.config["lr"] != 0.1 or result["epoch"] < 5:
            return
        stored = Path(trial.path, "log.txt")
        lines = stored.read_text().splitlines() if stored.exists() else []
        # Everything up to the checkpoint before is in storage, this epoch is not.
        if result["epoch"] % 2 and len(lines) == result["epoch"] - 1:
            self.killed = result["node"]
            os.kill(result["node_pid"], signal.SIGKILL)
            os.waitpid(result["node_pid"], 0)  # it was started by this process
            print(f"killed {self.killed} after epoch {result['epoch']}")


# %% [markdown]
# ## 4. Run
#
# `SyncCallback()` and a `SyncConfig`. A checkpoint forces a sync of the trial's files
# (`sync_artifacts_on_checkpoint`, on by default); between checkpoints `sync_period` decides, here
# its default of 300 seconds. `max_failures` is Tune's: how often a trial may start again.
#
# Ray complains loudly about the node; that is as it should be.

# %%
from tune_sync_plugin import SyncCallback, SyncConfig

callback, accident = SyncCallback(), KillANode()
tuner = tune.Tuner(
    train_model,
    param_space={"lr": tune.grid_search([0.1, 0.5])},
    run_config=tune.RunConfig(
        name=time.strftime("surviving_failures_%Y-%m-%d_%H-%M-%S"),
        storage_path=str(Path("tune_sync_results").resolve()),
        sync_config=SyncConfig(sync_artifacts=True),
        failure_config=tune.FailureConfig(max_failures=2),
        callbacks=[callback, accident],
        verbose=0,
    ),
)
results = tuner.fit()
print("trials that ended with an error:", len(results.errors))

# %% [markdown]
# ## 5. The log goes on
#
# This is the log of the trial that lost its node, read from storage. Its first lines were written
# on the node that died. They were brought to the new node before training went on there, so that
# `open("log.txt", "a")` just worked: no line is missing, and none is there twice.

# %%
moved = next(result for result in results if result.config["lr"] == 0.1)
print(Path(moved.path, "log.txt").read_text())

# %% [markdown]
# The same for the files that are written once. The report counts what came back.

# %%
print(sorted(path.name for path in Path(moved.path, "weights").iterdir()))
trial_id = moved.metrics["trial_id"]
for restored in callback.report.trials[trial_id].restored:
    print(f"came back: {restored.files_restored} files, {restored.bytes_restored} B")

# %% [markdown]
# ## 6. What was lost
#
# What a node writes after its last sync dies with it, and that is said: the report names the trial,
# the node, and how old its last complete sync was. It is also in the last lines of the log above,
# and with `SyncConfig(strict=True)` `fit()` would raise it.

# %%
print(callback.report.summary())
for failure in callback.report.failures:
    print("lost:", failure)

# %% [markdown]
# Nobody can read the disk of a machine that is gone. Here it is only a directory, so we can look:
# the trial had logged one epoch more there. It was trained again on the new node.

# %%
(dead_log,) = (NODES_DIR / accident.killed).glob("session_2*/artifacts/*/*/working_dirs/*/log.txt")
print("last line on the dead node's disk:", dead_log.read_text().splitlines()[-1])

# %% [markdown]
# ## 7. Tidy up

# %%
ray.shutdown()
cluster.shutdown()
shutil.rmtree(NODES_DIR, ignore_errors=True)

# %% [markdown]
# ## Where to go from here
#
# * A shorter `sync_period` makes less of it: a sync with nothing new costs a listing of the
#   directory, and one with a new line in a log sends that line.
# * What happens when a trial's process or the driver is killed, when storage breaks, when disks are
#   full: [BEHAVIOUR.md](BEHAVIOUR.md), with the test that shows it.
# * `02_object_storage.ipynb` loses the driver's machine and restores the run from a bucket.
