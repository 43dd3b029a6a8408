"""Reports: how syncs add up, and the line a person reads."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from tune_sync_plugin.history import MOST_POINTS, History
from tune_sync_plugin.report import (
    EXPERIMENT,
    MOST_PLOTTED,
    ExperimentReport,
    FileFailure,
    RestoreReport,
    SyncReport,
    TrialReport,
    human_bytes,
)

DENIED = FileFailure("t1", "a/b.txt", "PermissionError", "upload of s3/a/b.txt failed: 403")
CHANGED = FileFailure("t1", "log.txt", "SourceChangedError", "it shrank; the next sync takes it")
LATE = FileFailure("t1", "", "TimeoutError", "killed after sync_timeout=5 s")


class TestFileFailure:
    def test_reads_as_a_line(self) -> None:
        assert str(DENIED) == "t1/a/b.txt: PermissionError: upload of s3/a/b.txt failed: 403"

    def test_of_a_whole_directory_reads_as_a_line(self) -> None:
        assert str(LATE) == "t1: TimeoutError: killed after sync_timeout=5 s"


class TestSyncReport:
    def test_without_failures_it_is_complete(self) -> None:
        assert SyncReport().complete
        assert SyncReport(skipped=("pipe",), warnings=("slow",), files_uploaded=3).complete

    def test_with_failures_or_deferred_files_it_is_not(self) -> None:
        assert not SyncReport(failures=(DENIED,)).complete
        assert not SyncReport(deferred=(CHANGED,)).complete

    def test_it_is_a_value(self) -> None:
        report = SyncReport(failures=(DENIED,), files_uploaded=3)
        assert pickle.loads(pickle.dumps(report)) == report
        with pytest.raises(dataclasses.FrozenInstanceError):
            report.files_uploaded = 4  # type: ignore[misc]


class TestTrialReport:
    def test_syncs_add_up(self) -> None:
        trial = TrialReport()
        trial.add("A", SyncReport(2, 200, 0, 0))
        trial.add("A", SyncReport(1, 50, 2, 200))
        assert (trial.syncs, trial.files_uploaded) == (2, 3)
        assert (trial.bytes_uploaded, trial.bytes_unchanged) == (250, 200)

    def test_of_several_nodes_the_one_that_knows_most_counts(self) -> None:
        trial = TrialReport()
        trial.add("A", SyncReport(files_stored=2, bytes_stored=20))
        trial.add("B", SyncReport(files_stored=5, bytes_stored=50))
        trial.add("A", SyncReport(files_stored=2, bytes_stored=20))
        assert (trial.files, trial.bytes) == (5, 50)

    def test_a_sync_that_did_not_get_to_work_says_nothing_about_files(self) -> None:
        trial = TrialReport()
        trial.add("A", SyncReport(files_stored=2))
        trial.add("A", SyncReport(failures=(LATE,)))
        assert trial.files == 2

    def test_failures_are_those_of_each_node_s_last_sync(self) -> None:
        trial = TrialReport()
        trial.add("A", SyncReport(failures=(DENIED,)))
        trial.add("B", SyncReport(failures=(LATE,), deferred=(CHANGED,)))
        assert trial.failures == [DENIED, LATE, CHANGED]
        trial.add("A", SyncReport())
        assert trial.failures == [LATE, CHANGED]
        trial.add("B", SyncReport())
        assert trial.failures == []


class TestExperimentReport:
    def test_empty(self) -> None:
        report = ExperimentReport()
        assert report.failures == []
        assert (report.files, report.bytes_uploaded, report.bytes_unchanged) == (0, 0, 0)
        assert report.summary() == (
            "synced 0 trials: 0 files, 0 B uploaded, 0 B unchanged, 0 failed, 0.0 s"
        )

    def test_the_experiment_is_not_a_trial(self) -> None:
        report = ExperimentReport()
        report.add(EXPERIMENT, "A", SyncReport(files_uploaded=1))
        assert report.trials == {}
        assert report.of(EXPERIMENT) is report.experiment
        assert report.experiment.syncs == 1

    def test_sums_are_over_trials_and_the_experiment(self) -> None:
        report = ExperimentReport()
        report.add(EXPERIMENT, "A", SyncReport(1, 10, 2, 20, deferred=(CHANGED,), files_stored=3))
        report.add("t1", "A", SyncReport(3, 300, 4, 400, failures=(DENIED,), files_stored=7))
        report.add("t2", "B", SyncReport(5, 5000, 0, 0, files_stored=5))
        assert list(report.trials) == ["t1", "t2"]
        assert report.files == 15
        assert report.bytes_uploaded == 5310
        assert report.bytes_unchanged == 420
        assert report.failures == [CHANGED, DENIED]
        report.duration_s = 12.34
        assert report.summary() == (
            "synced 2 trials: 15 files, 5.3 KB uploaded, 420 B unchanged, 2 failed, 12.3 s"
        )

    def test_timeouts_stay_when_a_later_sync_succeeds(self) -> None:
        report = ExperimentReport()
        report.add("t1", "A", SyncReport(failures=(DENIED, LATE), timed_out=True))
        report.add("t1", "A", SyncReport())
        assert report.failures == []
        assert report.timeouts == [LATE]

    def test_durations_and_restores_add_up(self) -> None:
        trial = TrialReport()
        trial.add("A", SyncReport(duration_s=1.5))
        trial.add("B", SyncReport(duration_s=2.0))
        trial.restored += [RestoreReport(files_restored=2), RestoreReport(files_restored=3)]
        assert (trial.duration_s, trial.files_restored) == (3.5, 5)

    def test_the_latest_failure_stays_when_a_later_sync_succeeds(self) -> None:
        report = ExperimentReport()
        report.add("t1", "A", SyncReport(failures=(DENIED, LATE), deferred=(CHANGED,)))
        assert report.latest_failure == LATE
        report.add("t1", "A", SyncReport(deferred=(CHANGED,)))
        report.add("t1", "A", SyncReport())
        assert report.latest_failure == CHANGED


class TestHistory:
    def test_it_is_cumulative_and_nothing_leaves_no_point(self) -> None:
        history = History()
        assert history.total == 0
        for at, count in enumerate([5, 0, 7]):
            history.add(at, count)
        assert history.points == [(0, 5), (2, 12)]
        assert history.total == 12

    def test_it_is_thinned_out(self) -> None:
        history = History()
        for at in range(20 * MOST_POINTS):
            history.add(at, 1)
            assert len(history.points) <= MOST_POINTS
        assert len(history.points) > MOST_POINTS / 2 - 2
        assert history.points[0] == (0, 1)
        assert history.points[-1] == (20 * MOST_POINTS - 1, 20 * MOST_POINTS)
        assert all(count == at + 1 for at, count in history.points)

    def test_a_report_has_one_in_total_and_one_per_trial(self) -> None:
        report = ExperimentReport()
        report.add(EXPERIMENT, "A", SyncReport(bytes_uploaded=1))
        report.add("t1", "A", SyncReport(bytes_uploaded=20))
        report.add("t2", "A", SyncReport(bytes_uploaded=300))
        report.add("t1", "B", SyncReport(bytes_uploaded=4000))
        assert [count for _, count in report.history.points] == [1, 21, 321, 4321]
        per_trial = {key: h.total for key, h in report.trial_histories.items()}
        assert per_trial == {"t1": 4020, "t2": 300}
        assert pickle.loads(pickle.dumps(report)) == report

    def test_many_trials_have_none_of_their_own(self) -> None:
        report = ExperimentReport()
        for number in range(MOST_PLOTTED):
            report.add(f"t{number}", "A", SyncReport(bytes_uploaded=1))
        assert len(report.trial_histories) == MOST_PLOTTED
        for number in (MOST_PLOTTED, 0):
            report.add(f"t{number}", "A", SyncReport(bytes_uploaded=1))
            assert report.trial_histories == {}
        assert report.history.total == MOST_PLOTTED + 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (1234, "1.2 KB"),
        (999_949, "999.9 KB"),
        (999_950, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (5e9, "5.0 GB"),
        (7.25e12, "7.2 TB"),
        (1.5e15, "1500.0 TB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
