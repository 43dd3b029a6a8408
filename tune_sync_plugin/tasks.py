"""What runs in Ray's worker processes: syncs as tasks, the attach in the trial's own actor.

Thin: it calls the engine on what ``directories.py`` finds. Imports no part of Ray Tune, which would
cost every new worker process seconds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray

from tune_sync_plugin import runs, tune_internals
from tune_sync_plugin.directories import Directories, Run, SyncJob
from tune_sync_plugin.engine.pool import Limits, once
from tune_sync_plugin.engine.restore import restore
from tune_sync_plugin.engine.storage import storage_at
from tune_sync_plugin.engine.sync import sync
from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Event, Started, Synced
from tune_sync_plugin.report import EXPERIMENT, FileFailure, RestoreReport, SyncReport

# The driver kills a task that reported a timeout; should the driver be gone, it ends by itself.
_LINGER_S = 30.0


def sync_directories(jobs: Sequence[SyncJob], run: Run, budget_s: float) -> Iterator[Event]:
    """Sync the jobs' directories on the node this runs on, yielding a report after each."""
    yield Started()
    end = time.monotonic() + budget_s
    here, node = _here(run)
    for job in jobs:
        timeout_s = min(job.options.timeout_s, max(end - time.monotonic(), 0.0))
        report = _sync_one(
            replace(job, options=replace(job.options, timeout_s=timeout_s)), run, here, node
        )
        yield Synced(report)
        if report.timed_out:
            # Uploads still hang in this process's threads. The driver kills it on this report.
            time.sleep(_LINGER_S)
            os._exit(1)


def _here(run: Run) -> tuple[str, str]:
    here = os.path.join(tune_internals.session_dir(), run.session_subdir)
    return here, ray.get_runtime_context().get_node_id()


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
    here, node = _here(run)
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
    limits = Limits(1, time.monotonic() + timeout_s)
    storage = storage_at(run.filesystem, run.destination)
    return once(lambda: runs.close(storage, run.facts, summary), limits)


@dataclass(frozen=True)
class Restoring:
    """How a trial that starts again gets its artifacts back.

    Attributes:
        job: The trial's sync job, with the working directory as the only root.
        run: The experiment.
        left: The ids of the nodes where the trial was earlier in this run.
        flushed: A reference that is ready when these hold nothing unsynced any more. In a tuple,
            so that one that fails does not fail the attach.
    """

    job: SyncJob
    run: Run
    left: tuple[str, ...] = ()
    flushed: tuple[Any, ...] = ()


class Attached(NamedTuple):
    """What attaching to a trial found out: see :func:`tune_internals.attach`."""

    logdir: str
    nodes: list[str]
    restored: RestoreReport | None


def attach(trainable: Any, restoring: Restoring | None) -> Attached:
    """Take over a trial's artifacts, and bring back those that this node lacks.

    Runs inside the trial's actor before its training code does. Restoring never fails it.
    """
    restored = _restore(restoring) if restoring else None
    return Attached(*tune_internals.attach(trainable), restored)


def _restore(restoring: Restoring) -> RestoreReport | None:
    job, run = restoring.job, restoring.run
    try:
        here, node = _here(run)
        place = Directories(job, run, here, node)
        if set(restoring.left) == {node} and os.path.exists(place.manifest):
            return None  # it is as the trial left it
        started = time.monotonic()
        unflushed: tuple[str, ...] = ()
        if restoring.flushed:
            timeout_s = job.options.timeout_s
            flushed, _ = ray.wait(list(restoring.flushed), timeout=timeout_s, fetch_local=False)
            if not flushed:
                unflushed = (
                    f"trial {job.key} did not wait any longer than sync_timeout={timeout_s:g} s "
                    "for the last files from the node it was on",
                )
        # Something is left in any case: what held the flush up need not hold this up.
        left_s = max(job.options.timeout_s - (time.monotonic() - started), 10.0)
        # Where the run is ours from its start, no index means that nothing was sent.
        options = place.restoring(left_s, without_index=run.facts.resumed)
        report = restore(place.to_restore(), place.storage, place.manifest, options, label=job.key)
        return replace(report, warnings=(*unflushed, *report.warnings))
    except Exception as error:
        message = f"restoring from {job.destination} failed: {describe(error)}"
        failure = FileFailure(job.key, "", type(error).__name__, message)
        return RestoreReport(failures=(failure,))
