"""Tune runs that strain a sync, each the same under Ray's own syncing and under ours.

A scenario runs for real on a cluster of nodes with disks of their own and an S3 server behind a
proxy, and returns figures. The tests assert ours; ``python -m benchmarks.against_ray`` prints both.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune

from tests.support.proxy import Proxy, Record, Stats
from tests.support.s3_server import S3Server
from tune_sync_plugin import SyncCallback, SyncConfig

LINK = 20e6  # bytes per second: a slow link, so that an upload takes long enough to be cut off
MB = 1_000_000


@dataclass
class Link:
    """The S3 server behind the proxy, and a fresh prefix for each run."""

    s3: S3Server
    proxy: Proxy

    def prefix(self) -> str:
        self.proxy.clear_rules()
        self.proxy.set()
        self.proxy.reset_stats()
        return uuid.uuid4().hex[:8]


@dataclass
class Outcome:
    """A finished run: what Tune said, what is in storage, what went over the link."""

    results: Any
    callback: SyncCallback | None
    stored: dict[str, int]
    stats: Stats
    wall_s: float
    link: Link
    prefix: str
    extra: dict[str, Any] = field(default_factory=dict)

    def names(self, trial: str = "") -> dict[str, int]:
        """What is stored for the trials whose directory's name contains ``trial``, by file name."""
        found = {}
        for key, size in self.stored.items():
            parts = key.split("/", 3)
            if len(parts) == 4 and trial in parts[2]:
                found[parts[3]] = size
        return found

    def content(self, name: str) -> bytes:
        key = next(k for k in self.stored if k.endswith("/" + name))
        return self.link.s3.get(key)

    def sent(self, regex: str) -> int:
        """Bytes of uploads whose key matches."""
        return sum(self.stats.select(method, regex).body_bytes for method in ("PUT", "POST"))

    def uploads(self, regex: str) -> int:
        """How often keys that match were uploaded (a multipart upload counts once)."""
        return len(uploads(self.stats, regex))


def uploads(stats: Stats, regex: str) -> list[Record]:
    """The requests that publish an object, one per upload, of keys that match."""
    return [
        r
        for r in stats.select(None, regex).records
        if (r.method == "PUT" and "uploadId" not in r.query)
        or (r.method == "POST" and "uploadId" in r.query)
    ]


def fit(
    link: Link,
    train: Any,
    *,
    by: str,
    space: dict[str, Any] | None = None,
    sync_config: dict[str, Any] | None = None,
    run_config: dict[str, Any] | None = None,
    tune_config: dict[str, Any] | None = None,
    shape: dict[str, float] | None = None,
    rules: list[dict[str, Any]] | None = None,
    client: str = "pyarrow",
    callback: SyncCallback | None = None,
) -> Outcome:
    """Run an experiment ``by`` "ray" (its own sync), "ours", or "none" (no artifact sync).

    ``client`` is what talks to S3: "pyarrow", as Ray resolves s3://, or "s3fs", handed to Ray as
    ``storage_filesystem``. Hand in a ``callback`` to see its report if ``fit`` raises.
    """
    prefix = link.prefix()
    storage: dict[str, Any] = {"storage_path": link.s3.uri(prefix, port=link.proxy.port)}
    if client == "s3fs":
        storage = {
            "storage_path": f"{link.s3.bucket}/{prefix}",
            "storage_filesystem": PyFileSystem(FSSpecHandler(link.s3.s3fs_fs(link.proxy.port))),
        }
    settings = {"sync_artifacts": by != "none", "sync_period": 1, **(sync_config or {})}
    if by == "ours" and callback is None:
        callback = SyncCallback()
    tuner = tune.Tuner(
        train,
        param_space=space or {},
        tune_config=tune.TuneConfig(**(tune_config or {})),
        run_config=tune.RunConfig(
            name="exp",
            sync_config=(SyncConfig if by == "ours" else tune.SyncConfig)(**settings),
            callbacks=[callback] if callback else [],
            verbose=0,
            **storage,
            **(run_config or {}),
        ),
    )
    for rule in rules or []:
        link.proxy.add_rule(**rule)
    link.proxy.set(**(shape or {}))
    link.proxy.reset_stats()
    start = time.monotonic()
    results = tuner.fit()
    wall_s = time.monotonic() - start
    stats = link.proxy.stats()
    link.proxy.set()
    return Outcome(results, callback, link.s3.keys(prefix), stats, wall_s, link, prefix)


