"""What is seen while a run goes on: the status line and when it comes, the flush's bar."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from tests.fake_executor import FakeClock
from tests.support.terminal import on_a_terminal
from tune_sync_plugin.metrics import Metrics
from tune_sync_plugin.progress import Bar, is_seen, of_flush
from tune_sync_plugin.report import (
    EXPERIMENT,
    ExperimentReport,
    FileFailure,
    MirrorReport,
    SyncReport,
)
from tune_sync_plugin.status_line import StatusLine
from tune_sync_plugin.targets import Account
from tune_sync_plugin.watching import Watching

PERIOD_S = 300.0
DENIED = FileFailure("t1", "a/b.txt", "PermissionError", "upload of s3/a/b.txt failed:\n403")


def uploaded(*sizes: int) -> ExperimentReport:
    report = ExperimentReport()
    for number, size in enumerate(sizes):
        report.add(f"t{number}", "A", SyncReport(1, size))
    return report


class TestStatusLine:
    def test_it_says_everything(self) -> None:
        report = uploaded(340_000_000)
        report.add("t1", "A", SyncReport(failures=(DENIED,)))
        account = Account(trials=12, synced=10, owed_trials=2, owed=3, failing=1, oldest_s=12.4)
        assert StatusLine(5.0, PERIOD_S).next(report, account, 15.0) == (
            "synced 10 of 12 trials, 340.0 MB up (34.0 MB/s), 2 not up to date, "
            "oldest unsynced 12 s, "
            "last error: t1/a/b.txt: PermissionError: upload of s3/a/b.txt failed: 403"
        )

    def test_what_is_not_there_is_not_said(self) -> None:
        line = StatusLine(0, PERIOD_S).next(uploaded(1000), Account(1, 1), 10)
        assert line == "synced 1 of 1 trial, 1.0 KB up (100 B/s)"

    def test_without_artifacts_it_speaks_of_the_state_alone(self) -> None:
        report = ExperimentReport(artifacts=False)
        report.add(EXPERIMENT, "A", SyncReport(1, 1000))
        assert StatusLine(0, PERIOD_S).next(report, Account(owed=1, oldest_s=3), 10) == (
            "syncing the experiment's state (artifacts are off), 1.0 KB up (100 B/s), "
            "oldest unsynced 3 s"
        )

    def test_before_anything_has_happened_it_is_silent(self) -> None:
        account = Account(3, 0, 2, 2, oldest_s=9)
        assert StatusLine(0, PERIOD_S).next(ExperimentReport(), account, 10) is None

    def test_before_the_first_trial_it_is_silent_unless_something_fails(self) -> None:
        report, line = ExperimentReport(), StatusLine(0, PERIOD_S)
        report.add(EXPERIMENT, "A", SyncReport(1, 1000))
        assert line.next(report, Account(), 10) is None
        report.add(EXPERIMENT, "A", SyncReport(failures=(DENIED,)))
        assert line.next(report, Account(owed=1, failing=1, oldest_s=5), 20)

    def test_it_is_silent_when_nothing_is_new(self) -> None:
        report, line = uploaded(1000), StatusLine(0, PERIOD_S)
        assert line.next(report, Account(2, 1, 1, 1, oldest_s=1), 10)
        assert line.next(report, Account(2, 1, 1, 1, oldest_s=11), 20) is None
        assert line.next(report, Account(2, 1, 2, 2, oldest_s=21), 30) is None
        assert line.next(report, Account(2, 2), 40)

    def test_what_hangs_is_said_though_nothing_is_new(self) -> None:
        report, line = uploaded(1000), StatusLine(0, PERIOD_S)
        said = [
            age
            for age in range(10, 3000, 10)
            if line.next(report, Account(2, 1, 1, 1, oldest_s=age), age)
        ]
        assert said == [10, 360, 720, 1440, 2880], "news, then when it is late, and twice as late"
        assert line.next(report, Account(2, 2), 3010)
        assert line.next(report, Account(2, 2, 1, 1, oldest_s=350), 3360) is None
        assert line.next(report, Account(2, 2, 1, 1, oldest_s=360), 3370)

    def test_the_rate_is_of_the_time_since_the_last_line_or_silence(self) -> None:
        report, line = uploaded(1000), StatusLine(0, PERIOD_S)
        line.next(report, Account(1, 1), 10)
        assert line.next(report, Account(1, 1), 1000) is None
        report.add("t0", "A", SyncReport(1, 500))
        assert "1.5 KB up (50 B/s)" in str(line.next(report, Account(1, 1), 1010))

    def test_the_last_error_is_said_once_and_while_something_fails(self) -> None:
        report, line = uploaded(1), StatusLine(0, PERIOD_S)
        report.add("t1", "A", SyncReport(failures=(DENIED,)))
        assert "last error" in str(line.next(report, Account(1, 0, 1, 1, failing=1), 10))
        report.add("t2", "A", SyncReport(1, 1))
        assert "last error" in str(line.next(report, Account(1, 0, 1, 1, failing=1), 20))
        assert "last error" not in str(line.next(report, Account(1, 1), 30))

    def test_an_error_that_is_mended_already_is_said_once(self) -> None:
        report, line = uploaded(1), StatusLine(0, PERIOD_S)
        report.add("t1", "A", SyncReport(failures=(DENIED,)))
        report.add("t1", "A", SyncReport(1, 1))
        assert "last error" in str(line.next(report, Account(1, 1), 10))
        report.add("t1", "A", SyncReport(1, 1))
        assert "last error" not in str(line.next(report, Account(1, 1), 20))

    def test_a_long_error_is_cut(self) -> None:
        report = ExperimentReport()
        report.add("t1", "A", SyncReport(failures=(DENIED._replace(message="x" * 5000),)))
        line = str(StatusLine(0, PERIOD_S).next(report, Account(1, 0, 1, 1, 1), 10))
        assert line.endswith("xxx...")
        assert len(line) < 450

    def test_the_mirrors_bytes_count(self) -> None:
        report = uploaded(1000)
        report.mirror = MirrorReport(bytes_uploaded=2000)
        assert "3.0 KB up" in str(StatusLine(0, PERIOD_S).next(report, Account(1, 1), 10))


class Watched:
    """A Watching, and what it asks and says."""

    def __init__(self, period_s: float = 60.0) -> None:
        self.clock = FakeClock()
        self.report = ExperimentReport()
        self.asked: list[float] = []
        self.found = Account(1, 1)
        self.watching = Watching(self.report, self.account, Metrics("exp"), period_s, self.clock)

    def account(self) -> Account:
        self.asked.append(self.clock.now)
        return self.found

    def run(self, seconds: int) -> None:
        for _ in range(seconds * 4):
            self.clock.advance(0.25)
            self.report.add("t", "A", SyncReport(1, 100))
            self.watching.poll()


class TestWhen:
    @pytest.fixture(autouse=True)
    def _hears(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "tune_sync_plugin.watching")

    def test_a_line_comes_once_per_period(self, caplog: pytest.LogCaptureFixture) -> None:
        watched = Watched(period_s=60)
        watched.run(59)
        assert not caplog.records
        watched.run(121)
        assert [record.levelname for record in caplog.records] == ["INFO"] * 3
        assert caplog.messages[0].startswith("synced 1 of 1 trial, 24.0 KB up (400 B/s)")

    def test_never_more_often_than_every_ten_seconds(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        Watched(period_s=0).run(60)
        assert len(caplog.records) == 6

    def test_the_account_is_asked_for_every_ten_seconds_alone(self) -> None:
        watched = Watched()
        watched.run(60)
        assert watched.asked == [10, 20, 30, 40, 50, 60]

    def test_after_a_silence_news_come_soon(self, caplog: pytest.LogCaptureFixture) -> None:
        watched = Watched(period_s=60)
        watched.found = Account(1)
        for _ in range(95):
            watched.clock.advance(1)
            watched.watching.poll()
        assert not caplog.records
        watched.run(10)
        assert len(caplog.records) == 1


class Tqdm:
    """Stands in for tqdm's."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.n = 0
        self.drawn: list[int] = []
        self.closed = False

    def refresh(self) -> None:
        self.drawn.append(self.n)

    def close(self) -> None:
        self.closed = True


