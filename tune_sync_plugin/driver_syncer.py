"""Stands in for Ray's syncer of the experiment's directory: its calls become our requests.

Ray's experiment snapshots make them from Tune's loop; no call but the last one blocks.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable
from typing import Any

from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.report import EXPERIMENT, ExperimentReport
from tune_sync_plugin.whole_files import copy_files

_LEAST_FLUSH_S = 10.0
_NOT_IMPORTABLE = {"ModuleNotFoundError", "ImportError", "RuntimeEnvSetupError"}


class DriverSyncer:
    """Turns ``sync_up`` and ``wait`` into requests for the experiment's target.

    Ray says that a snapshot is forced by calling ``wait()`` before ``sync_up()``, and that it wants
    to block (once, at the end of the run) by calling ``wait()`` after it as well. A ``wait`` in
    front only announces: the dispatcher never runs two syncs of a target at once anyway.

    Where our tasks can't be run at all, since this package is missing in Ray's worker processes,
    all is handed back to Ray's own syncer: an experiment without its state can't be read or
    restored. Whatever else Ray may ask of a syncer, Ray's own does anyway.

    Copies of the storage context go to every trial, and with them to workers: what is pickled or
    copied of this is the syncer that Ray made, which serves trials that we could not attach to.

    Args:
        dispatcher: Takes the requests.
        report: Says what became of them.
        rays_own: Ray's syncer.
        copies: A directory for copies of the state's files, made when they are whole.
        timeout_s: What Ray's last wait may take.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        report: ExperimentReport,
        rays_own: Any,
        copies: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dispatcher = dispatcher
        self._report = report
        self._rays_own = rays_own
        self._copies = copies
        self._timeout_s = timeout_s
        self._clock = clock
        self._end: float | None = None
        self._forced = False
        self._requested = False
        self._snapshot: tuple[str, str, list[str] | None] = ("", "", None)

    def sync_up(self, local_dir: str, remote_dir: str, exclude: list[str] | None = None) -> bool:
        """Request a sync. ``True`` also if the period holds it back: it is going to happen."""
        self._snapshot = (local_dir, remote_dir, exclude)
        if self._cannot_run():
            return bool(self._rays_own.sync_up(*self._snapshot))
        # Where that fails, as on a full disk, it is sent from where Ray writes it.
        with contextlib.suppress(OSError):
            copy_files(local_dir, self._copies)
        self._dispatcher.request(EXPERIMENT, forced=self._forced)
        self._dispatcher.poll()
        self._requested, self._forced = self._forced, False
        return True

    def wait(self, timeout: float | None = None) -> None:
        """Announce a forced sync, or wait for the one just requested.

        Raises:
            TimeoutError: It took longer than ``timeout`` seconds, by default ``sync_timeout``.
            RuntimeError: Some of the directory is not in storage; says what and why.
        """
        timeout_s = self._timeout_s if timeout is None else timeout
        if self._cannot_run():
            self._rays_own.wait(timeout_s)
            return
        if not self._requested:
            self._forced = True
            return
        self._requested = False
        self._end = self._clock() + timeout_s
        settled = self._dispatcher.settle([EXPERIMENT], timeout_s)
        if self._cannot_run():  # only now known
            self._rays_own.sync_up(*self._snapshot)
            self._rays_own.wait(timeout_s)
            return
        if not settled:
            raise TimeoutError(f"no end of the experiment's sync within {timeout_s:g} s")
        failures = self._report.experiment.failures
        if failures:
            raise RuntimeError("; ".join(map(str, failures[:3])))

    def _cannot_run(self) -> bool:
        return any(f.error in _NOT_IMPORTABLE for f in self._report.experiment.failures)

    def time_left(self) -> float:
        """Seconds that are left of the time the end of the run may take.

        It began with Ray's last wait. Something is left for the final flush in any case: what held
        that wait up need not hold up anything else.
        """
        end = self._clock() + self._timeout_s if self._end is None else self._end
        return max(end - self._clock(), min(_LEAST_FLUSH_S, self._timeout_s))

    def step_ended(self) -> None:
        """A ``wait`` after this belongs to a new snapshot."""
        self._requested = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rays_own, name)

    def __reduce__(self) -> Any:
        # A function of the standard library: this package may be missing where it is unpickled.
        return copy.copy, (self._rays_own,)