def report(metrics: dict[str, Any], *, checkpoint: bool = False) -> float:
    """``tune.report``, with a small checkpoint if asked; returns how long it took, in seconds."""
    if not checkpoint:
        start = time.monotonic()
        tune.report(metrics)
        return time.monotonic() - start
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "model.bin").write_bytes(b"m" * 1000)
        start = time.monotonic()
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))
        return time.monotonic() - start


def _write(path: str | Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with open(path, "wb") as out:
        for offset in range(0, size, len(block)):
            out.write(block[: size - offset])


# -- 1: both directories ----------------------------------------------------------------------


def _train_both(config: dict[str, Any]) -> None:
    trial_dir = Path(tune.get_context().get_trial_dir())
    trial_dir.mkdir(parents=True, exist_ok=True)  # Ray alone does not make it
    Path("sub").mkdir(exist_ok=True)
    for step in range(3):
        Path(f"cwd_{step}.txt").write_text(f"{config['x']}:{step}")
        Path("sub", f"deep_{step}.txt").write_text(f"{config['x']}:{step}")
        (trial_dir / f"trial_dir_{step}.txt").write_text(f"{config['x']}:{step}")
        report({"step": step, "score": config["x"]}, checkpoint=True)


def both_directories(link: Link, by: str) -> Outcome:
    """Three trials on two nodes write to the working directory and to ``get_trial_dir()``."""
    # A node has two CPUs, so that two of these trials are never on the same one.
    train = tune.with_resources(_train_both, {"CPU": 2})
    return fit(link, train, by=by, space={"x": tune.grid_search([1, 2, 3])})


# -- 2: the last file -------------------------------------------------------------------------


def _train_big_last(config: dict[str, Any]) -> None:
    report({"step": 0})
    _write("last.bin", config["size"])
    report({"step": 1})


def big_last_file(link: Link, by: str, size: int = 300 * MB) -> Outcome:
    """The trial's last act is to write a file that takes 15 s to upload."""
    return fit(
        link,
        _train_big_last,
        by=by,
        space={"size": size},
        shape={"bandwidth_bytes_per_s": LINK},
    )


# -- 3: how long tune.report takes ------------------------------------------------------------


def _train_blocked(config: dict[str, Any]) -> None:
    took = []
    for step in range(config["steps"]):
        _write(f"artifact_{step}.bin", 20 * MB)
        took.append(report({"step": step, "report_s": 0.0}, checkpoint=True))
        time.sleep(1.5)
    report({"step": -1, "report_s": statistics.median(took)})


def blocked_reports(link: Link, by: str, steps: int = 6, bandwidth: float = LINK) -> Outcome:
    """Each report comes with a checkpoint and 20 MB of new artifacts."""
    outcome = fit(
        link,
        _train_blocked,
        by=by,
        space={"steps": steps},
        shape={"bandwidth_bytes_per_s": bandwidth},
    )
    outcome.extra["report_s"] = outcome.results[0].metrics["report_s"]
    return outcome


# -- 4: sending again -------------------------------------------------------------------------

STEADY_FILES, STEADY_BYTES, STEPS = 10, MB, 6


def _train_resend(config: dict[str, Any]) -> None:
    for number in range(STEADY_FILES):
        _write(f"steady_{number}.bin", STEADY_BYTES)
    for step in range(STEPS):
        _write(f"step_{step}.bin", MB // 10)
        report({"step": step}, checkpoint=True)
        time.sleep(0.7)


def resend(link: Link, by: str) -> Outcome:
    """Six checkpoints, each forcing a sync of ten unchanged files and a small new one."""
    outcome = fit(
        link,
        _train_resend,
        by=by,
        run_config={"checkpoint_config": tune.CheckpointConfig(num_to_keep=1)},
    )
    outcome.extra["changed"] = STEADY_FILES * STEADY_BYTES + STEPS * (MB // 10)
    outcome.extra["sent"] = outcome.sent(r"/(steady|step)_\d+\.bin")
    return outcome


# -- 5: a killed trial ------------------------------------------------------------------------


def _train_killed(config: dict[str, Any]) -> None:
    Path("file_0.txt").write_text("0" * 100)
    report({"step": 0})
    time.sleep(1.5)
    for number in range(1, 4):
        Path(f"file_{number}.txt").write_text(str(number) * 100)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_trial(link: Link, by: str) -> Outcome:
    """The trial's process is killed right after writing three more files."""
    return fit(link, _train_killed, by=by, sync_config={"sync_period": 300})


# -- 6: an upload that hangs ------------------------------------------------------------------


def _train_hang(config: dict[str, Any]) -> None:
    for name in ("a.txt", "hang.bin", "z.txt"):
        Path(name).write_text(name * 1000)
    for step in range(4):
        report({"step": step})
        time.sleep(0.5)


def hanging_upload(link: Link, by: str, timeout_s: float = 5) -> Outcome:
    """Storage never answers the upload of one file."""
    return fit(
        link,
        _train_hang,
        by=by,
        sync_config={"sync_timeout": timeout_s},
        rules=[{"key_regex": r"hang\.bin", "action": "hang"}],
    )


# -- 7: the period ----------------------------------------------------------------------------


def _train_period(config: dict[str, Any]) -> None:
    for step in range(20):
        with open("log.txt", "a") as log:
            log.write(f"line {step}\n")
        report({"step": step})
        time.sleep(0.5)


def period(link: Link, by: str) -> Outcome:
    """``sync_period=3``, two reports a second for ten seconds, a snapshot with every one."""
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "0.5"
    try:
        outcome = fit(link, _train_period, by=by, sync_config={"sync_period": 3})
    finally:
        del os.environ["TUNE_GLOBAL_CHECKPOINT_S"]
    outcome.extra["log"] = outcome.uploads(r"/log\.txt")
    outcome.extra["state"] = outcome.uploads(r"/experiment_state-")
    return outcome


# -- 8: results across a restart ---------------------------------------------------------------

RESTART_STEPS = 36


def _train_restarts(config: dict[str, Any]) -> None:
    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    for step in range(start, RESTART_STEPS):
        if step == 32 and not checkpoint:
            raise RuntimeError("the trial fails once")
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(directory))
        time.sleep(0.4)


def restarted_trial(link: Link, by: str) -> Outcome:
    """A trial fails after 32 results and goes on from its checkpoint."""
    failure_config = tune.FailureConfig(max_failures=1)
    run_config = {"failure_config": failure_config}
    outcome = fit(link, _train_restarts, by=by, run_config=run_config)
    lines = outcome.content("result.json").splitlines()
    outcome.extra["results"] = len({json.loads(line)["step"] for line in lines})
    return outcome


# -- 9: a trial that moves ----------------------------------------------------------------------


def moved_trial(link: Link, by: str) -> Outcome:
    """A trial that appends to a log fails twice, and goes on on the other node each time."""
    from tests.support import restarts

    train = tune.with_resources(restarts.train, {"CPU": restarts.TRIAL_CPUS})
    failure_config = tune.FailureConfig(max_failures=2)
    try:
        outcome = fit(
            link,
            train,
            by=by,
            space={"fails_after": [4, 7]},
            run_config={"failure_config": failure_config},
        )
    finally:
        restarts.remove_blockers(node["NodeID"] for node in ray.nodes())
    outcome.extra["lines"] = len(set(outcome.content("log.txt").split()))
    return outcome


def sync_workers() -> list[str]:
    """Command lines of processes that are running one of our sync tasks now."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (
                    (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
            except OSError:
                continue
            if re.match(r"ray::tune_sync", line):
                found.append(f"{entry.name}: {line}")
    return found
