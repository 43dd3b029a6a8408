"""A clock and an executor that tests script: what each sync does, how long it takes, who dies.

Nothing sleeps; ``FakeExecutor.wait`` moves the clock. The executor checks its own protocol: no two
tasks may hold the same target at once, nobody polls or kills a task that is over (which one is as
soon as it has reported all its syncs), and nobody waits inside a poll.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tune_sync_plugin.events import Ended, Event, Started, Synced
from tune_sync_plugin.report import FileFailure, SyncReport

OK = SyncReport(files_uploaded=1, bytes_uploaded=10)


def failing(error: str = "PermissionError", path: str = "a.txt") -> SyncReport:
    return SyncReport(failures=(FileFailure("?", path, error, "as scripted"),))


def deferring(path: str = "log.txt") -> SyncReport:
    return SyncReport(deferred=(FileFailure("?", path, "SourceChangedError", "as scripted"),))


TIMED_OUT = SyncReport(
    failures=(FileFailure("?", "big.bin", "TimeoutError", "as scripted"),), timed_out=True
)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True)
class Sync:
    """What one sync does when its turn comes.

    Attributes:
        takes: Seconds. If they exceed what the task may take, it stops itself with ``TIMED_OUT``.
        report: What it reports in the end.
        hangs: It never reports anything.
        crash: The task's process dies instead of reporting, with this error.
    """

    takes: float = 0.25
    report: SyncReport = OK
    hangs: bool = False
    crash: str | None = None


@dataclass(frozen=True)
class Start:
    """A sync that began, and the order number of the submission that brought it."""

    at: float
    node: str
    key: str
    task: int
    submitted: int


@dataclass(eq=False)
class Task:
    """One scripted task: when each of its jobs begins, and what it says when."""

    number: int
    node: str
    jobs: list[Any]
    budget_s: float
    submitted: int
    submitted_at: float
    begins: list[float] = field(default_factory=list)
    events: deque[tuple[float, Event]] = field(default_factory=deque)
    begun: int = 0
    delivered: int = 0
    over: str | None = None

    def __post_init__(self) -> None:
        self.keys = [key_of(job) for job in self.jobs]

    @property
    def unfinished(self) -> list[str]:
        return [] if self.over else self.keys[self.delivered :]


def key_of(job: Any) -> str:
    """Jobs are plain strings here: a target's key, perhaps with ``@something`` behind it."""
    return str(job).partition("@")[0]


