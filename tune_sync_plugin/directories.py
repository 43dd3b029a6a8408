"""Where a job's files are on the node this runs on: its directories, its manifest, its storage.

Everything that a task has to find out about its node is found out here; nothing is synced.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.index import OUR_DIRECTORY, Entry
from tune_sync_plugin.engine.keeper import Indexing
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.manifest import sent_below
from tune_sync_plugin.engine.restore import RestoreOptions
from tune_sync_plugin.engine.scan import scan
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.report import EXPERIMENT
from tune_sync_plugin.runs import RunFacts
from tune_sync_plugin.tune_internals import is_drivers, is_rays, session_dir

# Ours, beside Ray's `driver_artifacts` and `working_dirs` in a run's session directory.
_OUR_DIR = "tune_sync"
# The label of what lies in `get_trial_dir()`; the working directory's is "".
TRIAL_DIR = "trial_dir"


@dataclass(frozen=True)
class SyncJob:
    """One trial's directory, or the experiment's, to sync from whatever node it runs on.

    Attributes:
        key: The trial's id, or ``"experiment"``.
        roots: The directories, relative to the run's session directory on the node (or absolute).
        destination: The prefix on the storage file system.
        options: Filters, limits and ``sync_timeout``.
        must_exist: Whether a missing root is a failure, rather than nothing to sync.
        drivers_root: Where the driver keeps its files for the same destination. On the driver's
            disk they belong to the driver, which syncs them itself; elsewhere it is one more root.
        forced: Whether the index in storage is to be brought up to date by all means.
        shared: Whether other nodes may write the same index.
    """

    key: str
    roots: tuple[str, ...]
    destination: str
    options: SyncOptions
    must_exist: bool = False
    drivers_root: str = ""
    forced: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Run:
    """What all jobs of one experiment share.

    Attributes:
        filesystem: The ``pyarrow.fs.FileSystem`` that Ray resolved the storage path to.
        session_subdir: Where the run's files are on any node, below Ray's session directory.
        driver_mark: Names the file that tells the driver's disk.
        destination: The experiment's prefix on the file system.
        storage_mark: A file there, by which to tell that a local path is the one the driver sees.
        facts: What tells this run from others that write to the same place.
    """

    filesystem: Any
    session_subdir: str
    driver_mark: str
    destination: str
    storage_mark: str
    facts: RunFacts

    def storage(self, destination: str, *, in_training: bool = False) -> Storage:
        """A prefix on the file system; see :func:`.storage_at`."""
        return storage_at(self.filesystem, destination, in_training=in_training)

    def root(self) -> Storage:
        """The experiment's directory.

        Raises:
            FileNotFoundError: It is a local path, and not the driver's.
        """
        storage = self.storage(self.destination)
        # Elsewhere a local path is just a directory of its own, and a sync to it would succeed.
        if isinstance(storage, LocalStorage) and not storage.stat(self.storage_mark):
            raise FileNotFoundError(
                f"this node does not see the driver's storage: {self.destination}/"
                f"{self.storage_mark} is missing. A local storage_path must be on a file system "
                "that all nodes mount, as NFS"
            )
        return storage


class HasSession(Protocol):
    """What shares a run's directory on each node."""

    @property
    def session_subdir(self) -> str: ...


def this_node(run: HasSession) -> tuple[str, str]:
    """The run's session directory on the node this is called on, and the node's id."""
    here = os.path.join(session_dir(), run.session_subdir)
    return here, ray.get_runtime_context().get_node_id()


def prepare_driver_disk(run: Run, session_dir: str) -> str:
    """Leave a file by which a task can tell that its node's disk is the driver's.

    Node ids don't: several nodes of one machine share a session directory. Returns an empty
    directory beside it, for copies of the experiment's state.
    """
    directory = os.path.join(session_dir, run.session_subdir, _OUR_DIR)
    copies = os.path.join(directory, f"state-{run.facts.id}")
    os.makedirs(copies, exist_ok=True)
    with open(os.path.join(directory, run.driver_mark), "w"):
        pass
    return copies


