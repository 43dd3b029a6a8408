"""What the mirror has done in sync workers, on whatever node sees the experiment's directory.

Thin: each function calls the engine on one directory. Imports no part of Ray Tune.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tune_sync_plugin.directories import this_node
from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.index import INDEX, OUR_DIRECTORY
from tune_sync_plugin.engine.pool import Limits, once
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.engine.urls import filesystem_at, without_secrets
from tune_sync_plugin.errors import describe
from tune_sync_plugin.mirror.state import STATE_FILES
from tune_sync_plugin.report import FileFailure, SyncReport
from tune_sync_plugin.runs import RUN, SUMMARY

# Half-written files of ours, in a destination that is the mirror's source.
_PARTIAL = "**/.tune_sync-*.part"
# What of a trial's directory goes by itself, and in its own order.
_NO_TRIAL_FILES = ("checkpoint_" + "[0-9]" * 6, OUR_DIRECTORY, _PARTIAL)


@dataclass(frozen=True)
class MirrorRun:
    """What all tasks of one mirror share.

    Attributes:
        experiment: The experiment's directory, on this node or mounted there.
        mark: A file in it, by which to tell that.
        url: Where it goes.
        options: fsspec's for that URL. They may hold secrets: they travel, and are never written.
        session_subdir: Where the run's files are on any node, below Ray's session directory.
        sync: How to sync.
    """

    experiment: str
    mark: str
    url: str
    options: Mapping[str, Any] = field(repr=False)
    session_subdir: str
    sync: SyncOptions

    @property
    def name(self) -> str:
        """The mirror, as it may be shown."""
        return without_secrets(self.url)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        return filesystem_at(self.url, self.options)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_place"}

    def storage(self, path: str = "") -> Storage:
        """The mirror, or a directory in it."""
        filesystem, root = self._place
        return storage_at(filesystem, f"{root}/{path}".rstrip("/"))

    def root(self) -> Storage:
        """The experiment's mirror."""
        return self.storage()

    @property
    def is_seen(self) -> bool:
        """Whether the experiment's directory is here."""
        return os.path.exists(os.path.join(self.experiment, self.mark))


Answer = SyncReport | None
"""What a task returns; ``None`` if its node does not see the experiment's directory."""


def _report(task: Callable[..., SyncReport]) -> Callable[..., Answer]:
    """A failure becomes a report, and a node without the directory says so."""

    @functools.wraps(task)
    def reported(name: str, *arguments: Any) -> Answer:
        run: MirrorRun = arguments[-1]
        if not run.is_seen:
            return None
        try:
            return task(name, *arguments)
        except Exception as error:
            message = f"mirroring {name or 'the state'} to {run.name} failed: {describe(error)}"
            return SyncReport(failures=(FileFailure(name, "", type(error).__name__, message),))

    return reported


def _sync(run: MirrorRun, source: str, path: str, label: str, options: SyncOptions) -> SyncReport:
    manifest = _manifest(run, label)
    os.makedirs(os.path.dirname(manifest), exist_ok=True)
    return sync([source], run.storage(path), manifest, options, label=label)


def _manifest(run: MirrorRun, label: str) -> str:
    here, _ = this_node(run)
    digest = hashlib.sha256(f"{run.name}/{label}".encode()).hexdigest()[:16]
    return os.path.join(here, "tune_sync", "mirror", f"{digest}.sqlite")


@_report
def mirror_trial(name: str, timeout_s: float, run: MirrorRun) -> SyncReport:
    """A trial's artifacts and the driver's files about it; its checkpoints go by themselves."""
    source = os.path.join(run.experiment, name)
    # The index last, as it was before: it never names a file that is not there.
    index = b""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(source, INDEX), "rb") as file:
        index = file.read()
    options = replace(run.sync, keep=Filter(exclude=_NO_TRIAL_FILES), timeout_s=timeout_s)
    report = _sync(run, source, name, name, options)
    if index and report.complete:
        sent = f"{_manifest(run, name)}.index"
        digest = hashlib.sha256(index).hexdigest()
        if _read(sent) != digest:
            _put(run, f"{name}/{INDEX}", index, timeout_s)
            with open(sent, "w", encoding="utf-8") as out:
                out.write(digest)
    return report


def _read(path: str) -> str:
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
        return file.read()
    return ""


def _put(run: MirrorRun, path: str, content: bytes, timeout_s: float) -> None:
    storage = run.storage()
    once(lambda: storage.write(path, Memory(content), "mirror"), Limits.within(timeout_s))


@_report
def mirror_checkpoint(name: str, source: str, timeout_s: float, run: MirrorRun) -> SyncReport:
    """A checkpoint, from where it is pinned; what vanishes meanwhile is in ``deferred``."""
    here = os.path.join(run.experiment, source)
    report = _sync(run, here, name, name, replace(run.sync, timeout_s=timeout_s))
    if not os.path.isdir(here):
        gone = FileFailure(name, "", "SourceChangedError", "deleted by Tune while it was mirrored")
        return replace(report, failures=(), deferred=(gone,))
    if report.complete:  # it never changes again, so that nothing needs to be remembered of it
        os.unlink(_manifest(run, name))
    return report


@_report
def mirror_state(name: str, copy: str, timeout_s: float, run: MirrorRun) -> SyncReport:
    """The experiment's state, last of it the file that names checkpoints."""
    options = replace(run.sync, timeout_s=timeout_s, keep=Filter(exclude=(STATE_FILES,)))
    report = _sync(run, copy, "", "experiment", options)
    if not report.complete:
        return report
    return _sync(run, copy, "", "state", replace(options, keep=Filter(include=(STATE_FILES,))))


@_report
def mirror_end(name: str, timeout_s: float, run: MirrorRun) -> SyncReport:
    """What says that the run has ended and that everything is there: when it is."""
    for path in (RUN, SUMMARY):
        source = os.path.join(run.experiment, path)
        with contextlib.suppress(FileNotFoundError), open(source, "rb") as file:
            _put(run, path, file.read(), timeout_s)
    return SyncReport()


@_report
def remove_checkpoint(
    name: str, checkpoint: str, files: list[str], timeout_s: float, run: MirrorRun
) -> SyncReport:
    """Delete what we have put there of a checkpoint, and nothing else."""
    storage, limits = run.storage(), Limits.within(timeout_s)
    for path in files:
        once(lambda path=path: storage.remove(f"{checkpoint}/{path}"), limits)  # type: ignore[misc]
    return SyncReport()
