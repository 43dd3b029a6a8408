"""Many trials with many files each: all of it arrives, and the driver hardly notices.

Two runs in a process of their own each, one without the callback as the baseline: what Tune itself
costs for so many trials is no concern of this test.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from tests.support.cluster import REPOSITORY, LocalCluster
from tune_sync_plugin import SyncCallback, SyncConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRIALS, FILES = 100, 50
HOOKS = (
    "on_trial_start",
    "on_trial_result",
    "on_checkpoint",
    "on_trial_complete",
    "on_step_end",
)


def content(x: int, number: int) -> bytes:
    """A file's bytes, from none to some kilobytes, another for each trial and number."""
    return hashlib.sha256(f"{x}/{number}".encode()).digest() * (number * 3)


class Trainable(tune.Trainable):
    """Writes its files in two steps; cheap to reuse for the next trial."""

    def setup(self, config: dict[str, Any]) -> None:
        self.x = config["x"]

    def step(self) -> dict[str, Any]:
        half = range(self.iteration % 2, FILES, 2)
        for number in half:
            path = Path(f"dir_{number % 5}", f"file_{number}.bin")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content(self.x, number))
        time.sleep(0.2)  # long enough for Tune to want more than one actor
        return {"done": self.iteration == 1}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.x = new_config["x"]
        return True


class Timed(SyncCallback):
    """Notes how long each of its hooks takes, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[str, list[float]] = {name: [] for name in HOOKS}


def _timed(name: str) -> Callable[..., None]:
    original = getattr(SyncCallback, name)

    @functools.wraps(original)
    def hook(self: Timed, *args: Any, **info: Any) -> None:
        begun = time.perf_counter()
        try:
            original(self, *args, **info)
        finally:
            self.times[name].append(time.perf_counter() - begun)

    return hook


for _name in HOOKS:
    setattr(Timed, _name, _timed(_name))


def drive(address: str, storage: str, with_callback: bool) -> None:
    """One run in a driver process of its own; prints its figures as JSON."""
    ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False)
    callback = Timed() if with_callback else None
    tuner = tune.Tuner(
        tune.with_resources(Trainable, {"CPU": 1}),  # four at once, two on each node
        param_space={"x": tune.grid_search(list(range(TRIALS)))},
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            name="exp",
            storage_path=storage,
            sync_config=SyncConfig(sync_artifacts=with_callback, sync_period=5),
            callbacks=[callback] if callback else [],
            verbose=0,
        ),
    )
    before = _rss_bytes()
    begun = time.monotonic()
    results = tuner.fit()
    figures: dict[str, Any] = {
        "wall_s": time.monotonic() - begun,
        "grown": _rss_bytes() - before,
        "errors": len(results.errors),
        "trials": {result.metrics["trial_id"]: result.config["x"] for result in results},
    }
    if callback:
        report = callback.report
        figures |= {
            "times": callback.times,
            "summary": report.summary(),
            "failures": [str(failure) for failure in report.failures],
            "not_attached": report.not_attached,
            "reported": {key: trial.files for key, trial in report.trials.items()},
            "bytes_uploaded": sum(t.bytes_uploaded for t in report.trials.values()),
            "nodes": sorted({n for t in report.trials.values() for n in t.last_by_node}),
        }
    print("FIGURES" + json.dumps(figures))


def _rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _run(cluster: LocalCluster, storage: Path, *, ours: bool) -> Any:
    storage.mkdir()
    script = f"""
        import ray._private.services
        ray._private.services.resolve_ip_for_localhost = str  # as LocalCluster does
        from tests.test_scale import drive
        drive({cluster.address!r}, {str(storage)!r}, {ours})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES")]
    assert lines, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(lines[0][len("FIGURES") :])


def test_a_hundred_trials(
    cluster: LocalCluster, tmp_path: Path, figure: Callable[..., None]
) -> None:
    baseline = _run(cluster, tmp_path / "baseline", ours=False)
    run = _run(cluster, tmp_path / "ours", ours=True)
    storage = tmp_path / "ours" / "exp"

    assert run["errors"] == 0
    assert sorted(run["trials"].values()) == list(range(TRIALS))
    stored = written = 0
    for trial_id, x in run["trials"].items():
        (trial,) = (path for path in storage.iterdir() if f"_{trial_id}_" in path.name)
        found = {path.name: path for path in trial.glob("dir_*/*")}
        assert sorted(found) == sorted(f"file_{n}.bin" for n in range(FILES)), trial_id
        for number in range(FILES):
            expected = content(x, number)
            path = found[f"file_{number}.bin"]
            assert path.parent.name == f"dir_{number % 5}"
            assert path.read_bytes() == expected, path
            written += len(expected)
            stored += path.stat().st_size

    # The report says the same.
    assert run["failures"] == []
    assert run["not_attached"] == {}
    assert run["reported"] == dict.fromkeys(run["trials"], FILES)
    assert run["bytes_uploaded"] >= written
    assert f"synced {TRIALS} trials: " in run["summary"]
    assert " 0 failed" in run["summary"]
    # How many of them Tune uses for actors that it reuses is up to it and to the machine.
    assert set(run["nodes"]) <= set(cluster.node_ids[:2])

    medians = {name: statistics.median(times) for name, times in run["times"].items() if times}
    assert medians.keys() >= {"on_trial_start", "on_trial_result", "on_trial_complete"}
    assert len(run["times"]["on_trial_result"]) == 2 * TRIALS
    slowest = max(medians, key=lambda name: medians[name])
    worst_s = max(max(times) for times in run["times"].values() if times)
    in_hooks_s = sum(sum(times) for times in run["times"].values())
    ours_bytes = run["grown"] - baseline["grown"]
    figure(
        f"{TRIALS} trials x {FILES} files on {len(run['nodes'])} node(s)",
        written=written,
        stored=stored,
        more=f"{run['wall_s']:.0f} s, {baseline['wall_s']:.0f} s without the callback; driver grew "
        f"{run['grown'] / 1e6:.1f} MB, {baseline['grown'] / 1e6:.1f} MB without; slowest hook "
        f"{slowest}, median {medians[slowest] * 1e6:.0f} us; longest single one "
        f"{worst_s * 1e3:.1f} ms; {in_hooks_s:.2f} s in all hooks",
    )
    # Of the same run, which is as slow as the machine: waiting for a sync here would be most of it.
    assert in_hooks_s < 0.1 * run["wall_s"]
    assert ours_bytes < 50e6
