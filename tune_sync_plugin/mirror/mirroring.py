"""Decides what of the experiment goes to the mirror, and in which order.

The order is the promise: a checkpoint's files arrive before any state that names it, and go only
after a state that does not. So a state is taken by a copy, what it names is pinned (or was, when it
was reported), sent, and only then the state itself; one that names what is gone is passed over.
Trials' other files follow when they change, whatever the state does.

No Ray in here: the tasks it makes are done elsewhere.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from tune_sync_plugin.mirror import tasks
from tune_sync_plugin.mirror.ledger import Ledger
from tune_sync_plugin.mirror.pins import Pins, files_in
from tune_sync_plugin.mirror.spread import Spread, Task
from tune_sync_plugin.mirror.state import State, current_version, take, trials_in
from tune_sync_plugin.report import FileFailure, MirrorReport, SyncReport

_STATE = "state"
_END = "end"
_REMOVE = "remove "
# What failed is tried again after so long, then after twice as long, and so on.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 120.0
# So often the experiment's directory is looked at, which may be on NFS.
_LOOK_S = 0.5
# A checkpoint that Tune has deleted may still be named by a state that is on its way here; by the
# one after the next it no longer is.
_STATES_TO_WAIT = 2


class Mirroring:
    """See the module's docstring. Its methods may be called from several threads.

    Args:
        experiment: The experiment's directory.
        copy: A directory of this node's for copies of the state.
        url: Names the mirror, without credentials.
        spread: Does the tasks.
        period_s: Least seconds between the starts of two syncs of a trial, and between two states.
        timeout_s: What one task may take.
        all_checkpoints: Whether every checkpoint goes, also one that Tune has deleted by then.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        experiment: str,
        copy: str,
        url: str,
        spread: Spread,
        *,
        period_s: float,
        timeout_s: float,
        all_checkpoints: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._experiment = experiment
        self._copy = copy
        self._spread = spread
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._all = all_checkpoints
        self._clock = clock
        self._pins = Pins(experiment)
        self._ledger = Ledger(experiment, url)
        self._lock = threading.RLock()
        self._report = MirrorReport(url)
        self._failures: dict[str, tuple[FileFailure, ...]] = {}
        self._tries: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        # Trials whose files have changed, and when each was begun the last time.
        self._changed: set[str] = set()
        self._begun: dict[str, float] = {}
        # Those of which there has been a sync, if only one that failed.
        self._seen: set[str] = set()
        # The state that is on its way, that has arrived, and that could not be taken.
        self._pending: State | None = None
        self._arrived: State | None = None
        self._passed_over: str | None = None
        # Versions of the state that were seen, counted; and at which count a pinned checkpoint was
        # found to have been deleted.
        self._version: str | None = None
        self._versions = 0
        self._deleted_at: dict[str, int] = {}
        # Whether a checkpoint has been reported since the last state was taken.
        self._fresh = False
        self._look_again = -math.inf
        self._finishing = False
        # What was begun since, and what of that has failed.
        self._last_tries: set[str] = set()
        self._given_up: set[str] = set()
        self._ended = False

    # -- what happens ---------------------------------------------------------------------------

    def pin(self, name: str) -> None:
        """A checkpoint is complete, as ``<trial directory>/<checkpoint directory>``."""
        if self._ledger.has(name):  # a trial that begins anew uses its names again
            with self._lock:
                self._ledger.incomplete(name)
            self._pins.release(name)
        kept = self._pins.pin(name)
        with self._lock:
            self._fresh = True
            if not kept:
                self._report.checkpoints_skipped += 1

    def change(self, trials: Iterable[str]) -> None:
        """Files of these trials have changed, by the names of their directories."""
        with self._lock:
            self._changed.update(trials)

    def report(self) -> MirrorReport:
        """What was done so far."""
        with self._lock:
            failures = [failure for named in self._failures.values() for failure in named]
            return replace(self._report, owed=len(self._owed()), failures=failures, warnings=[])

    # -- the loop -------------------------------------------------------------------------------

    def step(self) -> None:
        """Take in what has ended, start what is due."""
        with self._lock:
            for task, report in list(self._spread.poll()):
                self._take(task, report)
            now = self._clock()
            if now >= self._look_again:
                self._look_again = now + _LOOK_S
                self._look_at_state()
                self._remove_checkpoints()
                self._release()
            self._send_checkpoints()
            self._send_state()
            self._send_trials()
            for task, report in list(self._spread.poll()):
                self._take(task, report)

    def finish(self) -> None:
        """From now on everything is due at once, and tried once more."""
        with self._lock:
            self._finishing = True
            for noted in (self._not_before, self._tries, self._last_tries, self._given_up):
                noted.clear()
            self._passed_over = None
            self._look_again = -math.inf
            self._changed.update(trials_in(self._experiment))

    @property
    def is_finished(self) -> bool:
        """Whether, after :meth:`finish`, all is there or has failed; has it ended, if it has."""
        with self._lock:
            if not self._spread.is_idle or self._look_again == -math.inf:
                return False
            owed = self._owed()
            if any(name not in self._given_up and not self._is_stuck(name) for name in owed):
                return False
            if not owed and not self._failures and not self._ended:
                self._ended = True
                self._submit(_END, tasks.mirror_end, first=True)
                return False
            self._release_all()
            return True

    def _is_stuck(self, name: str) -> bool:
        """Whether the state can't go since a checkpoint that it names has failed."""
        if name != _STATE:
            return False
        if self._pending is None:
            return self._passed_over is not None
        return any(
            checkpoint in self._given_up and not self._ledger.has(checkpoint)
            for checkpoint in self._pending.checkpoints
        )

    def give_up(self, why: str) -> None:
        """Stop; name what is owed."""
        with self._lock:
            owed = self._owed()
            self._spread.stop()
            for name in owed:
                self._failures.setdefault(
                    name, (FileFailure(name, "", "TimeoutError", f"not mirrored: {why}"),)
                )
            self._release_all()

    def _owed(self) -> set[str]:
        under_way = self._spread.names - {_END}
        owed = self._changed | {name for name in under_way if not name.startswith(_REMOVE)}
        version = current_version(self._experiment)
        if self._pending or version != (self._arrived and self._arrived.version):
            owed.add(_STATE)
        if self._all:
            owed |= {name for name in self._pins.names() if not self._ledger.has(name)}
        return owed

    def _may_begin(self, name: str) -> bool:
        if name in self._given_up:
            return False
        return self._clock() >= self._not_before.get(name, -math.inf)

    def _submit(
        self, name: str, function: Callable[..., tasks.Answer], *arguments: object, first: bool
    ) -> None:
        small = name in (_STATE, _END)
        returns = function is tasks.mirror_trial
        task = Task(name, function, (*arguments, self._timeout_s), self._timeout_s, small, returns)
        if self._finishing:
            self._last_tries.add(name)
        self._spread.submit(task, first=first)

    # -- the state and its checkpoints ----------------------------------------------------------

    def _look_at_state(self) -> None:
        version = current_version(self._experiment)
        if version != self._version:
            self._version, self._versions = version, self._versions + 1
        if version is None or self._pending or not self._may_begin(_STATE):
            return
        if version in (self._passed_over, self._arrived and self._arrived.version):
            return
        if not self._is_due(_STATE):
            return
        state = take(self._experiment, self._copy)
        if state is None:
            return
        gone = [n for n in state.checkpoints if not self._ledger.has(n) and not self._pins.pin(n)]
        if not gone:
            self._pending, self._fresh = state, False
            # Ray looks for the results of each trial that a state tells of.
            self._changed |= state.trials - self._seen
            self._begun[_STATE] = self._clock()
            return
        self._passed_over = state.version
        self._report.states_passed_over += 1
        if self._finishing:  # no later one will come
            message = f"the last state names a checkpoint that is gone, and was not sent: {gone[0]}"
            self._failures[_STATE] = (FileFailure(_STATE, "", "FileNotFoundError", message),)

    def _is_due(self, name: str) -> bool:
        if self._finishing or (name == _STATE and self._fresh):
            return True
        return self._clock() >= self._begun.get(name, -math.inf) + self._period_s

    def _send_checkpoints(self) -> None:
        wanted = set(self._pending.checkpoints) if self._pending else set()
        if self._all:
            wanted |= self._pins.names()
        for name in sorted(wanted):
            if self._ledger.has(name) or self._spread.has(name) or not self._may_begin(name):
                continue
            source = self._pins.path(name)
            self._ledger.begin(name, files_in(os.path.join(self._experiment, source)))
            self._submit(name, tasks.mirror_checkpoint, source, first=False)

    def _send_state(self) -> None:
        if self._pending is None or self._spread.has(_STATE) or not self._may_begin(_STATE):
            return
        arrived = all(map(self._ledger.has, self._pending.checkpoints))
        if arrived and self._pending.trials <= self._seen:
            self._submit(_STATE, tasks.mirror_state, self._copy, first=True)

    def _remove_checkpoints(self) -> None:
        if self._arrived is None:
            return
        named = self._arrived.checkpoints | (self._pending.checkpoints if self._pending else set())
        for name in self._ledger.names() - named:
            gone = self._pins.is_deleted(name) and not self._spread.has(name)
            task = _REMOVE + name
            if gone and not self._spread.has(task) and self._may_begin(task):
                if self._all and name in self._pins.names():
                    continue  # it is still to be sent
                self._ledger.incomplete(name)
                files = self._ledger.files(name)
                self._submit(task, tasks.remove_checkpoint, name, files, first=False)

    def _release(self) -> None:
        """Let go of pins that nothing will ask for any more."""
        named = self._pending.checkpoints if self._pending else frozenset()
        for name in self._pins.names() - named:
            if self._ledger.has(name):
                self._pins.release(name)
            elif not self._all and not self._spread.has(name) and self._pins.is_deleted(name):
                since = self._deleted_at.setdefault(name, self._versions)
                if self._versions - since >= _STATES_TO_WAIT:
                    self._skip(name)

    def _skip(self, name: str) -> None:
        self._deleted_at.pop(name, None)
        self._failures.pop(name, None)
        self._pins.release(name)
        self._report.checkpoints_skipped += 1

    def _release_all(self) -> None:
        """No state will come any more; the checkpoints that the last one names are on disk."""
        self._pending = None
        for name in self._pins.names():
            self._pins.release(name)

    # -- trials ---------------------------------------------------------------------------------

    def _send_trials(self) -> None:
        for name in sorted(self._changed):
            if self._spread.has(name) or not self._is_due(name) or not self._may_begin(name):
                continue
            self._changed.discard(name)
            self._begun[name] = self._clock()
            # Mostly small, and not to wait behind gigabytes.
            self._submit(name, tasks.mirror_trial, first=True)

    # -- what has ended -------------------------------------------------------------------------

    def _take(self, task: Task, report: SyncReport) -> None:
        name = task.name
        if task.function is _TRIAL:
            self._seen.add(name)
        self._report.files_uploaded += report.files_uploaded
        self._report.bytes_uploaded += report.bytes_uploaded
        # What was being written to comes again, unless this is the end.
        again = task.function is _TRIAL and not self._finishing
        failed = report.failures or (() if again else report.deferred)
        if not failed:
            self._failures.pop(name, None)
            self._tries.pop(name, None)
            self._not_before.pop(name, None)
            self._succeeded(task, report)
            return
        if task.function is _CHECKPOINT and not report.failures:
            self._vanished(name)
            return
        self._failures[name] = tuple(failed)
        if not self._finishing:
            self._tries[name] = tries = self._tries.get(name, 0) + 1
            pause = min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S)
            self._not_before[name] = self._clock() + pause
        elif name in self._last_tries:
            self._given_up.add(name)
        if task.function is _TRIAL:
            self._changed.add(name)

    def _succeeded(self, task: Task, report: SyncReport) -> None:
        name = task.name
        if task.function is _TRIAL and report.deferred:
            self._changed.add(name)  # it was being written to
        elif task.function is _CHECKPOINT:
            self._ledger.complete(name)
            self._report.checkpoints_uploaded += 1
        elif name == _STATE:
            self._arrived, self._pending = self._pending, None
            self._report.state_arrived()
            self._look_again = -math.inf  # what it no longer names goes at once
        elif name.startswith(_REMOVE):
            self._ledger.forget(name.removeprefix(_REMOVE))
            self._report.checkpoints_deleted += 1

    def _vanished(self, name: str) -> None:
        """Deleted by Tune, on a file system where it could not be pinned: no error."""
        self._skip(name)
        if self._pending and name in self._pending.checkpoints:
            self._passed_over, self._pending = self._pending.version, None
            self._report.states_passed_over += 1


_TRIAL, _CHECKPOINT = tasks.mirror_trial, tasks.mirror_checkpoint
