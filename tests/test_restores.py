"""Restores that are not what they should be: they fail, hang, are switched off, have no index."""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.restarts import (
    TRIAL_CPUS,
    Place,
    fit,
    found_at,
    lines,
    move_away_when_this_ends,
    note_start,
    remove_blockers,
    report_step,
    start_step,
    train,
)
from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_blockers(cluster: LocalCluster) -> Iterator[None]:
    yield
    remove_blockers(cluster.node_ids)


def test_without_restore_nothing_comes_back_and_nothing_is_lost(
    place: Place, figure: Callable[..., None]
) -> None:
    results, callback = fit(place, space={"fails_after": [4]}, restore_artifacts=False)
    assert not results.errors
    stored = place.artifacts()
    first, second = found_at(place, 0), found_at(place, 5)
    assert first[0] != second[0]
    assert second[1:] == ([], ""), "nothing was there when it went on"
    for log in ("log.txt", "log2.txt"):
        assert stored[log] == lines(10, 5)
        assert stored[f"{log}.before-1"] == lines(5)
    assert "failed_after_4" in stored
    assert callback.report.files_restored == 0
    assert not callback.report.failures
    figure(
        f"restore_artifacts=False, {place.kind}",
        written=2 * len(lines(10)),
        stored=sum(len(content) for name, content in stored.items() if name.startswith("log")),
    )


# -- a restore that fails -----------------------------------------------------------------------


def _train_two(config: dict[str, Any]) -> None:
    """x=1 fails and moves; x=2 goes on beside it."""
    if config["x"] == 1:
        train({"fails_after": [4]})
    else:
        train({"steps": 40, "sleep_s": 0.3})


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    # The second one is small: wherever it is, the first one and a blocker beside it matter alone.
    return tune.PlacementGroupFactory([{"CPU": TRIAL_CPUS if config["x"] == 1 else 0.1}])


