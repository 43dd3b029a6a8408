"""The dispatcher in a small world, in every state that it can get into within a few events.

Two trials, two nodes, the experiment on the driver's node, one slot a node. Nothing is scripted:
what a sync does next (it begins, ends, fails, times out, crashes, or goes on saying nothing) is an
event like any other, so each order of everything is tried. States are told apart by all that they
hold, with times as ages, and up to swapping the trials or the nodes: what led to the same state
twice is followed once.

``World`` keeps an account of what is owed that knows places and facts only: no queue, no lanes, no
numbers. After each event the dispatcher is held against it, and from each new state the experiment
is ended in several ways:

* one sync at a time per target, and one task per node and lane;
* what was forced is not dropped, a plain request not served before ``sync_period`` is over;
* a task is killed when its time is over, and only then; the flush ends in its time;
* everything owed at the end is tried or named, a node that is gone included;
* ``Turn`` tells the truth, and ``catch_up`` is over exactly when all that was owed is tried.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.fake_executor import OK, TIMED_OUT, FakeClock, failing
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.events import Ended, Event, Started, Synced
from tune_sync_plugin.report import EXPERIMENT, SyncReport
from tune_sync_plugin.targets import Turn

PERIOD_S, TIMEOUT_S, GRACE_S, START_S = 10.0, 30.0, 2.0, 60.0
TRIALS, NODES, DRIVER = ("t", "u"), ("A", "B"), "D"
FAILED = failing()
# What a task that ends before it should says.
ENDED = {"WorkerCrashedError", "NodeDiedError"}
FLUSH_S = 40.0

Place = tuple[str, str]


@dataclass(eq=False)
class Task:
    """What a task has said, as far as the dispatcher has heard; the explorer adds to ``says``."""

    node: str
    keys: list[str]
    submitted: float
    begun: float | None = None
    says: list[Event] = field(default_factory=list)
    gone: bool = False
    timed_out: bool = False


@dataclass
class Move:
    """A trial that starts again: what must be tried before it is restored."""

    key: str
    is_over: Callable[[], bool]
    # Per place: whether the sync that is to come is under way.
    owed: dict[Place, bool]


class World:
    """The dispatcher, the executor that it drives, and the account of what is owed."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tasks: list[Task] = []
        self.alive = {*NODES, DRIVER}
        self.mood = "silent"  # what the tasks do while somebody waits for them
        self.closing = False
        self.broken: AssertionError | None = None
        self.turns: list[Turn] = []
        # The account. Of a place: whether what is asked there is forced, when its last sync began.
        self.asked: dict[Place, bool] = {}
        self.under_way: set[Place] = set()
        self.optional: set[Place] = set()
        self.began: dict[Place, float] = {}
        self.lost: set[Place] = set()
        self.failed: set[Place] = set()
        self.tries: Counter[Place] = Counter()  # of what crashed at the end
        self.early: dict[str, bool] = {}
        self.at: dict[str, str | None] = dict.fromkeys(TRIALS)
        # Where a target was, in order, and whether it was synced during that visit.
        self.visits: dict[str, dict[str, bool]] = {key: {} for key in (*TRIALS, EXPERIMENT)}
        self.moves: list[Move] = []
        self.dispatcher = Dispatcher(
            self,
            self.reported,
            period_s=PERIOD_S,
            timeout_s=TIMEOUT_S,
            max_syncs_per_node=1,
            prepare=self.prepare,
            clock=self.clock,
        )
        for key in (*TRIALS, EXPERIMENT):
            self.dispatcher.add_target(key)
        self.attach(EXPERIMENT, DRIVER)

    # -- the Executor's protocol ----------------------------------------------------------------

    def prepare(self, job: str, turn: Turn) -> str:
        self.turns.append(turn)
        return job

    def has_room(self, node_id: str, for_experiment: bool) -> bool:
        return True

    def ready(self, handles: list[Task]) -> list[Task]:
        return [task for task in handles if task.says]

    def submit(self, node_id: str, jobs: Sequence[str], budget_s: float) -> Task:
        try:
            return self._submit(node_id, jobs)
        except AssertionError as error:  # which the dispatcher takes for a refusal
            self.broken = error
            raise

    def _submit(self, node_id: str, jobs: Sequence[str]) -> Task:
        lane = EXPERIMENT in jobs
        assert not any(t.node == node_id and (EXPERIMENT in t.keys) == lane for t in self.tasks)
        assert len(jobs) == 1 or (jobs and not lane)
        turns, self.turns = self.turns, []
        for key, turn in zip(jobs, turns, strict=True):
            self._submitted((key, node_id), turn)
        task = Task(node_id, list(jobs), self.clock.now)
        self.tasks.append(task)
        if node_id not in self.alive:
            task.says.append(Ended("NodeDiedError", "gone"))
        return task

    def poll(self, handle: Task) -> list[Event]:
        assert not handle.gone, "polled after its end"
        events, handle.says = handle.says, []
        for event in events:
            if isinstance(event, Started):
                handle.begun = self.clock.now
            elif isinstance(event, Synced):
                handle.timed_out = event.report.timed_out
                if len(handle.keys) == 1 and not handle.timed_out:
                    self._over(handle)  # its worker may be at something else by now
                handle.begun = self.clock.now
                handle.keys = handle.keys[1:]
                if handle.keys:
                    self.began[handle.keys[0], handle.node] = self.clock.now
            else:
                if handle.begun is not None:
                    self._not_begun(handle.node, handle.keys[1:])
                self._over(handle)
        return events

    def kill(self, handle: Task) -> None:
        assert not handle.gone, "killed after its end"
        since = handle.submitted if handle.begun is None else handle.begun
        limit = START_S if handle.begun is None else TIMEOUT_S + GRACE_S
        in_time = self.clock.now - since <= limit
        assert self.closing or handle.timed_out or not in_time, "killed before its time"
        # The one it was at has been reported.
        self._not_begun(handle.node, [k for k in handle.keys if (k, handle.node) in self.under_way])
        self._over(handle)

    def wait(self, handles: Sequence[Task], timeout_s: float) -> None:
        assert not any(task.gone for task in handles)
        if self.mood == "silent" or not handles:
            self.clock.advance(timeout_s if handles else min(timeout_s, 0.01))
        else:
            self.clock.advance(0.01)
            for task in handles:
                self.say(task, self.mood)

    def alive_nodes(self) -> set[str]:
        return set(self.alive)

    def _over(self, task: Task) -> None:
        task.gone = True
        self.tasks.remove(task)

    def say(self, task: Task, what: str) -> None:
        """Let a task report; what one on a dead node says is that."""
        if task.says:
            return  # it has not been heard yet
        begin: list[Event] = [Started()] if task.begun is None else []
        if task.node not in self.alive:
            task.says.append(Ended("NodeDiedError", "gone"))
        elif what == "begins":
            task.says += begin
        elif what == "crashes":
            task.says.append(Ended("WorkerCrashedError", "as asked"))
        else:
            report = {"succeeds": OK, "fails": FAILED, "times out": TIMED_OUT}[what]
            task.says += [*begin, Synced(report)]

    # -- the account ----------------------------------------------------------------------------

    def _submitted(self, place: Place, turn: Turn) -> None:
        key, node = place
        assert key not in {k for k, _ in self.under_way}, f"a second sync of {key}"
        assert place not in self.lost, f"{place} is lost and tried again"
        assert place in self.asked or place in self.optional, f"{place} is synced unasked"
        forced = self.asked.pop(place, True)
        due = self.began.get(place, -math.inf) + PERIOD_S
        assert forced or self.clock.now >= due, f"{place}: too soon"
        if self.is_at(place):
            left = [p for p in self.asked if p[0] == key and self.asked[p]]
            assert not left, f"{place} is synced before {left}"
        visits = list(self.visits[key])
        later = visits[visits.index(node) + 1 :]
        superseded = not self.is_at(place) and any(self.visits[key][n] for n in later)
        assert turn == Turn(forced, superseded, len(visits) > 1), f"{place} is told {turn}"
        self.visits[key][node] = True
        self.began[place] = self.clock.now
        self.under_way.add(place)
        for move in self.moves:
            if place in move.owed:
                move.owed[place] = True

    def _not_begun(self, node: str, keys: Sequence[str]) -> None:
        for key in keys:
            self.under_way.discard((key, node))
            self.asked[key, node] = True
            for move in self.moves:
                if (key, node) in move.owed:
                    move.owed[key, node] = False

    def reported(self, key: str, node: str, report: SyncReport) -> None:
        if self.broken:
            raise self.broken
        place = (key, node)
        tried = place in self.under_way
        (self.failed.discard if report.complete else self.failed.add)(place)
        if tried:
            self.under_way.discard(place)
            crashed = report.failures and report.failures[-1].error in ENDED
            if self.closing and crashed and self.tries[place] < 2:
                self.tries[place] += 1  # nobody would ask for it again
                self.asked[place] = True
        else:
            assert report.failures, f"{place} was not tried, and is not named"
            assert place in self.asked or place in self.optional
            assert place not in self.lost
            self.asked.pop(place, None)
            if report.failures[-1].error == "NodeDiedError":
                assert node not in self.alive
                self.lost.add(place)
            else:
                assert self.closing
        for move in self.moves:
            if move.owed.get(place) is tried or not tried:
                move.owed.pop(place, None)

    def is_at(self, place: Place) -> bool:
        key, node = place
        return node == (DRIVER if key == EXPERIMENT else self.at[key])

    def ask(self, place: Place, forced: bool) -> None:
        if place not in self.lost:
            self.asked[place] = self.asked.get(place, False) or forced

    # -- events ---------------------------------------------------------------------------------

    def request(self, key: str, forced: bool) -> None:
        node = DRIVER if key == EXPERIMENT else self.at[key]
        if node is None:
            self.early[key] = self.early.get(key, False) or forced
        else:
            self.ask((key, node), forced)
        self.dispatcher.request(key, forced=forced)

    def attach(self, key: str, node: str) -> None:
        """The trial runs there from now on, whether or not what it left has been tried."""
        self.pause(key, tell=False)
        visits = self.visits[key]
        last = next(reversed(visits), None)
        visits[node] = visits.pop(node, False) and last == node
        self.lost.discard((key, node))
        if key in self.early:
            self.ask((key, node), self.early.pop(key))
        if key != EXPERIMENT:
            self.at[key] = node
        self.dispatcher.set_places(key, {node: key})

    def pause(self, key: str, tell: bool = True) -> None:
        if key != EXPERIMENT and (node := self.at[key]) is not None:
            self.ask((key, node), True)
            self.at[key] = None
        if tell:
            self.dispatcher.set_places(key, {})

    def restart(self, key: str) -> None:
        """As ``SyncCallback.on_trial_start`` does it."""
        for part in (key, EXPERIMENT):
            owed: dict[Place, bool] = {}
            for place in [(part, node) for node in self.visits[part]]:
                if place in self.lost:
                    continue
                if place in self.asked or self.is_at(place):
                    self.ask(place, True)
                    owed[place] = False
                elif place in self.under_way:
                    owed[place] = True
            self.moves.append(Move(part, self.dispatcher.catch_up(part), owed))
        self.pause(key)

    def die(self, node: str) -> None:
        self.alive.discard(node)

    # -- the promises ---------------------------------------------------------------------------

    def settle(self) -> None:
        for _ in range(4):  # a sync that ends makes room for others at the next
            self.dispatcher.poll()
        self.check()
        now = self.clock.now
        for task in self.tasks:
            since, limit = (
                (task.submitted, START_S)
                if task.begun is None
                else (task.begun, TIMEOUT_S + GRACE_S)
            )
            assert now - since <= limit, "it ran out of time and is not killed"
        busy = {key for key, _ in self.under_way}
        lanes = {(task.node, EXPERIMENT in task.keys) for task in self.tasks}
        for place, forced in self.asked.items():
            key = place[0]
            due = forced or now >= self.began.get(place, -math.inf) + PERIOD_S
            # A target may stand in another lane's queue, with one sync that comes first.
            if due and key not in busy and not self._waits(key, lanes):
                raise AssertionError(f"{place} waits for nothing")

    def _waits(self, key: str, lanes: set[tuple[str, bool]]) -> bool:
        return any((node, k == EXPERIMENT) in lanes for k, node in self.asked if k == key)

    def check(self) -> None:
        assert self.under_way == {(key, t.node) for t in self.tasks for key in t.keys}
        for move in self.moves:
            assert move.is_over() == (not move.owed), f"{move.key}: {move.owed}"
        self.moves = [move for move in self.moves if move.owed]

    def come_to_rest(self) -> None:
        """With syncs that succeed, and nothing new, all that was asked for happens."""
        for _ in range(60):
            if not (self.asked or self.under_way):
                break
            for task in self.tasks:
                self.say(task, "succeeds")
            if not self.tasks:
                self.clock.advance(PERIOD_S)
            self.settle()
        assert not self.asked | dict.fromkeys(self.under_way)
        assert not self.moves

    def flush(self, mood: str) -> None:
        self.closing, self.mood = True, mood
        for key, visits in self.visits.items():
            for place in [(key, node) for node in visits]:
                # A node that is gone and owes nothing need not be named.
                clean = place in self.began and place not in self.failed
                clean &= place not in self.asked and place not in self.under_way
                if place[1] in self.alive or not clean:
                    self.ask(place, True)
                else:
                    self.optional.add(place)
        end = self.clock.now + FLUSH_S
        self.dispatcher.flush(FLUSH_S)
        assert self.clock.now <= end + 5.0 + 1e-9, "what began late is heard out, and no more"
        assert not self.asked, f"neither tried nor named: {self.asked}"
        assert not self.tasks
        self.check()
        assert not self.moves
        self.dispatcher.stop()
        self.clock.advance(100)
        self.dispatcher.poll()
        assert not self.tasks


