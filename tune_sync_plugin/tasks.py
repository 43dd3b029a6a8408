"""What runs in the sync workers, which are processes of our own on the nodes where the files are.

Thin: it calls the engine on what ``directories.py`` finds. Imports no part of Ray Tune, which would
cost every new process seconds.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tune_sync_plugin import runs
from tune_sync_plugin.directories import Directories, Run, SyncJob, this_node
from tune_sync_plugin.engine.pool import Limits, once
from tune_sync_plugin.engine.sync import sync
from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Event, Started, Synced
from tune_sync_plugin.report import EXPERIMENT, FileFailure, SyncReport

# The driver kills a task that reported a timeout; should the driver be gone, it ends by itself.
_LINGER_S = 30.0
# Training comes first where CPUs are short. Ray starts all workers at 15, so that this makes it 19:
# the kernel's lowest, at which a thread gets 0.4 of what one of training's gets, and no less.
_NICE = 5
# How long a thread that has nothing left to do may take to end.
_THREADS_END_S = 0.1


class SyncWorker:
    """The process that syncs run in, an actor; see ``workers.py``. It keeps nothing between them.

    Args:
        run: The experiment (a ``Run``), or its mirror, pickled. What can't be unpickled here is
            reported by the first sync.
    """

    def __init__(self, run: bytes) -> None:
        self._pickled = run
        self._run: Any = None
        _yield_to_training()
        # What the first sync would have to wait for: the imports, and the storage's client.
        with contextlib.suppress(Exception):
            self._unpickled().root()

    def _unpickled(self) -> Any:
        if self._run is None:
            self._run = pickle.loads(self._pickled)
        return self._run

    def sync(self, jobs: Sequence[SyncJob], budget_s: float) -> Iterator[Event]:
        """See :func:`sync_directories`."""
        yield from sync_directories(jobs, self._unpickled(), budget_s)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns ``function(*arguments, run)``."""
        return function(*arguments, self._unpickled())


def _yield_to_training() -> None:
    """Lower this process's priority, for good: it is an actor's, and so never the user's.

    On Linux that goes for the calling thread and those that it starts, our transfers' among them;
    those by which Ray talks to the process keep theirs. (Windows has no ``os.nice``.)
    """
    with contextlib.suppress(AttributeError, OSError):
        os.nice(_NICE)


def sync_directories(jobs: Sequence[SyncJob], run: Run, budget_s: float) -> Iterator[Event]:
    """Sync the jobs' directories on the node this runs on, yielding a report after each."""
    yield Started()
    end = time.monotonic() + budget_s
    here, node = this_node(run)
    for job in jobs:
        timeout_s = min(job.options.timeout_s, max(end - time.monotonic(), 0.0))
        report = _sync_one(
            replace(job, options=replace(job.options, timeout_s=timeout_s)), run, here, node
        )
        yield Synced(report, reusable=_nothing_hangs())
        if report.timed_out:
            # Uploads still hang in this process's threads. The driver kills it on this report.
            time.sleep(_LINGER_S)
            os._exit(1)


def _nothing_hangs() -> bool:
    """Whether all threads of the sync's have ended: nobody can end one, but with its process."""
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("tune_sync")]
    end = time.monotonic() + _THREADS_END_S
    for thread in ours:
        thread.join(max(end - time.monotonic(), 0.0))
    return not any(thread.is_alive() for thread in ours)


def _sync_one(job: SyncJob, run: Run, here: str, node: str) -> SyncReport:
    try:
        place = Directories(job, run, here, node)
        if job.must_exist and not all(map(os.path.isdir, place.roots)):
            raise FileNotFoundError(f"this node has no {' or '.join(place.roots)}")
        warning = _claim(place, run) if job.key == EXPERIMENT else None
        report = sync(
            place.roots,
            place.storage,
            place.manifest,
            job.options,
            label=job.key,
            taken=place.is_taken,
            occupied=place.occupied,
            indexing=place.indexing(),
            labels=place.labels,
        )
        return replace(report, warnings=(*report.warnings, warning)) if warning else report
    except Exception as error:
        message = f"syncing {job.destination} failed: {describe(error)}"
        return SyncReport(failures=(FileFailure(job.key, "", type(error).__name__, message),))


def _claim(place: Directories, run: Run) -> str | None:
    """Make the run known in storage, before its first file goes there."""
    if os.path.exists(place.claimed):
        return None
    try:
        warning = runs.claim(place.storage, run.facts)
    except Exception:
        return None  # the sync meets the same obstacle, and reports it; the next one tries again
    # Where the disk is full the next sync claims it again, which changes nothing.
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(place.claimed), exist_ok=True)
        open(place.claimed, "w").close()
    return warning


def find_leftovers(jobs: Sequence[SyncJob], run: Run) -> list[str]:
    """The keys of the jobs that have something on this node, or have been synced from it."""
    here, node = this_node(run)
    found = []
    for job in jobs:
        place = Directories(job, run, here, node)
        if os.path.exists(place.manifest) or any(map(_has_files, place.roots)):
            found.append(job.key)
    return found


def _has_files(directory: str) -> bool:
    return any(names for _, _, names in os.walk(directory))


def close_run(summary: dict[str, Any], timeout_s: float, run: Run) -> str | None:
    """Write the run's summary; returns a warning if another run was in the same directory."""
    limits = Limits.within(timeout_s)
    storage = run.storage(run.destination)
    return once(lambda: runs.close(storage, run.facts, summary), limits)