@pytest.mark.parametrize(
    "what", ["files", pytest.param("everything", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    ("action", "error"), [("status:403", "PermissionError"), ("hang", "TimeoutError")]
)
def test_a_restore_that_fails_ends_no_trial_and_overwrites_nothing(
    link: Link,
    what: str,
    action: str,
    error: str,
    figure: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = Place.on_s3(link)
    # The trial can still write, and read its checkpoints.
    files = r"(log|attempt|failed)" if what == "files" else r"(?!checkpoint_)"
    link.proxy.add_rule(rf"x=1[^/]*/{files}", action, method="GET")
    results, callback = fit(
        place,
        trainable=_train_two,
        space={"x": tune.grid_search([1, 2])},
        resources=_resources,
        sync_timeout=5,
    )
    link.proxy.clear_rules()
    assert not results.errors
    first, second = found_at(place, 0, "x=1"), found_at(place, 5, "x=1")
    assert first[0] != second[0]
    # An empty file needs no GET.
    assert set(second[1]) <= {"failed_after_4"}
    (trial_id,) = (r.metrics["trial_id"] for r in results if r.config["x"] == 1)
    stored = place.artifacts("x=1")

    # What had been stored is there, beside what was written since.
    if callback.report.failures:  # nothing but time can be short, which is named
        assert action == "hang"
        assert {f.error for f in callback.report.failures} == {"TimeoutError"}
    else:
        assert stored["log.txt"] == lines(10, 5)
        assert stored["log2.txt"] == lines(10, 5)
    assert stored["log.txt.before-1"] == lines(5)
    assert stored["log2.txt.before-1"] == lines(5)
    assert "failed_after_4" in stored

    failures = callback.report.not_restored
    # pyarrow says OSError, with the cause in its text: also that of its own timeouts, if one of
    # these comes when no time is left for another try.
    errors = {error, "OSError"}
    assert failures
    assert all(f.trial == trial_id and f.error in errors for f in failures), failures
    if what == "files":
        assert {f.path for f in failures} == {
            "log.txt",
            "log2.txt",
            "attempt_at_0.txt",
        }
    said = [r for r in caplog.records if r.name.startswith("tune_sync_plugin")]
    told = sum("restoring" in r.message or "reading the index" in r.message for r in said)
    assert told == len({f.error for f in failures}), "once per kind of error"

    # And the other trial did not notice.
    times = [
        float(found) for found in re.findall(rb'"at": ([\d.]+)', place.read("result.json", "x=2"))
    ]
    assert len(times) == 40
    assert max(b - a for a, b in itertools.pairwise(times)) < 3
    figure(
        f"restore fails: {action} for {what}",
        written=2 * len(lines(10)),
        stored=sum(len(content) for name, content in stored.items() if name.startswith("log")),
        more=f"not restored: {len(failures)} named",
    )


# -- an experiment that Ray alone synced --------------------------------------------------------


def _train_by_ray(config: dict[str, Any]) -> None:
    """Fails after step 4 and goes on elsewhere.

    Nothing for ``get_trial_dir()``: without us that directory is on the driver's node only.
    """
    start = start_step()
    note_start(start)
    if start == 0:
        Path("sub").mkdir()
        Path("sub/once.txt").write_text("once")
    for step in range(start, 10):
        with open("log.txt", "a") as out:
            out.write(f"{step}\n")
        report_step(step)
        if step == 4:
            move_away_when_this_ends()
            time.sleep(0.5)
            raise RuntimeError("as asked, after 4")


@pytest.mark.parametrize(
    ("where", "by"),
    [
        ("new cluster", "Tuner.restore"),
        pytest.param("new cluster", "tune.run", marks=pytest.mark.exhaustive),
        pytest.param("same cluster", "Tuner.restore", marks=pytest.mark.exhaustive),
    ],
)
def test_what_ray_alone_synced_comes_back_by_a_listing(
    place: Place, where: str, by: str, figure: Callable[..., None]
) -> None:
    trainable = tune.with_resources(_train_by_ray, {"CPU": TRIAL_CPUS})
    tuner = tune.Tuner(
        trainable,
        run_config=tune.RunConfig(
            name="exp",
            storage_path=place.storage_path,
            sync_config=tune.SyncConfig(sync_artifacts=True, sync_period=0),
            verbose=0,
        ),
    )
    with contextlib.ExitStack() as stack:
        if where == "new cluster":
            stack.enter_context(LocalCluster(workers=1))
        (failed,) = tuner.fit().errors
    assert "as asked, after 4" in str(failed)
    before = place.artifacts()
    assert before.keys() == {"log.txt", "sub/once.txt", "attempt_at_0.txt"}
    assert before["log.txt"] == lines(5)  # with the checkpoint
    beside = {name.split("/", 2)[2] for name in place.names() if name.count("/") > 1}
    assert {"result.json", "params.json", "error.txt", "checkpoint_000004/step"} <= beside
    assert not any(".tune_sync" in name for name in beside)

    callback = SyncCallback()
    if by == "Tuner.restore":
        path, query, options = place.storage_path.partition("?")
        restored = tune.Tuner.restore(
            f"{path}/exp{query}{options}", trainable=trainable, resume_errored=True
        )
        # There is no public way to give a restored Tuner a callback.
        restored._local_tuner.get_run_config().callbacks = [callback]
        assert not restored.fit().errors
    else:
        trials = tune.run(
            trainable,
            name="exp",
            storage_path=place.storage_path,
            resume="AUTO+ERRORED",
            sync_config=tune.SyncConfig(sync_artifacts=True),
            callbacks=[callback],
            verbose=0,
        ).trials
        assert [trial.status for trial in trials] == ["TERMINATED"]

    first, second = found_at(place, 0), found_at(place, 5)
    assert first[0] != second[0]
    assert set(second[1]) == before.keys(), "artifacts, and nothing else"
    assert second[2].encode() == before["log.txt"]
    stored = place.artifacts()
    assert stored.keys() == before.keys() | {"attempt_at_5.txt"}
    for name, content in before.items():
        assert stored[name] == content + (lines(10, 5) if name == "log.txt" else b"")
    (trial,) = callback.report.trials.values()
    (report,) = trial.restored
    # In the same cluster what lies on the old node is synced first, by which there is an index.
    assert report.from_index == (where == "same cluster")
    assert report.files_restored == len(before)
    assert not report.failures
    assert not callback.report.failures
    figure(
        f"Ray's own sync, then {by} with ours, {where}, {place.kind}",
        written=len(lines(10)),
        stored=len(stored["log.txt"]),
        more=f"{report.files_restored} files restored by a listing",
    )