class Directories:
    """A job's directories and storage, as this node sees them.

    Args:
        job: What is to be synced or restored.
        run: The experiment.
        here: The run's session directory on this node.
        node: Names this node.
        in_training: Whether this is the trial's own process.

    Attributes:
        roots: What to sync, without repetitions.
        labels: The names of the roots in the index.
        storage: Where to.
        occupied: The paths at which the driver's disk has files of the driver's.
        claimed: The path of a file that is there once the run has made itself known in storage.
        manifest: The manifest's path. There is one per destination: a restored run may write
            somewhere else.

    Raises:
        FileNotFoundError: This node lacks something that it must have; says what.
    """

    def __init__(
        self, job: SyncJob, run: Run, here: str, node: str, *, in_training: bool = False
    ) -> None:
        self._job = job
        self._node = node
        self.claimed = os.path.join(here, _OUR_DIR, f"claimed-{run.facts.id}")
        self.storage: Storage = run.storage(job.destination, in_training=in_training)
        if job.key != EXPERIMENT and isinstance(self.storage, LocalStorage):
            run.root()
        # The same directory may have been named twice.
        paths = [os.path.realpath(os.path.join(here, root)) for root in job.roots]
        self.roots = list(dict.fromkeys(paths))
        self.labels: dict[str, str] = {}
        self._drivers: str | None = None
        if job.drivers_root:
            trial_dir = os.path.realpath(os.path.join(here, job.drivers_root))
            if os.path.exists(os.path.join(here, _OUR_DIR, run.driver_mark)):
                self._drivers = trial_dir
            elif trial_dir not in self.roots:
                self.roots.append(trial_dir)
            self.labels[trial_dir] = TRIAL_DIR
        self._drivers_files = list(scan([self._drivers], Filter()).files) if self._drivers else []
        self.occupied = {part for path in self._drivers_files for part in _with_parents(path)}
        self.manifest = _manifest(here, job.key, self.storage)
        self._drivers_manifest = ""
        if self._drivers:
            experiment = run.storage(run.destination, in_training=in_training)
            self._drivers_manifest = _manifest(here, EXPERIMENT, experiment)

    def is_taken(self, path: str) -> bool:
        """Whether storage has this path from the driver, and not from the trial."""
        if self._job.key == EXPERIMENT:
            return f"/{OUR_DIRECTORY}/" in path  # a trial's index
        return is_rays(path) or path in self.occupied

    def indexing(self) -> Indexing | None:
        """How a sync of this keeps the index: only artifacts have one."""
        if self._job.key == EXPERIMENT:
            return None
        # What the trial writes there goes to storage with the driver's files. How much of it is
        # there is not known to this sync.
        artifacts = [path for path in self._drivers_files if not is_drivers(path)]
        also = dict.fromkeys(artifacts, Entry(root=TRIAL_DIR))
        return Indexing(
            writer=self._node,
            shared=self._job.shared,
            forced=self._job.forced,
            drivers=is_drivers,
            also=also,
        )

    def to_restore(self) -> dict[str, str]:
        """The directories that artifacts come back to, by their labels."""
        trial_dirs = {label: root for root, label in self.labels.items()}
        return {"": self.roots[0], **trial_dirs}

    def restoring(self, limit_s: float, *, without_index: bool) -> RestoreOptions:
        """How to restore here."""
        drivers = self._drivers
        return RestoreOptions(
            self._job.options.concurrency,
            limit_s,
            is_drivers,
            without_index=without_index,
            writer=self._node,
            others_root=TRIAL_DIR if drivers else None,
            others_sent=sent_below(self._drivers_manifest, os.path.basename(drivers))
            if drivers
            else {},
        )


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = os.path.dirname(path)


def _manifest(here: str, key: str, storage: Storage) -> str:
    name = hashlib.sha256(storage.name.encode()).hexdigest()[:16]
    readable = re.sub(r"[^\w.-]", "_", key)[:64]
    return os.path.join(here, _OUR_DIR, f"{readable}-{name}.sqlite")
