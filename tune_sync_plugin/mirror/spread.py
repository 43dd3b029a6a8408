"""Spreads calls over the cluster's nodes: some at once on each, none on nodes that can't.

Knows nothing of what is called.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tune_sync_plugin.errors import describe
from tune_sync_plugin.report import FileFailure, SyncReport

_ALIVE_NODES_TTL_S = 1.0
# How long a process may take to start.
_START_S = 60.0


class Caller(Protocol):
    """Calls functions on nodes; ``executor.RayExecutor`` does."""

    def call(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any: ...
    def is_ready(self, call: Any) -> bool: ...
    def result(self, call: Any) -> Any: ...
    def kill(self, handle: Any) -> None: ...
    def alive_nodes(self) -> Collection[str]: ...


@dataclass(frozen=True)
class Task:
    """Something to do.

    Attributes:
        name: About what; no two of one name run at once.
        function: Called with the name, the arguments and the run; returns a ``SyncReport``, or
            ``None`` if its node is not one to do it.
        arguments: Its other arguments.
        timeout_s: Seconds after which its process is killed.
        here: Whether only the driver's node can do it.
        returns: Whether the next task of that name goes to the same node as long as it is alive:
            what a node has noted of a directory saves the next one work.
    """

    name: str
    function: Callable[..., SyncReport | None]
    arguments: tuple[Any, ...] = ()
    timeout_s: float = 1800.0
    here: bool = False
    returns: bool = False


@dataclass(frozen=True)
class _Running:
    task: Task
    node_id: str
    call: Any
    ends_by: float


class Spread:
    """See the module's docstring.

    Args:
        caller: Calls functions on nodes.
        here: The driver's node, which can do anything.
        per_node: Calls at once on a node.
        is_able: Whether a node may be used; asked again when it may not.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        caller: Caller,
        here: str,
        per_node: int,
        is_able: Callable[[str], bool] = lambda node_id: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._caller = caller
        self._is_able = is_able
        self._here = here
        self._per_node = per_node
        self._clock = clock
        self._waiting: deque[Task] = deque()
        self._running: list[_Running] = []
        self._names: set[str] = set()
        self._unable: set[str] = set()
        self._homes: dict[str, str] = {}
        self._alive: tuple[float, set[str]] = (-_ALIVE_NODES_TTL_S, set())

    def submit(self, task: Task, *, first: bool = False) -> None:
        """Have it done as soon as there is room."""
        self._names.add(task.name)
        if first:
            self._waiting.appendleft(task)
        else:
            self._waiting.append(task)

    def has(self, name: str) -> bool:
        """Whether something of that name waits or runs."""
        return name in self._names

    @property
    def names(self) -> set[str]:
        """Of all that waits or runs."""
        return set(self._names)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def poll(self) -> Iterator[tuple[Task, SyncReport]]:
        """Start what there is room for; yields what has ended, with its report."""
        for task, report in self._poll():
            self._names.discard(task.name)
            yield task, report

    def _poll(self) -> Iterator[tuple[Task, SyncReport]]:
        for running in list(self._running):
            if self._caller.is_ready(running.call):
                self._running.remove(running)
                report = self._report(running)
                if report is not None:
                    yield running.task, report
                elif running.node_id == self._here:
                    message = "the driver's node does not see the experiment's directory"
                    yield running.task, _failed(running.task, "FileNotFoundError", message)
                else:
                    self._unable.add(running.node_id)
                    self.submit(running.task, first=True)
            elif self._clock() > running.ends_by:
                self._running.remove(running)
                self._caller.kill(running.call)
                message = f"killed after sync_timeout={running.task.timeout_s:g} s"
                yield running.task, _failed(running.task, "TimeoutError", message)
        yield from self._start()

    def _report(self, running: _Running) -> SyncReport | None:
        try:
            report: SyncReport | None = self._caller.result(running.call)
        except Exception as error:
            return _failed(running.task, "WorkerCrashedError", describe(error))
        if report is not None and report.timed_out:
            self._caller.kill(running.call)  # its threads still hang in there
        return report

    def _start(self) -> Iterator[tuple[Task, SyncReport]]:
        if not self._waiting:
            return
        room = self._room()
        for _ in range(len(self._waiting)):
            task = self._waiting.popleft()
            node_id = self._choose(task, room)
            if node_id is None:
                self._waiting.append(task)
                continue
            room[node_id] = room.get(node_id, 0) - 1
            try:
                call = self._caller.call(node_id, task.function, task.name, *task.arguments)
            except Exception as error:
                yield task, _failed(task, type(error).__name__, describe(error))
                continue
            ends_by = self._clock() + task.timeout_s + _START_S
            self._running.append(_Running(task, node_id, call, ends_by))

    def _choose(self, task: Task, room: dict[str, int]) -> str | None:
        """A node that has room; ``None`` if the task has to wait."""
        if task.here:
            return self._here  # small, and nothing else may hold it up
        home = self._homes.get(task.name) if task.returns else None
        if home in room:
            return home if room[home] > 0 else None
        freest = max(room, key=lambda node: room[node])
        if room[freest] <= 0:
            return None
        if task.returns:
            self._homes[task.name] = freest
        return freest

    def _room(self) -> dict[str, int]:
        asked, alive = self._alive
        now = self._clock()
        if now - asked >= _ALIVE_NODES_TTL_S:
            alive = set(self._caller.alive_nodes())
            self._alive = (now, alive)
        able = {node for node in alive - self._unable - {self._here} if self._is_able(node)}
        room = dict.fromkeys(able | {self._here}, self._per_node)
        for running in self._running:
            if running.node_id in room:
                room[running.node_id] -= 1
        return room

    def stop(self) -> None:
        """Kill whatever is under way."""
        for running in self._running:
            self._caller.kill(running.call)
        self._running.clear()
        self._waiting.clear()
        self._names.clear()


def _failed(task: Task, error: str, message: str) -> SyncReport:
    return SyncReport(failures=(FileFailure(task.name, "", error, message),))
