"""The dispatcher's rules, one by one, with a scripted executor and clock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from tests.fake_executor import (
    OK,
    TIMED_OUT,
    FakeClock,
    FakeExecutor,
    Sync,
    deferring,
    failing,
)
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.events import Ended
from tune_sync_plugin.report import EXPERIMENT, FileFailure, SyncReport
from tune_sync_plugin.targets import Account, Turn


class Bench:
    """A dispatcher between a fake executor and a list of its reports."""

    def __init__(
        self,
        *,
        period_s: float = 3,
        timeout_s: float = 10,
        slots: int = 2,
        nodes: str = "AB",
        prepare: Callable[[str, Turn], str] = lambda job, turn: job,
    ) -> None:
        self.clock = FakeClock()
        self.executor = FakeExecutor(self.clock, nodes, timeout_s)
        self.reports: list[tuple[float, str, str, SyncReport]] = []
        self.dispatcher = Dispatcher(
            self.executor,
            lambda key, node, report: self.reports.append((self.clock.now, key, node, report)),
            period_s=period_s,
            timeout_s=timeout_s,
            max_syncs_per_node=slots,
            prepare=prepare,
            clock=self.clock,
        )

    def trial(self, key: str, *nodes: str) -> None:
        self.dispatcher.add_target(key)
        self.place(key, *nodes)

    def place(self, key: str, *nodes: str, job: str | None = None) -> None:
        self.dispatcher.set_places(key, dict.fromkeys(nodes, job or key))

    def request(self, *keys: str) -> None:
        for key in keys:
            self.dispatcher.request(key, forced=False)

    def force(self, *keys: str) -> None:
        for key in keys:
            self.dispatcher.request(key, forced=True)

    def poll(self) -> None:
        with self.executor.polling():
            self.dispatcher.poll()

    def run(self, seconds: float, step: float = 0.5) -> None:
        """Poll now, and then every ``step`` seconds until they are over."""
        end = self.clock.now + seconds
        self.poll()
        while self.clock.now < end:
            self.clock.advance(step)
            self.poll()

    def failures(self, key: str) -> list[FileFailure]:
        return [f for _, k, _, report in self.reports if k == key for f in report.failures]

    def errors(self, key: str) -> list[str]:
        return [failure.error for failure in self.failures(key)]


@pytest.fixture
def bench() -> Bench:
    return Bench()


class TestPeriod:
    def test_the_first_sync_is_due_at_once(self, bench: Bench) -> None:
        bench.clock.advance(100)
        bench.trial("t", "A")
        bench.request("t")
        bench.poll()
        assert bench.executor.times("t") == [100]

    def test_nothing_is_synced_unasked(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.run(20)
        assert bench.executor.starts == []

    def test_it_lies_between_the_starts_of_two_syncs(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.default = Sync(takes=1)
        while bench.clock.now < 10:
            bench.request("t")
            bench.run(0.5)
        assert bench.executor.times("t") == [0, 3, 6, 9]

    def test_a_sync_longer_than_the_period_is_followed_at_once(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.default = Sync(takes=5)
        while bench.clock.now < 14:
            bench.request("t")
            bench.run(0.5)
        assert bench.executor.times("t") == [0, 5, 10]

    def test_a_request_that_it_holds_back_is_remembered(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.request("t")
        bench.run(20)
        assert bench.executor.times("t") == [0, 3]

    def test_zero_means_whenever_asked(self) -> None:
        bench = Bench(period_s=0)
        bench.trial("t", "A")
        for _ in range(4):
            bench.request("t")
            bench.run(0.5)
        assert bench.executor.times("t") == [0, 0.5, 1, 1.5]

    def test_a_target_may_have_its_own(self, bench: Bench) -> None:
        bench.dispatcher.add_target("t", 1)
        bench.place("t", "A")
        for _ in range(6):
            bench.request("t")
            bench.run(0.5)
        assert bench.executor.times("t") == [0, 1, 2, 3]

    def test_zero_of_its_own_is_not_the_default(self, bench: Bench) -> None:
        bench.dispatcher.add_target("t", 0)
        bench.place("t", "A")
        bench.request("t")
        bench.run(0.5)
        bench.request("t")
        bench.run(0.5)
        assert bench.executor.times("t") == [0, 0.5]

    def test_a_forced_sync_runs_although_it_is_not_over(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.force("t")
        bench.run(0.5)
        assert bench.executor.times("t") == [0, 1]

    def test_a_forced_sync_begins_it_anew(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.force("t")
        bench.run(1)
        bench.request("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 1, 4]

    def test_of_a_batch_counts_from_each_start_and_not_from_the_task_s(self) -> None:
        bench = Bench(slots=1)
        bench.trial("slow", "A")
        bench.trial("next", "A")
        bench.executor.will("slow", Sync(takes=2.5))
        bench.request("slow", "next")
        bench.run(2.5)
        assert bench.executor.times("next") == [2.5]
        while bench.clock.now < 7:
            bench.request("next")
            bench.run(0.5)
        assert bench.executor.times("next") == [2.5, 5.5]

    def test_an_early_plain_request_behind_a_forced_one_is_not_lost(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(0.5)
        bench.request("t")  # waits in the queue, until 3
        bench.force("t")  # overtakes it
        bench.run(0.5)
        bench.request("t")  # due at 3.5; the entry for 3 still stands
        bench.run(10)
        assert bench.executor.times("t") == [0, 0.5, 3.5]


class TestInFlight:
    def test_a_plain_request_is_kept_until_the_period_allows(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=1))
        bench.request("t")
        bench.run(0.5)
        bench.request("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 3]

    def test_a_forced_request_starts_another_when_it_ends(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=2))
        bench.force("t")
        bench.run(0.5)
        bench.force("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 2]

    def test_many_requests_queue_once(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=2))
        bench.force("t")
        bench.run(0.5)
        for _ in range(5):
            bench.force("t")
            bench.request("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 2]

    def test_a_plain_request_that_is_kept_can_still_be_forced(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=1))
        bench.request("t")
        bench.run(0.5)
        bench.request("t")
        bench.force("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 1]

    def test_a_forced_request_while_it_waits_for_a_slot_is_served_by_that_sync(self) -> None:
        bench = Bench(slots=1)
        bench.trial("busy", "A")
        bench.trial("t", "A")
        bench.executor.will("busy", Sync(takes=2))
        bench.force("busy")
        bench.poll()
        bench.request("t")
        bench.run(1)
        bench.force("t")
        bench.run(10)
        assert bench.executor.times("t") == [2]

    def test_a_failed_sync_waits_for_the_next_request(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(report=failing()))
        bench.force("t")
        bench.run(10)
        assert bench.executor.times("t") == [0]
        assert bench.errors("t") == ["PermissionError"]
        bench.request("t")
        bench.poll()
        assert bench.executor.times("t") == [0, 10]

    def test_poll_does_nothing_when_nothing_is_due(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        asked = bench.executor.asked_alive
        bench.request("t")
        bench.run(1)
        assert bench.executor.asked_alive == asked
        assert len(bench.executor.tasks) == 1


class TestTargets:
    def test_an_unknown_one_is_ignored(self, bench: Bench) -> None:
        bench.force("who")
        bench.run(1)
        assert bench.dispatcher.settle(["who"], 1)
        assert bench.executor.tasks == []

    def test_adding_it_again_changes_nothing(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.dispatcher.add_target("t", 0)
        bench.request("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 3]


class TestBatches:
    def test_what_is_due_together_on_a_node_travels_together(self) -> None:
        bench = Bench(slots=1)
        for number in range(5):
            bench.trial(f"t{number}", "A")
        bench.force(*(f"t{number}" for number in range(5)))
        bench.run(5)
        assert bench.executor.batches() == [["t0", "t1", "t2", "t3", "t4"]]
        assert [key for _, key, _, _ in bench.reports] == ["t0", "t1", "t2", "t3", "t4"]

    def test_it_is_spread_over_the_free_slots(self) -> None:
        bench = Bench(slots=2)
        for number in range(5):
            bench.trial(f"t{number}", "A")
        bench.force(*(f"t{number}" for number in range(5)))
        bench.poll()
        assert bench.executor.batches() == [["t0", "t1", "t2"], ["t3", "t4"]]

    def test_nodes_do_not_mix(self, bench: Bench) -> None:
        bench.trial("a", "A")
        bench.trial("b", "B")
        bench.force("a", "b")
        bench.poll()
        assert [(task.node, task.keys) for task in bench.executor.tasks] == [
            ("A", ["a"]),
            ("B", ["b"]),
        ]

    def test_one_task_takes_32_at_most(self) -> None:
        bench = Bench(slots=1)
        keys = [f"t{number}" for number in range(40)]
        for key in keys:
            bench.trial(key, "A")
        bench.force(*keys)
        bench.run(60)
        assert [len(batch) for batch in bench.executor.batches()] == [32, 8]

    def test_no_node_runs_more_than_max_syncs_per_node(self) -> None:
        bench = Bench(slots=2)
        bench.executor.default = Sync(takes=4)
        for number in range(6):
            bench.trial(f"t{number}", "AB"[number % 2])
        for number in range(6):
            bench.force(f"t{number}")
            bench.run(0.5)
            for node in "AB":
                assert len(bench.executor.running(node)) <= 2
        bench.run(20)
        assert len(bench.reports) == 6

    def test_forced_syncs_get_the_free_slot_before_plain_ones(self) -> None:
        bench = Bench(slots=1, period_s=0)
        for key in ("busy", "plain", "forced"):
            bench.trial(key, "A")
            bench.request(key)
            bench.run(1)
        bench.request("plain")
        bench.force("forced")
        bench.poll()
        assert bench.executor.batches()[-1] == ["forced", "plain"]

    def test_the_experiment_has_a_lane_of_its_own(self) -> None:
        bench = Bench(slots=1)
        bench.trial(EXPERIMENT, "A")
        bench.trial("t", "A")
        bench.trial("u", "A")
        bench.executor.default = Sync(takes=5)
        bench.force("t")
        bench.poll()
        bench.force("u", EXPERIMENT)
        bench.poll()
        assert bench.executor.batches() == [["t"], [EXPERIMENT]]
        bench.run(5)
        assert bench.executor.batches() == [["t"], [EXPERIMENT], ["u"]]

    def test_the_experiment_does_not_use_up_a_trial_s_slot(self) -> None:
        bench = Bench(slots=1)
        bench.trial(EXPERIMENT, "A")
        bench.trial("t", "A")
        bench.executor.default = Sync(takes=5)
        bench.force(EXPERIMENT)
        bench.poll()
        bench.force("t")
        bench.poll()
        assert bench.executor.batches() == [[EXPERIMENT], ["t"]]


class TestRoom:
    def test_what_has_none_waits_and_is_not_lost(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.trial("u", "B")
        bench.executor.full = {"A"}
        bench.force("t", "u")
        bench.run(2)
        assert bench.executor.times("t") == []
        assert bench.executor.times("u") == [0]
        bench.executor.full = set()
        bench.run(1)
        assert bench.executor.times("t") == [2]

    def test_what_has_waited_travels_together(self) -> None:
        bench = Bench(slots=1)
        bench.executor.full = {"A"}
        for key in "tuv":
            bench.trial(key, "A")
            bench.force(key)
            bench.run(1)
        bench.executor.full = set()
        bench.poll()
        assert bench.executor.batches() == [["t", "u", "v"]]

    def test_the_experiment_asks_first_and_on_its_own_account(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.trial(EXPERIMENT, "A")
        bench.force("t", EXPERIMENT)
        bench.poll()
        assert bench.executor.asked_room == [("A", True), ("A", False)]

    def test_it_is_not_asked_for_without_a_free_slot(self) -> None:
        bench = Bench(slots=1)
        bench.executor.default = Sync(takes=5)
        for key in "tu":
            bench.trial(key, "A")
            bench.force(key)
            bench.poll()
        assert len(bench.executor.asked_room) == 1

    def test_the_flush_waits_for_it(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.full = {"A"}
        bench.dispatcher.flush(3)
        assert bench.errors("t") == ["TimeoutError"]
        assert "not begun" in bench.failures("t")[0].message

    def test_tasks_that_have_nothing_to_say_are_not_polled_one_by_one(self, bench: Bench) -> None:
        bench.executor.default = Sync(takes=9)
        for key in "tuvwxyz":
            bench.trial(key, "A", "B")
            bench.force(key)
        bench.run(0)
        bench.run(0)
        polls = bench.executor.polls
        assert len(bench.executor.running()) == 2
        for _ in range(100):
            bench.clock.advance(0.01)
            bench.poll()
        assert bench.executor.polls == polls


class TestTimeouts:
    def test_a_sync_that_reports_a_timeout_is_killed(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=100))
        bench.force("t")
        bench.run(12)
        assert [(at, task.node) for at, task in bench.executor.kills] == [(10, "A")]
        assert bench.executor.running() == []
        assert [report for *_, report in bench.reports] == [TIMED_OUT]
        assert bench.executor.times("t") == [0]  # tried again at the next request only

    def test_what_was_batched_behind_it_starts_anew(self) -> None:
        bench = Bench(slots=1)
        for key in ("first", "slow", "behind", "last"):
            bench.trial(key, "A")
        bench.executor.will("slow", Sync(takes=100))
        bench.request("first", "slow", "behind", "last")
        bench.run(15)
        assert bench.executor.batches() == [["first", "slow", "behind", "last"], ["behind", "last"]]
        assert bench.executor.times("first") == [0]
        assert bench.executor.times("slow") == [0.25]
        assert bench.executor.times("behind") == [10.5]
        assert bench.errors("slow") == ["TimeoutError"]
        assert [key for _, key, _, r in bench.reports if r.complete] == ["first", "behind", "last"]

    def test_a_sync_that_says_nothing_is_killed_after_the_grace(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(hangs=True))
        bench.force("t")
        bench.run(12.5)  # its start was noticed at 0.5
        assert bench.executor.kills == []
        bench.run(0.5)
        assert [at for at, _ in bench.executor.kills] == [13]
        (failure,) = bench.failures("t")
        assert (failure.trial, failure.error) == ("t", "TimeoutError")
        assert "sync_timeout=10 s" in failure.message
        assert "node A" in failure.message
        assert bench.reports[0][3].timed_out

    def test_the_clock_of_each_sync_in_a_batch_is_its_own(self) -> None:
        bench = Bench(slots=1)
        keys = ["t0", "t1", "t2", "t3"]
        for key in keys:
            bench.trial(key, "A")
        bench.executor.default = Sync(takes=8)
        bench.force(*keys)
        bench.run(33)
        assert bench.executor.kills == []
        assert [report for *_, report in bench.reports] == [OK] * 4

    def test_a_hung_sync_does_not_take_the_rest_of_its_batch_along(self) -> None:
        bench = Bench(slots=1)
        bench.trial("hung", "A")
        bench.trial("behind", "A")
        bench.executor.will("hung", Sync(hangs=True))
        bench.force("hung", "behind")
        bench.run(15)
        assert bench.errors("hung") == ["TimeoutError"]
        assert bench.executor.times("behind") == [13]

    def test_a_slow_start_does_not_count(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.start_of["A"] = 50
        bench.executor.will("t", Sync(takes=9))
        bench.force("t")
        bench.run(60)
        assert bench.executor.kills == []
        assert bench.reports[0][3] == OK

    def test_a_task_that_never_starts_is_killed_and_reported(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.start_of["A"] = math.inf
        bench.force("t")
        bench.run(60)
        assert bench.executor.kills == []
        bench.run(1)
        (failure,) = bench.failures("t")
        assert (failure.trial, failure.error) == ("t", "TimeoutError")
        assert "did not start for 60 s" in failure.message
        assert len(bench.executor.kills) == 1
        bench.executor.start_of["A"] = 0.0
        bench.force("t")
        bench.run(1)
        assert bench.reports[-1][3] == OK

    def test_a_long_sync_timeout_gives_the_start_as_long(self) -> None:
        bench = Bench(timeout_s=200)
        bench.trial("t", "A")
        bench.executor.start_of["A"] = 150
        bench.force("t")
        bench.run(160)
        assert bench.reports[0][3] == OK

    def test_a_forced_request_meanwhile_gets_its_sync_after_the_kill(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=100))
        bench.force("t")
        bench.run(5)
        bench.force("t")
        bench.run(10)
        assert bench.executor.times("t") == [0, 10]

    def test_a_task_that_has_reported_everything_is_left_alone(self) -> None:
        # Its worker may be at another task by now. It holds no slot and is never killed.
        bench = Bench(slots=1)
        bench.trial("t", "A")
        bench.trial("u", "A")
        bench.force("t")
        bench.run(0.5)
        bench.force("u")
        bench.run(20)
        assert bench.executor.times("u") == [0.5]
        bench.dispatcher.stop()
        assert bench.executor.kills == []


class TestCrashes:
    def test_a_worker_s_crash_fails_only_the_sync_it_was_at(self) -> None:
        bench = Bench(slots=1)
        for key in ("first", "crashes", "behind"):
            bench.trial(key, "A")
        bench.executor.will("crashes", Sync(crash="WorkerCrashedError"))
        bench.request("first", "crashes", "behind")
        bench.run(3)
        assert bench.errors("crashes") == ["WorkerCrashedError"]
        assert bench.failures("crashes")[0].message == "as scripted"
        assert bench.executor.batches() == [["first", "crashes", "behind"], ["behind"]]
        assert [key for _, key, _, r in bench.reports if r.complete] == ["first", "behind"]
        assert bench.executor.kills == []  # it is gone already

    def test_a_task_that_cannot_start_fails_all_of_its_syncs(self) -> None:
        bench = Bench(slots=1)
        for key in ("t", "u"):
            bench.trial(key, "A")
        bench.executor.start_of["A"] = Ended("ModuleNotFoundError", "No module named 's3fs'")
        bench.force("t", "u")
        bench.run(10)
        assert bench.errors("t") == bench.errors("u") == ["ModuleNotFoundError"]
        assert "s3fs" in bench.failures("u")[0].message
        assert len(bench.executor.tasks) == 1

    def test_a_task_that_ends_early_without_a_word_is_a_failure(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.start_of["A"] = Ended()
        bench.force("t")
        bench.run(1)
        (failure,) = bench.failures("t")
        assert (failure.error, failure.message) == ("SyncError", "the sync task ended early")

    def test_a_refused_submission_is_reported_for_each_sync(self) -> None:
        bench = Bench(slots=1)
        for key in ("t", "u"):
            bench.trial(key, "A")
        bench.executor.start_of["A"] = ValueError("can't reach https://me:secret@host/x")
        bench.force("t", "u")
        bench.run(5)
        assert bench.errors("t") == bench.errors("u") == ["ValueError"]
        assert "starting the sync task failed: can't reach" in bench.failures("t")[0].message
        assert "secret" not in bench.failures("t")[0].message
        bench.executor.start_of["A"] = 0.0
        bench.force("t", "u")
        bench.run(1)
        assert [report for *_, report in bench.reports[-2:]] == [OK, OK]


class TestSuperseded:
    """A place that the trial has left must not undo what a later one has stored."""

    def bench(self) -> Bench:
        return Bench(
            prepare=lambda job, turn: f"{job}@only what is missing" if turn.superseded else job
        )

    def jobs(self, bench: Bench) -> list[tuple[str, list[str]]]:
        return [(task.node, task.jobs) for task in bench.executor.tasks]

    def test_the_flush_of_the_old_place_before_the_new_one_may_overwrite(self) -> None:
        bench = self.bench()
        bench.trial("t", "A")
        bench.place("t", "B")
        bench.force("t")
        bench.run(5)
        assert self.jobs(bench) == [("A", ["t"]), ("B", ["t"])]

    def test_a_retry_after_the_new_place_was_synced_fills_gaps_only(self) -> None:
        bench = self.bench()
        bench.trial("t", "A")
        bench.executor.will("t", Sync(report=failing()))
        bench.place("t", "B")
        bench.force("t")
        bench.run(5)
        bench.dispatcher.flush(10)
        assert self.jobs(bench)[2:] == [("A", ["t@only what is missing"]), ("B", ["t"])]


class TestNodes:
    def test_one_that_is_gone_is_reported_with_the_age_of_the_last_sync(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.force("t")
        bench.run(5)
        bench.executor.kill_node("A")
        bench.force("t")
        bench.run(5)
        (failure,) = bench.failures("t")
        assert failure.error == "NodeDiedError"
        # It was noticed at the poll after its end.
        assert "its last complete sync ended 4 s ago" in failure.message
        assert bench.executor.nodes_of("t") == "A"

    def test_one_that_is_scaled_down_when_all_is_synced_is_no_loss(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.force("t")
        bench.run(5)
        bench.executor.kill_node("A")
        bench.run(5)
        bench.dispatcher.flush(10)
        assert bench.errors("t") == []

    @pytest.mark.parametrize("last", [failing(), deferring()])
    def test_one_that_is_gone_after_an_incomplete_sync_is_a_loss(
        self, bench: Bench, last: SyncReport
    ) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(), Sync(report=last))
        for _ in range(2):
            bench.force("t")
            bench.run(5)
        bench.executor.kill_node("A")
        bench.dispatcher.flush(10)
        assert bench.errors("t")[-1] == "NodeDiedError"

    def test_one_that_is_gone_before_the_first_complete_sync(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(report=failing()), Sync(report=deferring()))
        for _ in range(2):
            bench.force("t")
            bench.run(5)
        bench.executor.kill_node("A")
        bench.force("t")
        bench.run(5)
        assert "it was never synced" in bench.failures("t")[-1].message

    def test_one_that_is_gone_is_reported_once_and_not_tried_again(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.kill_node("A")
        bench.force("t")
        bench.run(5)
        bench.force("t")
        bench.request("t")
        bench.run(5)
        bench.place("t")  # it starts anew, who knows where
        bench.run(5)
        bench.dispatcher.flush(10)
        assert bench.errors("t") == ["NodeDiedError"]
        assert bench.executor.tasks == []

    def test_one_that_is_gone_is_tried_again_when_the_trial_attaches_there(
        self, bench: Bench
    ) -> None:
        bench.trial("t", "A")
        bench.executor.kill_node("A")
        bench.force("t")
        bench.run(5)
        bench.executor.alive.add("A")
        bench.executor.start_of["A"] = 0.0
        bench.place("t", "A")
        bench.force("t")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "A"
        assert bench.reports[-1][3] == OK

    def test_one_that_joined_since_the_last_look_is_not_lost(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.force("t")
        bench.poll()
        bench.executor.alive.add("C")
        bench.clock.advance(0.1)
        bench.trial("u", "C")
        bench.force("u")
        bench.poll()
        assert bench.executor.nodes_of("u") == "C"

    def test_the_list_of_live_ones_is_not_fetched_for_every_task(self) -> None:
        bench = Bench(slots=10, period_s=0)
        for number in range(10):
            bench.trial(f"t{number}", "A")
            bench.force(f"t{number}")
            bench.run(0.05, step=0.05)
        assert bench.executor.asked_alive == 1

    def test_the_list_of_live_ones_grows_old(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.force("t")
        bench.run(1)
        bench.executor.kill_node("A")
        bench.clock.advance(0.1)
        bench.force("t")
        bench.poll()
        assert bench.errors("t") == ["NodeDiedError"]
        assert "gone" in bench.failures("t")[0].message

    def test_one_that_dies_during_a_sync(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=5))
        bench.force("t")
        bench.run(2)
        bench.executor.kill_node("A")
        bench.run(5)
        assert bench.errors("t") == ["NodeDiedError"]
        assert len(bench.executor.tasks) == 1

    def test_one_that_dies_takes_down_only_what_was_there(self, bench: Bench) -> None:
        bench.trial("t", "A", "B")
        bench.executor.kill_node("A")
        bench.force("t")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "B"
        assert bench.errors("t") == ["NodeDiedError"]

    def test_a_trial_that_waits_for_a_slot_when_its_node_dies(self) -> None:
        bench = Bench(slots=1)
        bench.trial("busy", "A")
        bench.trial("waits", "A")
        bench.executor.will("busy", Sync(takes=5))
        bench.force("busy")
        bench.poll()
        bench.force("waits")
        bench.run(2)
        bench.executor.kill_node("A")
        bench.run(3)
        assert bench.errors("busy") == bench.errors("waits") == ["NodeDiedError"]


class TestPlaces:
    def test_requests_before_the_first_are_remembered(self, bench: Bench) -> None:
        bench.dispatcher.add_target("t")
        bench.request("t")
        bench.run(5)
        bench.place("t", "A")
        bench.run(5)
        assert bench.executor.times("t") == [5]

    def test_forced_requests_before_the_first_stay_forced(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.place("t")
        bench.run(0.5)
        bench.force("t")
        bench.request("t")
        bench.run(0.5)
        bench.place("t", "A")
        bench.run(20)
        # The first request, what it left when it went, and the early forced one.
        assert bench.executor.times("t") == [0, 1, 2]

    def test_early_requests_outlive_a_restart_before_the_first_place(self, bench: Bench) -> None:
        bench.dispatcher.add_target("t")
        bench.place("t")
        bench.force("t")
        bench.place("t")
        bench.run(1)
        bench.place("t", "A")
        bench.run(1)
        assert bench.executor.times("t") == [1]

    def test_early_requests_are_served_once(self, bench: Bench) -> None:
        bench.dispatcher.add_target("t")
        bench.force("t")
        bench.place("t", "A")
        bench.run(5)
        bench.place("t", "B")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "AA"

    def test_what_a_trial_left_behind_goes_out_before_what_it_wrote_since(
        self, bench: Bench
    ) -> None:
        bench.trial("t", "A")
        bench.run(1)
        bench.place("t", "B")
        bench.force("t")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "AB"

    def test_the_order_of_places_is_that_of_the_last_visits(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.place("t", "B")
        bench.place("t", "A")
        bench.force("t")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "BA"

    def test_a_move_during_a_sync_syncs_the_old_place_once_more(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=2))
        bench.force("t")
        bench.run(1)
        bench.place("t")
        bench.place("t", "B")
        bench.request("t")
        bench.run(5)
        assert [(s.at, s.node) for s in bench.executor.started("t")] == [
            (0, "A"),
            (2, "A"),
            (2.5, "B"),
        ]

    def test_requests_go_to_where_the_trial_is_now(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.place("t", "B")
        bench.run(5)
        for _ in range(3):
            bench.force("t")
            bench.run(2)
        assert bench.executor.nodes_of("t") == "ABBB"

    def test_a_trial_on_several_nodes_is_synced_from_each(self, bench: Bench) -> None:
        bench.trial("t", "A", "B")
        bench.request("t")
        bench.run(5)
        assert bench.executor.nodes_of("t") == "AB"

    def test_no_node_of_a_busy_trial_starves(self, bench: Bench) -> None:
        bench.trial("t", "A", "B")
        bench.executor.default = Sync(takes=2)
        for _ in range(16):  # a checkpoint twice during every sync
            bench.force("t")
            bench.run(1)
        nodes = bench.executor.nodes_of("t")
        assert abs(nodes.count("A") - nodes.count("B")) <= 1

    def test_the_job_of_the_last_visit_counts(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.place("t", "A", job="t@new")
        bench.force("t")
        bench.poll()
        assert bench.executor.tasks[0].jobs == ["t@new"]


class TestFlush:
    def test_it_visits_every_place_of_every_target(self, bench: Bench) -> None:
        bench.trial(EXPERIMENT, "A")
        bench.trial("t", "A")
        bench.place("t", "B")
        bench.trial("u", "B")
        bench.run(5)
        before = len(bench.executor.started())
        bench.dispatcher.flush(10)
        visited = {(s.key, s.node) for s in bench.executor.started()[before:]}
        assert visited == {(EXPERIMENT, "A"), ("t", "A"), ("t", "B"), ("u", "B")}
        assert bench.clock.now < 8
        assert bench.executor.running() == []

    def test_it_runs_another_sync_after_the_one_in_flight(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=2))
        bench.force("t")
        bench.run(1)
        bench.dispatcher.flush(10)
        assert bench.executor.times("t") == [0, 2]

    def test_it_does_not_wait_for_the_period(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.request("t")
        bench.dispatcher.flush(10)
        assert bench.executor.times("t") == [0, 1]

    def test_its_tasks_stop_themselves_in_time_to_say_what_is_left(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.timeout_s = 100
        bench.executor.will("t", Sync(takes=50))
        bench.clock.advance(100)
        bench.dispatcher.flush(10)
        assert bench.executor.tasks[0].budget_s == 9.5
        assert bench.reports == [(109.5, "t", "A", TIMED_OUT)]
        assert [at for at, _ in bench.executor.kills] == [109.5]

    def test_tasks_before_it_have_no_budget(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.force("t")
        bench.poll()
        assert bench.executor.tasks[0].budget_s == math.inf

    def test_it_ends_after_its_time_and_names_what_was_under_way(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(hangs=True))
        bench.dispatcher.flush(5)
        assert bench.clock.now == 5
        (failure,) = bench.failures("t")
        assert (failure.trial, failure.error) == ("t", "TimeoutError")
        assert "node A was under way" in failure.message
        assert "5 s (sync_timeout)" in failure.message
        assert [at for at, _ in bench.executor.kills] == [5]
        assert bench.executor.running() == []

    def test_what_was_handed_over_before_and_began_late_is_heard_out(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.start_of["A"] = 3
        bench.executor.will("t", Sync(takes=1000))
        bench.force("t")
        bench.poll()
        bench.clock.advance(1)
        bench.dispatcher.flush(10)
        assert bench.reports[0] == (13, "t", "A", TIMED_OUT), "what it says of its files"
        assert bench.clock.now == 13, "two seconds over, and no longer"
        assert "when the flush ran out" in bench.failures("t")[-1].message
        assert len(bench.executor.tasks) == 1, "nothing more is begun"

    def test_it_names_what_had_not_begun(self) -> None:
        bench = Bench(slots=1)
        for key in ("hung", "behind", "waits"):
            bench.trial(key, "A")
        bench.executor.will("hung", Sync(hangs=True))
        bench.force("hung", "behind")
        bench.poll()
        bench.force("waits")
        bench.dispatcher.flush(5)
        assert "under way" in bench.failures("hung")[0].message
        assert "not begun" in bench.failures("behind")[0].message
        assert "not begun" in bench.failures("waits")[0].message

    def test_a_task_that_did_not_start_had_not_begun(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.start_of["A"] = math.inf
        bench.dispatcher.flush(5)
        assert "not begun" in bench.failures("t")[0].message

    def test_it_names_each_place_once(self) -> None:
        bench = Bench(slots=1)
        bench.trial("hung", "A")
        bench.trial("behind", "A")
        bench.executor.will("hung", Sync(hangs=True))
        bench.force("hung", "behind")
        bench.poll()
        bench.dispatcher.flush(5)
        assert bench.errors("hung") == bench.errors("behind") == ["TimeoutError"]
        assert len(bench.reports) == 2

    def test_nothing_starts_after_it(self) -> None:
        bench = Bench(slots=1)
        bench.trial("hung", "A")
        bench.trial("waits", "A")
        bench.executor.will("hung", Sync(hangs=True))
        bench.force("hung")
        bench.poll()
        bench.force("waits")
        bench.poll()
        bench.dispatcher.flush(5)
        bench.run(20)
        assert len(bench.executor.tasks) == 1

    def test_files_that_the_last_sync_named_stay_named(self, bench: Bench) -> None:
        bench.trial("t", "A")
        last = SyncReport(failures=failing().failures, deferred=deferring().deferred)
        bench.executor.will("t", Sync(report=last), Sync(hangs=True))
        bench.force("t")
        bench.run(1)
        bench.dispatcher.flush(5)
        report = bench.reports[-1][3]
        assert [failure.path for failure in report.failures] == ["a.txt", ""]
        assert [failure.path for failure in report.deferred] == ["log.txt"]

    def test_a_node_that_is_gone_is_named_without_waiting(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.kill_node("A")
        bench.dispatcher.flush(10)
        assert bench.errors("t") == ["NodeDiedError"]
        assert bench.clock.now == 0

    def test_a_node_that_dies_during_it(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.trial("u", "A")
        bench.trial("v", "B")
        bench.executor.start_of["A"] = Ended("NodeDiedError", "as scripted")
        bench.dispatcher.flush(10)
        assert set(bench.errors("t")) == set(bench.errors("u")) == {"NodeDiedError"}
        assert bench.errors("v") == []
        assert bench.clock.now < 2

    def test_failures_do_not_keep_it(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.default = Sync(report=failing())
        bench.dispatcher.flush(10)
        assert bench.errors("t") == ["PermissionError"]
        assert bench.clock.now < 1


class TestWaiting:
    def test_settle_waits_for_what_is_forced(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=2), Sync(takes=3))
        bench.force("t")
        bench.poll()
        bench.force("t")
        assert bench.dispatcher.settle(["t"], 10)
        assert bench.clock.now == 5

    def test_settle_does_not_wait_for_a_request_that_the_period_holds_back(
        self, bench: Bench
    ) -> None:
        bench.trial("t", "A")
        bench.request("t")
        bench.run(1)
        bench.request("t")
        assert bench.dispatcher.settle(["t"], 10)
        assert bench.clock.now == 1

    def test_settle_does_not_wait_for_others(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.trial("u", "A")
        bench.executor.will("u", Sync(takes=8))
        bench.force("u", "t")
        assert bench.dispatcher.settle(["t"], 10)
        assert bench.clock.now < 1

    def test_settle_gives_up(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=8))
        bench.force("t")
        assert not bench.dispatcher.settle(["t"], 3)
        assert bench.clock.now == 3
        assert bench.executor.kills == []

    def test_settle_waits_in_the_executor_and_not_in_a_busy_loop(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=8))
        bench.force("t")
        assert bench.dispatcher.settle(["t"], 10)
        assert len(bench.executor.waits) <= 85

    def test_stop_kills_what_is_under_way(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.trial("u", "B")
        bench.executor.default = Sync(takes=8)
        bench.force("t", "u")
        bench.poll()
        bench.dispatcher.stop()
        assert bench.executor.running() == []
        assert len(bench.executor.kills) == 2
        bench.dispatcher.stop()  # and nothing twice
        assert len(bench.executor.kills) == 2


class TestAccount:
    def test_of_nothing(self, bench: Bench) -> None:
        assert bench.dispatcher.account() == Account()

    def test_a_trial_is_owed_from_the_request_until_its_sync_is_over(self, bench: Bench) -> None:
        bench.trial("t", "A")
        assert bench.dispatcher.account() == Account(trials=1)
        bench.executor.default = Sync(takes=3)
        bench.request("t")
        bench.clock.advance(2)
        assert bench.dispatcher.account() == Account(1, 0, 1, 1, oldest_s=2)
        bench.poll()  # submitted
        bench.clock.advance(2)
        assert bench.dispatcher.account() == Account(1, 0, 1, 1, oldest_s=4)
        bench.run(2)
        assert bench.dispatcher.account() == Account(1, 1)

    def test_a_request_during_a_sync_is_owed_from_then_on(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.default = Sync(takes=2)
        bench.request("t")
        bench.poll()
        bench.clock.advance(1)
        bench.request("t")
        assert bench.dispatcher.account().oldest_s == 1
        bench.run(1)  # the first is over
        assert bench.dispatcher.account() == Account(1, 1, 1, 1, oldest_s=1)

    def test_what_failed_is_owed_since_its_request(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.will("t", Sync(takes=1, report=failing()), Sync(takes=1))
        bench.request("t")
        bench.run(5)
        assert bench.dispatcher.account() == Account(1, 0, 1, 1, failing=1, oldest_s=5)
        bench.request("t")
        assert bench.dispatcher.account().oldest_s == 5
        bench.run(2)
        assert bench.dispatcher.account() == Account(1, 1)

    def test_what_could_not_be_submitted_is_owed(self, bench: Bench) -> None:
        bench.executor.start_of["A"] = RuntimeError("as scripted")
        bench.trial("t", "A")
        bench.request("t")
        bench.poll()
        bench.clock.advance(3)
        assert bench.dispatcher.account() == Account(1, 0, 1, 1, failing=1, oldest_s=3)

    def test_what_stood_behind_a_killed_sync_is_owed_since_its_request(self) -> None:
        bench = Bench(slots=1)
        bench.trial("hangs", "A")
        bench.trial("waits", "A")
        bench.executor.will("hangs", Sync(hangs=True))
        bench.executor.will("waits", Sync(takes=5))
        bench.request("hangs", "waits")
        bench.run(14)
        assert bench.dispatcher.account() == Account(2, 0, 2, 2, failing=1, oldest_s=14)
        bench.run(5)
        assert bench.dispatcher.account() == Account(2, 1, 1, 1, failing=1, oldest_s=19)

    def test_the_oldest_of_all_counts_and_the_experiment_is_no_trial(self, bench: Bench) -> None:
        bench.trial(EXPERIMENT, "A")
        bench.trial("t", "B")
        bench.request(EXPERIMENT)
        bench.clock.advance(1)
        bench.request("t")
        bench.clock.advance(1)
        assert bench.dispatcher.account() == Account(1, 0, 1, 2, oldest_s=2)

    def test_what_a_trial_left_elsewhere_is_owed(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.default = Sync(takes=5)
        bench.place("t", "B")
        bench.clock.advance(1)
        assert bench.dispatcher.account() == Account(1, 0, 1, 1, oldest_s=1)

    def test_what_is_lost_is_neither_owed_nor_synced(self, bench: Bench) -> None:
        bench.trial("t", "A")
        bench.executor.kill_node("A")
        bench.request("t")
        bench.run(3)
        assert bench.dispatcher.account() == Account(trials=1)


class TestProgress:
    def test_the_flush_tells_how_many_targets_are_left(self) -> None:
        bench = Bench(slots=1)
        bench.executor.default = Sync(takes=1)
        for key in "abc":
            bench.trial(key, "A")
        told: list[tuple[float, int]] = []
        bench.dispatcher.flush(60, lambda left: told.append((bench.clock.now, left)))
        first = {left: at for at, left in reversed(told)}
        assert first == {3: 0, 2: 1, 1: 2, 0: 3}
        assert max(b[0] - a[0] for a, b in itertools.pairwise(told)) <= 0.1 + 1e-9
