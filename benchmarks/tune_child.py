"""Tune runs to be measured, each in a process with a cluster, a server and a proxy of its own.

``python -m benchmarks.tune_child NAME JSON`` prints what came out as one line of JSON. A process
per run, since what a cluster has started once (a sync task's worker) is there for the next run.
What the runs are compared by is in ``runs.py``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune

from benchmarks import hooks as hook_costs
from benchmarks.harness import LATENCY_S
from tests.support import scenarios
from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy, Stats
from tests.support.s3_server import S3Server
from tests.support.scenarios import MB, Link
from tune_sync_plugin import SyncCallback, SyncConfig

# What Tune's default loggers write per trial, and about as much as it is after a short one.
_FILES = {
    "params.json": 100,
    "params.pkl": 80,
    "result.json": 6000,
    "progress.csv": 3000,
    "events.out.tfevents.1700000000.host": 4000,
}


class Clock(tune.Callback):
    """Notes when the last result came; on the first trial, fills the driver's directory."""

    def __init__(self, idle_trials: int = 0) -> None:
        self.idle_trials = idle_trials
        self.last_result = 0.0
        self._filled = False

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if not self._filled:
            self._filled = True
            experiment = Path(trial.storage.experiment_driver_staging_path)
            for number in range(self.idle_trials):
                directory = experiment / f"train_idle_{number:05d}_x={number}"
                directory.mkdir(parents=True)
                for name, size in _FILES.items():
                    (directory / name).write_bytes(os.urandom(size))

    def on_trial_result(self, **info: Any) -> None:
        self.last_result = time.monotonic()


def _fit(link: Link, train: Any, by: str, clock: Clock, trials: int, **config: Any) -> float:
    """Run an experiment by Ray's own syncing or ours; returns the seconds that ``fit`` took."""
    callbacks = [clock, SyncCallback()] if by == "ours" else [clock]
    settings = SyncConfig if by == "ours" else tune.SyncConfig
    tuner = tune.Tuner(
        tune.with_resources(train, {"CPU": 0.05}),
        param_space={"x": tune.grid_search(list(range(trials)))},
        run_config=tune.RunConfig(
            name="exp",
            storage_path=link.s3.uri(link.prefix(), port=link.proxy.port),
            sync_config=settings(**config),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    link.proxy.set(latency_s=LATENCY_S)
    link.proxy.reset_stats()
    start = time.monotonic()
    results = tuner.fit()
    took_s = time.monotonic() - start
    if results.errors:
        raise RuntimeError(str(results.errors[0]))
    return took_s


def fixed(by: str, trials: int, seconds: float) -> dict[str, Any]:
    """Trials that train so long, all at once, and write nothing."""

    def train(config: dict[str, Any]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(1)
            tune.report({"x": config["x"]})

    clock = Clock()
    with _link() as link, LocalCluster(workers=0, head_num_cpus=trials):
        took_s = _fit(link, train, by, clock, trials, sync_artifacts=True)
        ended = time.monotonic()
    return {"wall_s": took_s, "after_last_result_s": ended - clock.last_result}


def driver(by: str, trials: int, active: int, period: int, seconds: float) -> dict[str, Any]:
    """Active trials that report every second, beside the directories of those that have ended."""

    def train(config: dict[str, Any]) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(1)
            tune.report({"x": config["x"]})

    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = str(period)
    clock = Clock(trials - active)
    with _link() as link, LocalCluster(workers=0, head_num_cpus=2):
        took_s = _fit(link, train, by, clock, active, sync_period=1)
        ended = time.monotonic()
        stats = link.proxy.stats()
        stored = sum("/.tune_sync/" not in key for key in link.s3.keys())  # noqa: SIM118
    return {
        "wall_s": took_s,
        "after_last_result_s": ended - clock.last_result,
        "requests": stats.requests,
        "snapshots": len(scenarios.uploads(stats, r"/experiment_state-")),
        "requests_by_burst": _bursts(stats),
        "stored": stored,
    }


def _bursts(stats: Stats, gap_s: float = 1.5) -> list[int]:
    """How many requests came without so long a pause between them, burst by burst."""
    counts: list[int] = []
    last_s = float("-inf")
    for record in sorted(stats.records, key=lambda record: record.started_s):
        if record.started_s - last_s > gap_s:
            counts.append(0)
        counts[-1] += 1
        last_s = record.started_s
    return counts


def blocked(steps: int, rounds: int, bandwidth: float | None) -> dict[str, Any]:
    """A checkpoint and 20 MB of new artifacts per step, by Ray, by us and without any sync of them.

    ``report_s`` is how long each ``tune.report`` took, ``cpu_s`` what training's process used from
    there to the next step.
    """
    found: dict[str, Any] = {by: {"report_s": [], "cpu_s": []} for by in ("ray", "ours", "none")}
    with _link() as link, LocalCluster(workers=1):
        for _ in range(rounds):
            for by, figures in found.items():
                outcome = scenarios.fit(
                    link,
                    _train_blocked,
                    by=by,
                    space={"steps": steps},
                    shape={"latency_s": LATENCY_S, "bandwidth_bytes_per_s": bandwidth},
                )
                metrics = outcome.results[0].metrics
                for name in figures:
                    figures[name] += metrics[name]
    return found


def _train_blocked(config: dict[str, Any]) -> None:
    report_s, cpu_s = [], []
    for step in range(config["steps"] + 1):
        scenarios._write(f"artifact_{step}.bin", 20 * MB)
        before_s = time.process_time()
        report_s.append(scenarios.report({"step": step}, checkpoint=True))
        time.sleep(2.5)
        cpu_s.append(time.process_time() - before_s)
    # The first one imports and connects.
    tune.report({"step": -1, "report_s": report_s[1:], "cpu_s": cpu_s[1:]})


def hooks(trials: int) -> dict[str, Any]:
    """What the hooks cost, see ``hooks.py``."""
    with LocalCluster(workers=0, head_num_cpus=1):
        return dict(hook_costs.measure(trials))


@contextlib.contextmanager
def _link() -> Iterator[Link]:
    with (
        tempfile.TemporaryDirectory(prefix="tsb") as directory,
        S3Server.start(Path(directory)) as server,
        Proxy.start(server.host, server.port) as proxy,
    ):
        yield Link(server, proxy)


_RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    run.__name__: run for run in (fixed, driver, blocked, hooks)
}


def main() -> None:
    """Do the run that the arguments name."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    print(json.dumps(_RUNS[sys.argv[1]](**json.loads(sys.argv[2]))), file=answer, flush=True)


if __name__ == "__main__":
    main()