class FakeExecutor:
    """See the module's docstring.

    Args:
        clock: Moved by ``wait``.
        nodes: Those alive at the start.
        timeout_s: After so long a sync that does not hang stops itself.
    """

    def __init__(
        self, clock: FakeClock, nodes: Sequence[str] = "AB", timeout_s: float = 10
    ) -> None:
        self.clock = clock
        self.alive = set(nodes)
        self.timeout_s = timeout_s
        self.default = Sync()
        # What the next syncs of a target do; then the default.
        self.next_syncs: dict[str, deque[Sync]] = defaultdict(deque)
        # Per node: how its tasks begin. A number is the delay of the start; an Ended comes instead
        # of it; an exception is raised by submit.
        self.start_of: dict[str, float | Ended | Exception] = defaultdict(float)
        self.order = itertools.count()
        self.tasks: list[Task] = []
        self._live: list[Task] = []
        self.starts: list[Start] = []
        self.kills: list[tuple[float, Task]] = []
        self.waits: list[float] = []
        self.asked_alive = 0
        # Nodes on which nothing is to be submitted for now.
        self.full: set[str] = set()
        self.asked_room: list[tuple[str, bool]] = []
        self.polls = 0
        # Called with key and node: of what is submitted (also in vain), and of what stood behind
        # another sync in a task when that was killed or crashed.
        self.on_submit: Callable[[str, str], None] = lambda key, node: None
        self.on_unbegun: Callable[[str, str], None] = lambda key, node: None
        self._in_poll = False

    # -- scripting ------------------------------------------------------------------------------

    def will(self, key: str, *syncs: Sync) -> None:
        self.next_syncs[key].extend(syncs)

    def kill_node(self, node: str, *, noticed: bool = True) -> None:
        """The node dies now; ``noticed`` says whether it leaves the list of live ones at once."""
        if noticed:
            self.alive.discard(node)
        for task in self.running(node):
            task.events = deque(e for e in task.events if e[0] <= self.clock.now)
            task.begins = [t for t in task.begins if t <= self.clock.now]
            task.events.append((self.clock.now, Ended("NodeDiedError", "as scripted")))
        self.start_of[node] = Ended("NodeDiedError", "as scripted")

    @contextmanager
    def polling(self) -> Iterator[None]:
        self._in_poll = True
        yield
        self._in_poll = False

    # -- what happened --------------------------------------------------------------------------

    def running(self, node: str | None = None) -> list[Task]:
        return [task for task in self._live if node in (None, task.node)]

    def started(self, key: str | None = None, node: str | None = None) -> list[Start]:
        self._note_begun()
        return [s for s in self.starts if key in (None, s.key) and node in (None, s.node)]

    def times(self, key: str, node: str | None = None) -> list[float]:
        return [start.at for start in self.started(key, node)]

    def nodes_of(self, key: str) -> str:
        """The nodes on which a target was synced, in order."""
        return "".join(start.node for start in self.started(key))

    def batches(self) -> list[list[str]]:
        return [task.keys for task in self.tasks]

    # -- the Executor's protocol ----------------------------------------------------------------

    def has_room(self, node_id: str, for_experiment: bool) -> bool:
        self.asked_room.append((node_id, for_experiment))
        return node_id not in self.full

    def submit(self, node_id: str, jobs: Sequence[Any], budget_s: float) -> Task:
        how = self.start_of[node_id]
        for job in jobs:
            self.on_submit(key_of(job), node_id)
        if isinstance(how, Exception):
            raise how
        now = self.clock.now
        task = Task(len(self.tasks), node_id, list(jobs), budget_s, next(self.order), now)
        assert jobs, "an empty batch"
        assert len(self.tasks) < 2000, "tasks without end"
        assert len(set(task.keys)) == len(task.keys), f"twice in one batch: {task.keys}"
        for other in self.running():
            both = set(other.unfinished) & set(task.keys)
            assert not both, f"{both} submitted to {node_id} while task {other.number} has it"
        self.tasks.append(task)
        self._live.append(task)
        if isinstance(how, Ended):
            task.events.append((now, how))
        else:
            self._script(task, now + how)
        return task

    def ready(self, handles: Sequence[Task]) -> set[Task]:
        return {task for task in handles if task.events and task.events[0][0] <= self.clock.now}

    def poll(self, handle: Task) -> list[Event]:
        self.polls += 1
        assert not handle.over, f"polled task {handle.number}, which is over ({handle.over})"
        self._note_begun()
        events: list[Event] = []
        while handle.events and handle.events[0][0] <= self.clock.now:
            event = handle.events.popleft()[1]
            events.append(event)
            if isinstance(event, Synced):
                handle.delivered += 1
                if handle.delivered == len(handle.jobs) and not event.report.timed_out:
                    # Its worker may be at another task by now: nobody may kill or wait for it.
                    self._over(handle, "done")
                    break
            elif isinstance(event, Ended):
                self._over(handle, "ended")
                break
        return events

    def kill(self, handle: Task) -> None:
        assert not handle.over, f"killed task {handle.number}, which is over ({handle.over})"
        self._note_begun()
        self.kills.append((self.clock.now, handle))
        self._over(handle, "killed")

    def wait(self, handles: Sequence[Task], timeout_s: float) -> None:
        assert not self._in_poll, "poll must not block"
        assert all(not task.over for task in handles), "waits for a task that is over"
        assert timeout_s > 0
        until = self.clock.now + (timeout_s if handles else min(timeout_s, 0.01))
        happen = [task.events[0][0] for task in handles if task.events]
        self.waits.append(timeout_s)
        self.clock.now = max(self.clock.now, min([until, *happen]))

    def alive_nodes(self) -> set[str]:
        self.asked_alive += 1
        return set(self.alive)

    # -- inside ---------------------------------------------------------------------------------

    def _script(self, task: Task, begin: float) -> None:
        if begin == math.inf:
            return
        end = begin + task.budget_s
        at = begin
        task.events.append((at, Started()))
        for key in task.keys:
            sync = self.next_syncs[key].popleft() if self.next_syncs[key] else self.default
            task.begins.append(at)
            if sync.hangs:
                return
            limit = min(self.timeout_s, max(end - at, 0.0))
            if sync.takes > limit:
                task.events.append((at + limit, Synced(TIMED_OUT)))
                return  # lingers, until it is killed
            at += sync.takes
            if sync.crash:
                task.events.append((at, Ended(sync.crash, "as scripted")))
                return
            task.events.append((at, Synced(sync.report)))
            if sync.report.timed_out:
                return
        task.events.append((at, Ended()))

    def _note_begun(self) -> None:
        for task in self.running():
            while task.begun < len(task.begins) and task.begins[task.begun] <= self.clock.now:
                key, at = task.keys[task.begun], task.begins[task.begun]
                self.starts.append(Start(at, task.node, key, task.number, task.submitted))
                task.begun += 1

    def _over(self, task: Task, how: str) -> None:
        # The start of its job is noted before a task is over, so what is not there never began.
        task.over = how
        self._live.remove(task)
        if how == "killed" or task.begins:  # else it could not begin at all, and failed as a whole
            for key in task.keys[task.begun :]:
                self.on_unbegun(key, task.node)