class TestBar:
    def test_a_short_flush_has_none(self) -> None:
        clock, bars = FakeClock(), list[Tqdm]()
        with Bar(lambda total: bars.append(Tqdm(total)), clock=clock) as tell:
            tell(3)
            clock.advance(0.9)
            tell(1)
            clock.advance(5)
            tell(0)
        assert bars == []

    def test_it_counts_what_is_done(self) -> None:
        clock, bar = FakeClock(), Tqdm(0)

        def make(total: int) -> Tqdm:
            bar.total = total
            return bar

        with Bar(make, clock=clock) as tell:
            for left in (12, 12, 7, 7, 7, 2, 0):
                tell(left)
                clock.advance(0.6)
        assert bar.total == 12
        assert bar.drawn == [5, 5, 5, 10, 12]
        assert bar.closed

    def test_it_is_not_drawn_at_every_poll(self) -> None:
        clock, bar = FakeClock(), Tqdm(0)
        with Bar(lambda total: bar, clock=clock) as tell:
            for _ in range(1000):
                clock.advance(0.01)
                tell(5)
        assert 30 <= len(bar.drawn) <= 40

    def test_whatever_is_wrong_with_it_does_not_matter(self) -> None:
        clock, tries = FakeClock(), []

        def make(total: int) -> Any:
            tries.append(total)
            raise ImportError("no tqdm")

        with Bar(make, clock=clock) as tell:
            for left in (3, 2, 1, 0):
                tell(left)
                clock.advance(2)
        assert tries == [3]

    @pytest.mark.parametrize("stderr", [None, object(), io.StringIO()], ids=["none", "odd", "file"])
    def test_nobody_looks_at_what_is_no_terminal(
        self, stderr: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert not is_seen()

    def test_off_a_terminal_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        bar = of_flush(3)
        bar.n = 1
        bar.refresh()
        bar.close()
        assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]

    def test_on_a_terminal_it_is_seen(self) -> None:
        code = (
            "from tune_sync_plugin.progress import of_flush; bar = of_flush(12); bar.n = 5;"
            "bar.refresh()"
        )
        seen, _ = on_a_terminal([sys.executable, "-c", code])
        assert "final sync" in seen
        assert "5/12" in seen
