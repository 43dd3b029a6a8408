"""What a run writes about itself, and two runs that share a directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs
from ray import tune

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.test_tune_modes import run_config, train
from tune_sync_plugin import SyncCallback
from tune_sync_plugin.cli.main import main
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.report import ExperimentReport
from tune_sync_plugin.runs import RUN, SUMMARY, RunFacts, claim, close, read_summary, summarize

FIRST = RunFacts("first", "2026-11-24T10:00:00+00:00")
SECOND = RunFacts("second", "2026-11-24T11:00:00+00:00")
RESTORED = RunFacts("third", "2026-11-24T12:00:00+00:00", resumed=True)


@pytest.fixture
def exp(tmp_path: Path) -> Storage:
    return storage_at(fs.LocalFileSystem(), str(tmp_path / "exp"))


def end(exp: Storage, facts: RunFacts) -> str | None:
    return close(exp, facts, summarize(ExperimentReport(), facts))


def test_one_run_after_the_other(exp: Storage) -> None:
    for facts in (FIRST, SECOND):
        assert claim(exp, facts) is None
        assert read_summary(exp) is None, "the last run's does not count any more"
        assert end(exp, facts) is None
        assert (read_summary(exp) or {})["run"] == facts.id


def test_two_runs_at_once_both_hear_of_it(exp: Storage) -> None:
    assert claim(exp, FIRST) is None
    said = claim(exp, SECOND)
    assert said
    assert FIRST.started in said
    assert "RunConfig(name=...)" in said
    said = end(exp, FIRST)
    assert said
    assert SECOND.started in said
    assert read_summary(exp) is None, "it would vouch for what the other may have replaced"
    assert end(exp, SECOND) is None


def test_going_on_with_a_killed_run_is_no_conflict(exp: Storage) -> None:
    assert claim(exp, FIRST) is None
    assert claim(exp, RESTORED) is None
    assert claim(exp, RESTORED) is None, "nor is claiming it again"
    assert end(exp, RESTORED) is None


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff"])
def test_what_is_unreadable_is_replaced(exp: Storage, tmp_path: Path, data: bytes) -> None:
    for path in (RUN, SUMMARY):
        (tmp_path / "exp" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "exp" / path).write_bytes(data)
    assert read_summary(exp) is None
    assert claim(exp, FIRST) is None
    assert end(exp, FIRST) is None
    assert (read_summary(exp) or {})["complete"]


def test_a_run_leaves_a_summary(storage: Path, cluster: LocalCluster) -> None:
    callback = SyncCallback()
    tune.Tuner(
        train, param_space={"x": tune.grid_search([1, 2])}, run_config=run_config(storage, callback)
    ).fit()
    summary = json.loads((storage / "exp" / SUMMARY).read_text())
    assert summary["complete"] is True
    assert summary["trials"].keys() == callback.report.trials.keys()
    for trial_id, part in summary["trials"].items():
        (log,) = storage.glob(f"exp/*{trial_id}*/log.txt")
        assert (part["files"], part["bytes"]) == (1, log.stat().st_size)
        assert part["failed"] == part["lost"] == []
        assert part["last_sync"]
    assert json.loads((storage / "exp" / RUN).read_text())["ended"]
    assert main(["verify", str(storage / "exp")]) == 0


SCRIPT = """
    import logging, sys, time
    import ray
    from ray import tune
    from pathlib import Path
    from tests.test_tune_modes import run_config, train
    from tune_sync_plugin import SyncCallback

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    callback = SyncCallback()
    tune.Tuner(
        train,
        param_space={"x": tune.grid_search([int(a) for a in sys.argv[2:]]), "steps": 8,
                     "sleep_s": 1},
        run_config=run_config(Path(sys.argv[1]), callback),
    ).fit()
    print("SUMMARY", callback.report.summary(), flush=True)
"""


@pytest.mark.slow
def test_two_experiments_of_one_name_at_once(storage: Path, figure: Callable[..., None]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_TMPDIR", None)

    def start(*xs: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), str(storage), *map(str, xs)],
            cwd=storage,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first = start(1, 2)
    second: subprocess.Popen[str] | None = None
    try:
        deadline = time.monotonic() + 60
        while not (storage / "exp" / RUN).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        second = start(3, 4)
        outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    finally:
        for process in (first, second):
            if process:
                process.kill()
    assert "wrote to" in outputs[0], outputs[0]
    assert "has not ended, unless it was killed" in outputs[1], outputs[1]
    for output in outputs:
        assert " 0 failed" in output
    logs = {path.read_text() for path in storage.glob("exp/*/log.txt")}
    wanted = {"".join(f"{x}:{step}\n" for step in range(8)) for x in (1, 2, 3, 4)}
    assert logs == wanted, "Ray keeps trials apart by their ids, and so do we"
    size = sum(map(len, wanted))
    figure("two experiments of one name at once", written=size, stored=sum(map(len, logs)))
