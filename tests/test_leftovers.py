"""What a killed driver left: who is asked, what is made of the answers, and of those that fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_executor import FakeClock
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.leftovers import Leftovers


class Asking:
    """An executor's part that asks nodes. An answer is the keys, an error, or ``None`` for never.

    Each comes ``after_s`` seconds after the question.
    """

    def __init__(self, clock: FakeClock, answers: dict[str, Any], after_s: float) -> None:
        self._clock, self._answers = clock, answers
        self._at = clock() + after_s
        self.killed: list[str] = []
        self.shared = 0

    def alive_nodes(self) -> set[str]:
        return set(self._answers)

    def share(self, argument: Any) -> Any:
        self.shared += 1
        return argument

    def call(self, node_id: str, function: Any, *arguments: Any) -> str:
        return node_id

    def is_ready(self, reference: str) -> bool:
        return self._clock() >= self._at and self._answers[reference] is not None

    def result(self, reference: str) -> Any:
        if isinstance(answer := self._answers[reference], Exception):
            raise answer
        return answer

    def kill(self, reference: str) -> None:
        self.killed.append(reference)

    def wait(self, references: list[str], timeout_s: float) -> None:
        self._clock.advance(timeout_s)


def ask(answers: dict[str, Any], after_s: float = 1.0) -> tuple[Leftovers, Dispatcher, Any, Any]:
    clock = FakeClock()
    executor: Any = Asking(clock, answers, after_s)
    dispatcher = Dispatcher(
        executor, lambda *_: None, period_s=1, timeout_s=9, max_syncs_per_node=1, clock=clock
    )
    jobs: Any = {"t1": "job 1", "t2": "job 2"}
    return Leftovers(executor, dispatcher, jobs, clock), dispatcher, executor, clock


def test_what_lies_there_is_requested() -> None:
    leftovers, dispatcher, executor, clock = ask({"A": ["t1"], "B": ["t1", "t2"], "C": []})
    assert not leftovers.collect()
    assert dispatcher.places("t1") == []
    clock.advance(1)
    assert leftovers.collect()
    assert sorted(dispatcher.places("t1")) == ["A", "B"]
    assert dispatcher.places("t2") == ["B"]
    assert executor.shared == 1, "the jobs of all trials travel once, and not once per node"


def test_a_run_that_ends_at_once_waits_for_the_answers() -> None:
    leftovers, dispatcher, _, _ = ask({"A": ["t1"]}, after_s=3)
    assert leftovers.wait(30) == pytest.approx(3, abs=0.2)
    assert dispatcher.places("t1") == ["A"]


def test_a_node_that_hangs_holds_nobody_up_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    leftovers, dispatcher, executor, clock = ask({"A": ["t1"], "B": None})
    clock.advance(50)
    assert not leftovers.collect()
    assert dispatcher.places("t1") == ["A"]
    clock.advance(50)
    assert leftovers.collect()
    assert leftovers.collect()
    assert executor.killed == ["B"]
    (record,) = caplog.records
    assert "Node B: no answer in time" in record.message


def test_nor_does_it_hold_up_the_end(caplog: pytest.LogCaptureFixture) -> None:
    leftovers, _, executor, _ = ask({"B": None})
    assert leftovers.wait(5) == pytest.approx(5, abs=0.2)
    assert executor.killed == ["B"]
    assert "no answer in time" in caplog.text


def test_a_node_that_can_not_tell_is_named(caplog: pytest.LogCaptureFixture) -> None:
    leftovers, dispatcher, _, _ = ask({"A": ["t1"], "B": RuntimeError("not the driver's storage")})
    leftovers.wait(5)
    assert dispatcher.places("t1") == ["A"]
    assert "Node B: not the driver's storage" in caplog.text
