"""The functions that run as remote Ray tasks. Thin: they find the directories and call the engine.

Imports no part of Ray Tune, which would cost every new worker process seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tune_sync_plugin.engine.storage import LocalStorage, storage_at
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Event, Started, Synced
from tune_sync_plugin.report import EXPERIMENT, FileFailure, SyncReport

# Ours, beside Ray's `driver_artifacts` and `working_dirs` in a run's session directory.
_OUR_DIR = "tune_sync"
# The driver kills a task that reported a timeout; should the driver be gone, it ends by itself.
_LINGER_S = 30.0


@dataclass(frozen=True)
class SyncJob:
    """One trial's directory, or the experiment's, to sync from whatever node it runs on.

    Attributes:
        key: The trial's id, or ``"experiment"``.
        roots: The directories, relative to the run's session directory on the node (or absolute).
        destination: The prefix on the storage file system.
        options: Filters, limits and ``sync_timeout``.
        must_exist: Whether a missing root is a failure, rather than nothing to sync.
        drivers_names: Names at the destination that belong to the driver.
        drivers_root: Where the driver keeps its files for the same destination. On the driver's
            disk they belong to the driver, which syncs them itself; elsewhere it is one more root.
    """

    key: str
    roots: tuple[str, ...]
    destination: str
    options: SyncOptions
    must_exist: bool = False
    drivers_names: frozenset[str] = frozenset()
    drivers_root: str = ""


@dataclass(frozen=True)
class Run:
    """What all jobs of one experiment share.

    Attributes:
        filesystem: The ``pyarrow.fs.FileSystem`` that Ray resolved the storage path to.
        session_subdir: Where the run's files are on any node, below Ray's session directory.
        driver_mark: Names the file that tells the driver's disk.
        destination: The experiment's prefix on the file system.
        storage_mark: A file there, by which to tell that a local path is the one the driver sees.
    """

    filesystem: Any
    session_subdir: str
    driver_mark: str
    destination: str
    storage_mark: str


def mark_driver_disk(run: Run, session_dir: str) -> None:
    """Leave a file by which a task can tell that its node's disk is the driver's.

    Node ids don't: several nodes of one machine share a session directory.
    """
    directory = os.path.join(session_dir, run.session_subdir, _OUR_DIR)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, run.driver_mark), "w"):
        pass


def sync_directories(jobs: Sequence[SyncJob], run: Run, budget_s: float) -> Iterator[Event]:
    """Sync the jobs' directories on the node this runs on, yielding a report after each."""
    from tune_sync_plugin.tune_internals import session_dir

    yield Started()
    end = time.monotonic() + budget_s
    here = os.path.join(session_dir(), run.session_subdir)
    for job in jobs:
        timeout_s = min(job.options.timeout_s, max(end - time.monotonic(), 0.0))
        report = _sync_one(
            replace(job, options=replace(job.options, timeout_s=timeout_s)), run, here
        )
        yield Synced(report)
        if report.timed_out:
            # Uploads still hang in this process's threads. The driver kills it on this report.
            time.sleep(_LINGER_S)
            os._exit(1)


def _sync_one(job: SyncJob, run: Run, here: str) -> SyncReport:
    try:
        storage = storage_at(run.filesystem, job.destination)
        if job.key != EXPERIMENT and isinstance(storage, LocalStorage):
            _check_shared(run)
        roots = list(job.roots)
        drivers: str | None = None
        if job.drivers_root:
            if os.path.exists(os.path.join(here, _OUR_DIR, run.driver_mark)):
                drivers = os.path.join(here, job.drivers_root)
            else:
                roots.append(job.drivers_root)

        def taken(path: str) -> bool:
            return path in job.drivers_names or (
                drivers is not None and os.path.lexists(os.path.join(drivers, path))
            )

        # One manifest per destination: a restored run may write somewhere else.
        name = hashlib.sha256(storage.name.encode()).hexdigest()[:16]
        readable = re.sub(r"[^\w.-]", "_", job.key)[:64]
        manifest = os.path.join(here, _OUR_DIR, f"{readable}-{name}.sqlite")
        # The same directory may have been named twice.
        paths = list(dict.fromkeys(os.path.realpath(os.path.join(here, root)) for root in roots))
        if job.must_exist and not all(map(os.path.isdir, paths)):
            raise FileNotFoundError(f"this node has no {' or '.join(paths)}")
        return sync(paths, storage, manifest, job.options, label=job.key, taken=taken)
    except Exception as error:
        message = f"syncing {job.destination} failed: {describe(error)}"
        return SyncReport(failures=(FileFailure(job.key, "", type(error).__name__, message),))


def _check_shared(run: Run) -> None:
    # On a node that does not see the driver's storage a local path is just a directory of its own,
    # and a sync to it would succeed.
    if not storage_at(run.filesystem, run.destination).exists(run.storage_mark):
        raise FileNotFoundError(
            f"this node does not see the driver's storage: {run.destination}/{run.storage_mark} is "
            "missing. A local storage_path must be on a file system that all nodes mount, as NFS"
        )
