"""One sync at a time for each trial, on a real cluster, while trials restart and move at once."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.restarts import (
    TRIAL_CPUS,
    Place,
    move_away_when_this_ends,
    note_start,
    remove_blockers,
    report_step,
    start_step,
)
from tests.support.stamping import Stamp, StampingFileSystem, stamps
from tune_sync_plugin import SyncCallback, SyncConfig

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

STEPS, FAIL_AFTER, TRIALS = 9, (2, 5), 4


@pytest.fixture(autouse=True)
def _no_blockers(cluster: LocalCluster) -> Iterator[None]:
    yield
    remove_blockers(cluster.node_ids)


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    # The first one moves each time it fails; the others go on wherever they may.
    return tune.PlacementGroupFactory([{"CPU": 0.1 if config["x"] else TRIAL_CPUS}])


def _train(config: dict[str, Any]) -> None:
    start = start_step()
    note_start(start)
    for step in range(start, STEPS):
        with open("log.txt", "a") as out:
            out.write(f"{step}\n")
        for number in range(4):
            Path(f"data_{number}").write_text(f"{step}")
        report_step(step)
        time.sleep(0.2)
        if step in FAIL_AFTER:
            if config["x"] == 0:
                move_away_when_this_ends()
                time.sleep(0.5)
            raise RuntimeError(f"as asked, after {step}")


def _spans(found: Iterable[Stamp]) -> list[tuple[float, float]]:
    """From when to when each client was at it."""
    times: dict[str, list[float]] = defaultdict(list)
    for stamp in found:
        times[stamp.client] += [stamp.start, stamp.end]
    return sorted((min(spans), max(spans)) for spans in times.values())


def _most_at_once(spans: list[tuple[float, float]]) -> int:
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("max_syncs_per_node", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_no_two_syncs_of_a_trial_overlap(
    storage: Path, tmp_path: Path, max_syncs_per_node: int
) -> None:
    log = tmp_path / "stamps"
    callback = SyncCallback()
    results = tune.Tuner(
        tune.with_resources(_train, _resources),
        param_space={"x": tune.grid_search(list(range(TRIALS)))},
        run_config=tune.RunConfig(
            name="exp",
            storage_path=str(storage),
            storage_filesystem=PyFileSystem(FSSpecHandler(StampingFileSystem(str(log)))),
            sync_config=SyncConfig(
                sync_artifacts=True, sync_period=0.1, max_syncs_per_node=max_syncs_per_node
            ),
            failure_config=tune.FailureConfig(max_failures=len(FAIL_AFTER)),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    assert not callback.report.failures
    place = Place.in_directory(storage)
    found = stamps(log)
    artifacts = [s for s in found if s.path.startswith(("log", "data", ".tune_sync/index"))]
    by_trial: dict[str, list[Stamp]] = defaultdict(list)
    by_node: dict[str, list[Stamp]] = defaultdict(list)
    for stamp in artifacts:
        by_trial[stamp.trial].append(stamp)
        by_node[stamp.node].append(stamp)

    assert len(by_trial) == TRIALS
    for trial, of_trial in by_trial.items():
        assert place.read("log.txt", trial) == b"".join(b"%d\n" % n for n in range(STEPS))
        spans = _spans(of_trial)
        assert len(spans) > len(FAIL_AFTER), "too few syncs to overlap"
        assert _most_at_once(spans) == 1, f"two syncs of {trial} at once"
    assert any(len({s.node for s in of_trial}) > 1 for of_trial in by_trial.values()), "moved"
    # What a node may do at once it does, and no more.
    assert max(_most_at_once(_spans(of_node)) for of_node in by_node.values()) == max_syncs_per_node