def events(world: World, keys: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """All that can happen next."""
    for key in keys:
        for what in ("plain", "forced"):
            yield what, key, ""
    if len(keys) > 1:
        yield "forced", "+".join(keys), ""
    yield "forced", EXPERIMENT, ""
    for key in keys:
        if world.visits[key]:
            yield "restart", key, ""
        if world.at[key]:
            yield "pause", key, ""
        for node in NODES:
            if node in world.alive and node != world.at[key]:
                yield "attach", key, node
    for node in NODES:
        if node in world.alive:
            yield "die", node, ""
    for number, task in enumerate(world.tasks):
        if task.node in world.alive:
            if task.begun is None:
                yield "task", str(number), "begins"
            for what in ("succeeds", "fails", "times out"):
                yield "task", str(number), what
        yield "task", str(number), "crashes"
    for seconds in (PERIOD_S, TIMEOUT_S + GRACE_S + 0.5, START_S + 0.5):
        yield "time", str(seconds), ""


def do(world: World, event: tuple[str, str, str]) -> None:
    what, which, how = event
    if what in ("plain", "forced"):
        for key in which.split("+"):
            world.request(key, what == "forced")
    elif what == "attach":
        world.attach(which, how)
    elif what == "task":
        world.say(world.tasks[int(which)], how)
    elif what == "time":
        world.clock.advance(float(which))
    else:
        getattr(world, what)(which)
    world.settle()


RENAMINGS = [
    {"t": t, "u": "u" if t == "t" else "t", "A": a, "B": "B" if a == "A" else "A"}
    for t in "tu"
    for a in "AB"
]
for renaming in RENAMINGS:
    renaming.update({EXPERIMENT: EXPERIMENT, DRIVER: DRIVER})


def state(world: World) -> int:
    """All that the dispatcher, its tasks and the account hold; the same if only names differ."""
    return min(hash(_state(world, names)) for names in RENAMINGS)


def _state(world: World, names: dict[str, str]) -> Any:
    d, now = world.dispatcher, world.clock.now

    def age(at: float, limit: float) -> float:
        return min(now - at, limit + 1)

    def of_place(place: Any) -> Any:
        return (
            names[place.node_id],
            place.wanted,
            place.forced,
            place.lost,
            age(place.last_start, PERIOD_S),
            place.ended < place.submitted,
            place.submitted > place.submitted_before,
            place.last_success is None,
            place.last_report.complete,
        )

    def place_name(place: Place) -> Any:
        return names[place[0]], names[place[1]]

    targets = frozenset(
        (
            names[key],
            tuple(map(of_place, target.places.values())),
            tuple(names[n] for n in target.current),
            tuple(names[n] for n in target.latest),
            target.running,
            target.wanted_early,
            target.forced_early,
            max(target.queued_for - now, -1.0),
        )
        for key, target in d._targets.items()
    )
    queue = tuple((max(due - now, -1.0), names[key]) for due, _, key in sorted(d._queue))
    ready = frozenset(
        (names[node], special, tuple(names[target.key] for target in waiting))
        for (node, special), waiting in d._ready.items()
    )
    batches = frozenset(
        (
            names[task.node],
            tuple(names[key] for key in task.keys),
            age(task.submitted, START_S) if task.begun is None else None,
            None if task.begun is None else age(task.begun, TIMEOUT_S + GRACE_S),
        )
        for task in world.tasks
    )
    asked, alive = d._alive
    fresh = now - asked <= 1.0
    known = frozenset(names[n] for n in alive) if fresh else None
    owed = frozenset((place_name(p), forced) for p, forced in world.asked.items())
    moves = frozenset(
        (names[m.key], frozenset((place_name(p), running) for p, running in m.owed.items()))
        for m in world.moves
    )
    dead = frozenset(names[n] for n in (*NODES, DRIVER) if n not in world.alive)
    return targets, queue, ready, batches, known, owed, moves, dead


ENDINGS: dict[str, Callable[[World], None]] = {
    "rest": World.come_to_rest,
    "flush, all succeed": lambda world: world.flush("succeeds"),
    "flush, all hang": lambda world: world.flush("silent"),
    "flush, all crash": lambda world: world.flush("crashes"),
}


def explore(world: World, keys: Sequence[str], depth: int) -> int:
    """Follow every sequence of up to ``depth`` events, and end each; returns how many states."""
    seen = {state(world)}
    layer = [(pickle.dumps(world, -1), ())]
    for left in reversed(range(depth)):
        following: list[tuple[bytes, Any]] = []
        for frozen, path in layer:
            for event in list(events(pickle.loads(frozen), keys)):
                world = pickle.loads(frozen)
                ending = ""
                try:
                    do(world, event)
                    if (reached := state(world)) in seen:
                        continue
                    seen.add(reached)
                    again = pickle.dumps(world, -1)
                    for ending, end in ENDINGS.items():  # noqa: B007 - named if it fails
                        world = pickle.loads(again)
                        end(world)
                except Exception as error:
                    steps = " / ".join(" ".join(filter(None, e)) for e in (*path, event))
                    raise AssertionError(f"{steps} [{ending}]: {error!r}") from error
                if left:
                    following.append((again, (*path, event)))
        layer = following
    return len(seen)


@pytest.mark.parametrize(
    ("t", "u", "depth"),
    [
        pytest.param("", "", 4, id="nobody is anywhere yet"),
        pytest.param("A", "A", 3, id="both on one node"),
        pytest.param("A", "B", 3, id="each on its own"),
        pytest.param("A", None, 4, id="one trial alone", marks=pytest.mark.exhaustive),
        pytest.param("A", "A", 4, id="both on one node, deeper", marks=pytest.mark.exhaustive),
        pytest.param("A", "B", 4, id="each on its own, deeper", marks=pytest.mark.exhaustive),
    ],
)
def test_every_sequence(t: str, u: str | None, depth: int) -> None:
    world = World()
    for key, node in (("t", t), ("u", u)):
        if node:
            world.attach(key, node)
    states = explore(world, TRIALS if u is not None else TRIALS[:1], depth)
    assert states > 1000, "the events that lead on are missing"
