"""The dispatcher against a model: after any sequence of events, the promises hold.

``World`` plays the events on a real dispatcher and keeps its own, much simpler account of what is
owed. Hypothesis looks for a sequence that breaks a promise: three trials, three nodes, long ones;
``test_dispatcher_exhaustive.py`` tries all short ones in a smaller world.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fake_executor import FakeClock, FakeExecutor, Sync, deferring, failing
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.events import Ended
from tune_sync_plugin.report import EXPERIMENT, SyncReport

PERIOD_S = 3.0
TIMEOUT_S = 10.0
TRIALS = ("t", "u", "v")
KEYS = (*TRIALS, EXPERIMENT)

SYNCS = {
    "ok": Sync(),
    "long": Sync(takes=4),
    "fails": Sync(report=failing()),
    "defers": Sync(report=deferring()),
    "times out": Sync(takes=100),
    "hangs": Sync(hangs=True),
    "crashes": Sync(crash="WorkerCrashedError"),
}
BEGINNINGS: dict[str, float | Ended | Exception] = {
    "at once": 0.0,
    "slow": 2.0,
    "never": math.inf,
    "import error": Ended("ModuleNotFoundError", "as scripted"),
    "refused": ValueError("as scripted"),
}

Place = tuple[str, str]


class World:
    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.clock = FakeClock()
        self.executor = FakeExecutor(self.clock, "ABC", TIMEOUT_S)
        self.executor.on_submit = self._submitted
        self.executor.on_unbegun = self._not_begun
        self.dispatcher = Dispatcher(
            self.executor,
            self._reported,
            period_s=PERIOD_S,
            timeout_s=TIMEOUT_S,
            max_syncs_per_node=slots,
            clock=self.clock,
        )
        self.order: dict[str, list[str]] = {key: [] for key in KEYS}
        self.current: dict[str, list[str]] = {key: [] for key in KEYS}
        self.early: dict[str, set[bool]] = {key: set() for key in KEYS}
        self.forced: set[Place] = set()
        self.plain: set[Place] = set()
        self.lost: set[Place] = set()
        self.under_way: set[Place] = set()
        self.complete: set[Place] = set()
        self.optional: set[Place] = set()
        self.last: dict[Place, float] = defaultdict(lambda: -math.inf)
        self.moves: list[Callable[[], bool]] = []
        for key in KEYS:
            self.dispatcher.add_target(key)

    # -- what the dispatcher does, as seen from outside -----------------------------------------

    def _submitted(self, key: str, node: str) -> None:
        place = (key, node)
        asked = self.forced | self.plain | self.optional
        assert place in asked, f"{place} is synced unasked"
        assert place not in self.lost, f"{place} is lost and tried again"
        assert key not in {k for k, _ in self.under_way}, f"a second sync of {key}"
        if place not in self.forced | self.optional:
            last = max(self.executor.times(*place), default=-math.inf)
            assert self.clock.now >= last + PERIOD_S, f"{place}: too soon"
        if node in self.current[key]:
            for other in self.order[key]:
                left = other not in self.current[key] and (key, other) not in self.lost
                assert not (left and (key, other) in self.forced), f"{place} before {other}"
        self.forced.discard(place)
        self.plain.discard(place)
        self.under_way.add(place)

    def _not_begun(self, key: str, node: str) -> None:
        place = (key, node)
        if place in self.under_way:  # else it has been reported
            self.under_way.discard(place)
            self.forced.add(place)

    def _reported(self, key: str, node: str, report: SyncReport) -> None:
        place = (key, node)
        if report.failures and "final sync" in report.failures[-1].message:
            self.forced.discard(place)
            self.plain.discard(place)
        self.last[place] = self.clock.now
        (self.complete.add if report.complete else self.complete.discard)(place)
        if place in self.under_way:
            self.under_way.discard(place)
            return
        # Not tried: then it is named.
        assert report.failures, f"{place} was not under way: {report}"
        assert report.failures[-1].trial == key
        assert place not in self.lost, f"{place} is reported lost twice"
        self.forced.discard(place)
        self.plain.discard(place)
        if report.failures[-1].error == "NodeDiedError":
            assert node not in self.executor.alive
            self.lost.add(place)

    # -- events ---------------------------------------------------------------------------------

    def request(self, key: str, forced: bool) -> None:
        self.dispatcher.request(key, forced=forced)
        if not self.current[key]:
            self.early[key].add(forced)
        for node in self.current[key]:
            self._want(key, node, forced)

    def _want(self, key: str, node: str, forced: bool) -> None:
        if (key, node) not in self.lost:
            (self.forced if forced else self.plain).add((key, node))

    def move(self, key: str, *nodes: str) -> None:
        for node in self.current[key]:
            if node not in nodes:
                self._want(key, node, True)
        for node in nodes:
            if node in self.order[key]:
                self.order[key].remove(node)
            self.order[key].append(node)
            self.lost.discard((key, node))
            for forced in self.early[key]:
                self._want(key, node, forced)
        if nodes:
            self.early[key].clear()
        self.current[key] = list(nodes)
        self.dispatcher.set_places(key, dict.fromkeys(nodes, key))

    def restart(self, key: str) -> None:
        """As ``SyncCallback.on_trial_start`` does it."""
        for part in (key, EXPERIMENT):
            self.moves.append(self.dispatcher.catch_up(part))
            for node in self.order[part]:
                if node in self.current[part] or (part, node) in self.plain:
                    self._want(part, node, True)
        if key != EXPERIMENT:
            self.move(key)

    def die(self, node: str, noticed: bool) -> None:
        self.executor.kill_node(node, noticed=noticed)

    def tick(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for _ in range(5):  # a sync that ends or is given up makes room for others at the next
            with self.executor.polling():
                self.dispatcher.poll()
        self.check()
        self.check_nothing_idles()

    def flush(self, timeout_s: float) -> None:
        owed = self.forced | self.plain
        for key in KEYS:
            for node in self.order[key]:
                # A node that is gone and owes nothing need not be named.
                if node in self.executor.alive or (key, node) not in self.complete - owed:
                    self._want(key, node, True)
                else:
                    self.optional.add((key, node))
        started = self.clock.now
        self.dispatcher.flush(timeout_s)
        # What was handed over before and began late is heard out.
        assert self.clock.now <= started + timeout_s + 5.0 + 1e-9
        # Everything was tried or named, and what was begun has ended or was named.
        assert not self.forced
        assert not self.plain
        assert not self.under_way
        assert not self.executor.running()
        assert all(is_over() for is_over in self.moves)
        tasks = len(self.executor.tasks)
        self.dispatcher.stop()
        self.tick(10)
        assert len(self.executor.tasks) == tasks

    # -- promises -------------------------------------------------------------------------------

    def check(self) -> None:
        running = self.executor.running()
        for node in "ABC":
            lanes = [EXPERIMENT in task.keys for task in running if task.node == node]
            assert lanes.count(True) <= 1
            assert lanes.count(False) <= self.slots
        for task in running:
            assert task.keys == [EXPERIMENT] or EXPERIMENT not in task.keys
        assert {key for key, _ in self.under_way} == {k for t in running for k in t.unfinished}
        assert len({key for key, _ in self.under_way}) == len(self.under_way)

    def check_nothing_idles(self) -> None:
        """What may start has started."""
        busy = {key for key, _ in self.under_way}
        for key in KEYS:
            due = [
                place for place in self.forced | self.plain if place[0] == key and self.due(place)
            ]
            if due and key not in busy:
                assert not all(self._has_room(*place) for place in due), f"{due} wait for nothing"

    def due(self, place: Place) -> bool:
        # At the latest: when exactly a batch's sync began, the dispatcher can't know.
        return place in self.forced or self.clock.now >= self.last[place] + PERIOD_S

    def _has_room(self, key: str, node: str) -> bool:
        same = [
            t for t in self.executor.running(node) if (EXPERIMENT in t.keys) == (key == EXPERIMENT)
        ]
        return len(same) < (1 if key == EXPERIMENT else self.slots)

    def come_to_rest(self) -> None:
        """Without any new event, and without the flush, everything that was asked for happens."""
        for _ in range(400):
            if not self.forced | self.plain | self.under_way:
                break
            self.tick(3)
        assert not self.forced
        assert not self.plain
        assert not self.under_way
        assert not self.executor.running()
        assert all(is_over() for is_over in self.moves)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(slots=1)

    keys = st.sampled_from(KEYS)
    trials = st.sampled_from(TRIALS)
    nodes = st.sampled_from("ABC")

    @rule(key=keys, forced=st.booleans())
    def request(self, key: str, forced: bool) -> None:
        self.world.request(key, forced)

    @rule(forced=st.booleans())
    def request_of_all(self, forced: bool) -> None:
        for key in KEYS:
            self.world.request(key, forced)

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 13.0, 70.0]))
    def tick(self, seconds: float) -> None:
        self.world.tick(seconds)

    @rule(key=keys, sync=st.sampled_from(sorted(SYNCS)))
    def next_sync(self, key: str, sync: str) -> None:
        self.world.executor.will(key, SYNCS[sync])

    @rule(node=nodes, beginning=st.sampled_from(sorted(BEGINNINGS)))
    def next_tasks(self, node: str, beginning: str) -> None:
        if node in self.world.executor.alive:
            self.world.executor.start_of[node] = BEGINNINGS[beginning]

    @rule(key=keys, nodes=st.lists(nodes, unique=True, max_size=2))
    def move(self, key: str, nodes: list[str]) -> None:
        alive = self.world.executor.alive
        self.world.move(key, *(node for node in nodes if node in alive))

    @rule(key=keys)
    def restart(self, key: str) -> None:
        self.world.restart(key)

    @rule(node=nodes, noticed=st.booleans())
    def die(self, node: str, noticed: bool) -> None:
        self.world.die(node, noticed)

    @invariant()
    def promises(self) -> None:
        self.world.check()

    rest_first = True

    def teardown(self) -> None:
        if self.rest_first:
            self.world.come_to_rest()
        self.world.flush(8)


class MachineWithSlots(Machine):
    """Two slots a node, and the flush comes in the middle of everything."""

    rest_first = False

    def __init__(self) -> None:
        super().__init__()
        self.world = World(slots=2)


_SETTINGS = settings(
    max_examples=300,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestAnySequence = Machine.TestCase
TestAnySequence.settings = _SETTINGS
TestAnySequenceThenFlush = MachineWithSlots.TestCase
TestAnySequenceThenFlush.settings = _SETTINGS
