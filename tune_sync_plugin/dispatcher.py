"""Decides when which directory is synced from which node, and keeps account of what is owed.

Pure bookkeeping over an injected clock and executor: no Ray, no files, no sleeping. The rules:

* one sync at a time per target (a trial, or the experiment's directory), so one writer per path;
* a forced request runs as soon as it may, a plain one not sooner than ``period_s`` after the start
  of the last; a request made while a sync is under way is kept and never queued twice;
* what ran out of time is killed and reported, what was batched behind it starts anew;
* directories of one node that are due together travel in one task.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Ended, Event, Executor, Started, Synced
from tune_sync_plugin.report import EXPERIMENT, FileFailure, SyncReport
from tune_sync_plugin.targets import Account, Place, Target, Turn, account_of

# A task stops itself at sync_timeout and says which files were left. One that can't even do that (a
# stat that hangs on a dead mount) is killed so much later.
_GRACE_S = 2.0
# How long a task may wait for its worker process to start.
_START_S = 60.0
# Most directories that one task takes: what is batched behind a slow one waits for it.
_BATCH = 32
_ALIVE_NODES_TTL_S = 1.0
# So long before the flush must end its tasks stop themselves, in order to say what they left.
_END_MARGIN_S = 0.5
# What was handed over before the flush knows nothing of its end, and may have begun so much later
# than it was (a process takes its time to start). It is heard out: it is about to say what it left.
_HEAR_OUT_S = 5.0


@dataclass
class _Batch:
    handle: Any
    lane: tuple[str, bool]
    items: deque[tuple[Target, Place]]
    submitted: float
    item_started: float | None = None


class Dispatcher:
    """See the module's docstring.

    Args:
        executor: Runs the jobs.
        on_report: Called with the target's key, the node's id and what a sync there did.
        period_s: Least seconds between the starts of two syncs of a trial.
        timeout_s: Seconds after which a sync is killed.
        max_syncs_per_node: Tasks at once on a node. The experiment's directory has one more of its
            own, so that artifacts never hold up the experiment's state.
        prepare: Tells a job what the dispatcher knows about the sync that is about to start.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        executor: Executor,
        on_report: Callable[[str, str, SyncReport], None],
        *,
        period_s: float,
        timeout_s: float,
        max_syncs_per_node: int,
        prepare: Callable[[Any, Turn], Any] = lambda job, turn: job,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._on_report = on_report
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._max_per_node = max_syncs_per_node
        self._prepare = prepare
        self._clock = clock
        self._targets: dict[str, Target] = {}
        self._queue: list[tuple[float, int, str]] = []
        self._tie = itertools.count()
        # A lane is a node and whether it is for the experiment's directory.
        self._ready: dict[tuple[str, bool], deque[Target]] = {}
        self._batches: list[_Batch] = []
        self._alive: tuple[float, set[str]] = (-math.inf, set())
        # When the final flush must be over.
        self._end = math.inf

    # -- what is where, and what is wanted ------------------------------------------------------

    def add_target(self, key: str, period_s: float | None = None) -> None:
        """Make a target known. Adding it again changes nothing."""
        self._targets.setdefault(key, Target(key, self._period_s if period_s is None else period_s))

    def set_places(self, key: str, jobs: dict[str, Any]) -> None:
        """Say on which nodes a target's directories are from now on, and the job that syncs each.

        Places it had before stay known: what they still hold unsynced is requested at once, and
        the final flush visits them again.
        """
        target = self._targets[key]
        for node_id in target.current:
            if node_id not in jobs:
                self._want(target.places[node_id], forced=True)
        for node_id, job in jobs.items():
            # Moved to the end: the order of places is the order in which the trial was there.
            place = target.places.pop(node_id, None) or Place(node_id, job)
            target.places[node_id] = place
            place.job, place.lost = job, False
            if node_id not in target.latest:  # else it has only started again
                place.submitted_before = place.submitted
        target.current = list(jobs)
        target.latest = target.current or target.latest
        self._choose_anew(target)
        if jobs and target.wanted_early:
            for node_id in jobs:
                self._want(target.places[node_id], target.forced_early)
            target.wanted_early = target.forced_early = False
        self._enqueue(target)

    def add_left(self, key: str, node_id: str, job: Any) -> None:
        """Say that a target has been on a node before all that is known of it; requests that."""
        target = self._targets[key]
        if node_id not in target.places:
            place = Place(node_id, job)
            target.places = {node_id: place, **target.places}
            self._want(place, forced=True)
            self._enqueue(target)

    def _choose_anew(self, target: Target) -> None:
        # It may stand in a node's queue with a place that is no longer the first to be synced.
        for waiting in self._ready.values():
            if target in waiting:
                waiting.remove(target)
                target.running = False

    def request(self, key: str, *, forced: bool) -> None:
        """Ask for a sync of a target from where it is now. Unknown targets are ignored."""
        target = self._targets.get(key)
        if target is None:
            return
        if not target.current:
            target.wanted_early = True
            target.forced_early |= forced
            return
        changed = False
        for node_id in target.current:
            changed |= self._want(target.places[node_id], forced)
        if changed:
            self._enqueue(target)

    def _want(self, place: Place, forced: bool) -> bool:
        if place.lost or (place.wanted and (place.forced or not forced)):
            return False
        place.asked = min(place.asked, self._clock())
        place.wanted, place.forced = True, place.forced or forced
        return True

    def _enqueue(self, target: Target) -> None:
        if target.running:
            return  # looked at again when that sync ends
        due = target.next_due()
        if due < target.queued_for:
            target.queued_for = due
            heapq.heappush(self._queue, (due, next(self._tie), target.key))

    # -- the loop -------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what has finished, end what ran out of time, start what is due. Never blocks."""
        if self._batches:
            self._take_in()
        if self._queue and self._queue[0][0] <= self._clock():
            self._collect_due()
        if self._ready:
            self._start()

    def _take_in(self) -> None:
        # Asked once for all: most have nothing to say most of the time.
        ready = self._executor.ready([batch.handle for batch in self._batches])
        for batch in list(self._batches):
            self._advance(batch, self._executor.poll(batch.handle) if batch.handle in ready else [])

    def _advance(self, batch: _Batch, events: Iterable[Event]) -> None:
        for event in events:
            now = self._clock()
            if isinstance(event, Started):
                batch.item_started = now
            elif isinstance(event, Synced):
                batch.item_started = now
                self._finish(*batch.items.popleft(), event.report)
                if batch.items:
                    batch.items[0][1].last_start = now
                if event.report.timed_out:
                    # Its threads still hang in there; only the end of the process ends them.
                    self._drop(batch, kill=True)
                    return
                if not batch.items:
                    # Over for us. Not kept until it says so itself: killing a task that is about
                    # to end can hit the next one in its worker, or crash the driver (Ray 2.60).
                    self._drop(batch, kill=False)
                    return
            else:
                self._ended(batch, event)
                return
        now = self._clock()
        if batch.item_started is None:
            if now - batch.submitted > max(_START_S, self._timeout_s):
                self._give_up(
                    batch, f"the sync task did not start for {now - batch.submitted:.0f} s"
                )
        elif now - batch.item_started > self._timeout_s + _GRACE_S:
            self._give_up(batch, f"killed after sync_timeout={self._timeout_s:g} s")

    def _ended(self, batch: _Batch, event: Ended) -> None:
        # A task that never began failed for all its jobs; else for the one it was at.
        failed = len(batch.items) if batch.item_started is None else 1
        error = event.error or "SyncError"
        message = event.message or "the sync task ended early"
        # Perhaps with its node, which whoever tries again is to know.
        self._alive = (-math.inf, set())
        for _ in range(min(failed, len(batch.items))):
            target, place = batch.items.popleft()
            if self._end < math.inf and place.spare_tries:
                # Nothing would ask for it again. Its process was killed, perhaps for want of
                # memory; or its node was, and the next try finds that out.
                place.spare_tries -= 1
                self._want(place, forced=True)
            self._finish(target, place, _failed(target.key, error, message))
        self._drop(batch, kill=False)

    def _give_up(self, batch: _Batch, why: str) -> None:
        target, place = batch.items.popleft()
        report = _failed(target.key, "TimeoutError", f"sync on node {place.node_id[:8]}: {why}")
        self._finish(target, place, replace(report, timed_out=True))
        self._drop(batch, kill=True)

    def _drop(self, batch: _Batch, *, kill: bool) -> None:
        if kill:
            self._executor.kill(batch.handle)
        self._batches.remove(batch)
        for target, place in batch.items:  # never begun
            target.running = False
            self._want(place, forced=True)
            self._enqueue(target)

    def _finish(self, target: Target, place: Place, report: SyncReport) -> None:
        target.running = False
        place.last_report = report
        place.ended = place.submitted
        place.end(answered=report.complete)
        if report.complete:
            place.last_success = self._clock()
        if place.lost:
            place.asked = math.inf  # nothing will try it any more
        self._on_report(target.key, place.node_id, report)
        self._enqueue(target)

    def _collect_due(self) -> None:
        now = self._clock()
        while self._queue and self._queue[0][0] <= now:
            due, _, key = heapq.heappop(self._queue)
            target = self._targets[key]
            if due != target.queued_for:
                continue  # an older entry, overtaken by an earlier one
            target.queued_for = math.inf
            place = None if target.running else target.next_place(now)
            if place:
                target.running = True
                lane = (place.node_id, key == EXPERIMENT)
                self._ready.setdefault(lane, deque()).append(target)

    def _start(self) -> None:
        now = self._clock()
        # The experiment's state before all artifacts.
        for lane in sorted(self._ready, key=lambda lane: not lane[1]):
            node_id, for_experiment = lane
            waiting = self._ready[lane]
            if not self._is_alive(node_id, now):
                for target in waiting:
                    self._lose(target, target.places[node_id], now)
                del self._ready[lane]
                continue
            slots = 1 if for_experiment else self._max_per_node
            slots -= sum(batch.lane == lane for batch in self._batches)
            while waiting and slots > 0 and self._executor.has_room(node_id, for_experiment):
                # Spread over the free slots first, so that two big trials don't share a task.
                size = min(_BATCH, math.ceil(len(waiting) / slots))
                self._submit(lane, [waiting.popleft() for _ in range(size)], now)
                slots -= 1
            if not waiting:
                del self._ready[lane]

    def _submit(self, lane: tuple[str, bool], targets: list[Target], now: float) -> None:
        items = deque((target, target.places[lane[0]]) for target in targets)
        jobs = [self._prepare(place.job, target.turn(place)) for target, place in items]
        for _, place in items:
            place.begin(now)
        try:
            budget_s = max(self._end - _END_MARGIN_S - now, 0.0)
            handle = self._executor.submit(lane[0], jobs, budget_s)
        except Exception as error:
            for target, place in items:
                message = f"starting the sync task failed: {describe(error)}"
                self._finish(target, place, _failed(target.key, type(error).__name__, message))
            return
        self._batches.append(_Batch(handle, lane, items, now))

    def _is_alive(self, node_id: str, now: float) -> bool:
        asked, alive = self._alive
        # A node that is not in the list may have joined since.
        if now - asked > _ALIVE_NODES_TTL_S or node_id not in alive:
            self._alive = (now, self._executor.alive_nodes())
        return node_id in self._alive[1]

    def _lose(self, target: Target, place: Place, now: float) -> None:
        place.lost, place.wanted, place.forced = True, False, False
        place.give_up_one()
        since = (
            "it was never synced"
            if place.last_success is None
            else (f"its last complete sync ended {now - place.last_success:.0f} s ago")
        )
        message = f"node {place.node_id[:8]} is gone; {since}, what was written since is lost"
        self._finish(target, place, _failed(target.key, "NodeDiedError", message))

    # -- how far it is --------------------------------------------------------------------------

    def account(self) -> Account:
        """What is synced and what is owed now. Looks at every target: not for every step."""
        return account_of(self._targets.values(), self._clock())

    # -- waiting --------------------------------------------------------------------------------

    def places(self, key: str) -> list[str]:
        """The nodes that a target is and was on, the latest last; none if it is not known."""
        target = self._targets.get(key)
        return list(target.places) if target else []

    def catch_up(self, key: str) -> Callable[[], bool]:
        """Force a sync of everything a target has now, or still owes, on all its nodes.

        Returns a function that tells whether that is over: each was synced, or tried, by a sync
        that started after this call (where the target had left before, by the one that was on its
        way); or it is named as lost.
        """
        target = self._targets[key]
        until = {}
        for node_id, place in target.places.items():
            if place.lost:
                continue
            if place.wanted or node_id in target.current:
                self._want(place, forced=True)
                until[node_id] = place.submitted + 1
            elif place.ended < place.submitted:
                until[node_id] = place.submitted
        self._enqueue(target)
        return functools.partial(_is_caught_up, target.places, until)

    def settle(
        self,
        keys: Iterable[str],
        timeout_s: float,
        progress: Callable[[int], None] = lambda left: None,
    ) -> bool:
        """Poll until nothing forced or running is left for ``keys``; False if time ran out.

        ``progress`` is told again and again how many of them are left; it must not raise.
        """
        deadline = self._clock() + timeout_s
        targets = [self._targets[key] for key in keys if key in self._targets]
        while True:
            self.poll()
            targets = [t for t in targets if t.running or t.next_due() == -math.inf]
            progress(len(targets))
            if not targets:
                return True
            remaining = deadline - self._clock()
            if remaining <= 0:
                return False
            self._executor.wait([b.handle for b in self._batches], min(remaining, 0.1))

    def flush(self, timeout_s: float, progress: Callable[[int], None] = lambda left: None) -> None:
        """One more sync of every place of every target; what is not done in time is named.

        ``progress`` is told again and again how many targets are left; it must not raise.
        """
        self._end = self._clock() + timeout_s
        alive = self._executor.alive_nodes()  # once, however many places there are
        for target in self._targets.values():
            for place in target.places.values():
                if place.node_id not in alive and place.is_settled:
                    place.lost = True
                self._want(place, forced=True)
            self._choose_anew(target)
            self._enqueue(target)
        if self.settle(list(self._targets), timeout_s, progress):
            return
        self._hear_out(before=self._end - timeout_s)
        for batch in list(self._batches):
            if batch.items and batch.item_started is not None:
                target, place = batch.items.popleft()
                if place.wanted:  # one more was to follow
                    place.give_up_one()
                place.wanted = place.forced = False
                self._unfinished(target, place, "under way", timeout_s)
            self._drop(batch, kill=True)
        self._ready.clear()
        for target in self._targets.values():
            for place in target.places.values():
                if place.forced:
                    place.wanted = place.forced = False
                    place.give_up_one()
                    self._unfinished(target, place, "not begun", timeout_s)

    def _hear_out(self, before: float) -> None:
        """Wait for what was handed over ``before`` and is about to run out of its own time."""
        until = self._clock() + _HEAR_OUT_S
        last = [
            batch
            for batch in self._batches
            if batch.submitted < before
            and batch.item_started is not None
            and batch.item_started + self._timeout_s <= until
        ]
        while last and self._clock() < until:
            self._executor.wait([batch.handle for batch in last], 0.1)
            self._take_in()
            last = [batch for batch in last if batch in self._batches]

    def _unfinished(self, target: Target, place: Place, state: str, timeout_s: float) -> None:
        message = (
            f"the final sync from node {place.node_id[:8]} was {state} when the flush ran out of "
            f"its {timeout_s:g} s (sync_timeout)"
        )
        # What the last sync named stays named.
        failure = FileFailure(target.key, "", "TimeoutError", message)
        last = place.last_report
        report = SyncReport(failures=(*last.failures, failure), deferred=last.deferred)
        self._finish(target, place, report)

    def stop(self) -> None:
        """Kill whatever is still under way."""
        for batch in self._batches:
            self._executor.kill(batch.handle)
        self._batches.clear()


def _failed(key: str, error: str, message: str) -> SyncReport:
    return SyncReport(failures=(FileFailure(key, "", error, message),))


def _is_caught_up(places: dict[str, Place], until: dict[str, int]) -> bool:
    return all(places[node_id].ended >= number for node_id, number in until.items())
