"""One sync of one directory, start to end: scan -> plan -> transfer -> manifest -> report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Plan, Record, make_plan
from tune_sync_plugin.engine.scan import Scan, scan
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.transfer import Limits, transfer
from tune_sync_plugin.errors import describe
from tune_sync_plugin.report import FileFailure, SyncReport

# Records are written at least this often, so a killed sync repeats at most so much work.
_RECORD_EVERY_S = 0.2

_TAKEN = "the driver keeps a file of this name there; rename yours"
_SUPERSEDED = "storage has one that is newer, from where the trial went on; this one is kept back"


@dataclass(frozen=True)
class SyncOptions:
    """How to sync a directory.

    Attributes:
        keep: Which files; default all.
        follow_symlinks: Whether links to directories are walked into.
        concurrency: Files on their way at once.
        timeout_s: Seconds after which the sync stops and names what is left.
        only_missing: Whether to leave alone what storage has, since it is newer: for a directory
            that its writer has left for another one.
    """

    keep: Filter = Filter()
    follow_symlinks: bool = False
    concurrency: int = 16
    timeout_s: float = 1800.0
    only_missing: bool = False


def sync(
    roots: Sequence[str],
    storage: Storage,
    manifest_path: str,
    options: SyncOptions = SyncOptions(),
    *,
    label: str = "",
    taken: Callable[[str], bool] = lambda path: False,
    clock: Callable[[], float] = time.monotonic,
) -> SyncReport:
    """Bring ``storage`` up to date with the directories ``roots``; raises nothing but bugs.

    Args:
        roots: Local directories, laid over one another; on equal paths the first wins.
        storage: Where to.
        manifest_path: The SQLite file that remembers what ``storage`` holds.
        options: See :class:`SyncOptions`.
        label: Who this is for (a trial's id); repeated in the report's failures.
        taken: Tells the paths in ``storage`` that somebody else writes; files of ours that would
            go there are reported instead.
        clock: Seconds, monotonic.

    Example:
        >>> import os, tempfile
        >>> from tune_sync_plugin.engine.storage import LocalStorage
        >>> there = tempfile.mkdtemp()
        >>> os.mkdir(f"{there}/a"); _ = open(f"{there}/a/x", "w").write("12345")
        >>> report = sync([f"{there}/a"], LocalStorage(f"{there}/b"), f"{there}/manifest")
        >>> report.files_uploaded, report.bytes_uploaded, os.listdir(f"{there}/b")
        (1, 5, ['x'])
        >>> sync([f"{there}/a"], LocalStorage(f"{there}/b"), f"{there}/manifest").files_uploaded
        0
    """
    started = clock()
    manifest = Manifest(manifest_path, storage.name)
    try:
        scanned = scan(list(roots), options.keep, follow_symlinks=options.follow_symlinks)
        for path in [path for path in scanned.files if taken(path)]:
            del scanned.files[path]
            scanned.failures.append((path, FileExistsError(_TAKEN)))
        plan = make_plan(scanned.files, manifest.load(), has_directories=storage.has_directories)
        if options.only_missing:
            plan = _without_existing(plan, storage, scanned)
        limits = Limits(options.concurrency, started + options.timeout_s, clock)
        report = _carry_out(plan, scanned, storage, manifest, limits, label)
        warnings = [manifest.warning] if manifest.warning else []
        warnings += [
            f"{path} exists in the working directory and in the trial directory; "
            "the working directory's is synced"
            for path in scanned.conflicts
        ]
        return replace(report, warnings=tuple(warnings), duration_s=clock() - started)
    finally:
        manifest.close()


def _carry_out(
    plan: Plan, scanned: Scan, storage: Storage, manifest: Manifest, limits: Limits, label: str
) -> SyncReport:
    failures: list[FileFailure] = []
    deferred: list[FileFailure] = []
    files = bytes_sent = 0
    files_same, bytes_same = plan.files_unchanged, plan.bytes_unchanged
    timed_out = False

    def fail(operation: str, path: str, error: BaseException) -> None:
        message = f"{operation} {storage.name}/{path} failed: {describe(error)}"
        failures.append(FileFailure(label, path, _kind(error), message))

    for path, error in scanned.failures:
        fail("sync to", path, error)
    for path, problem in _clear_the_way(plan, storage, manifest):
        fail("removal of", path, problem)
    if plan.uploads:
        manifest.withdraw(upload.entry.path for upload in plan.uploads)
        records: dict[str, Record] = {}
        last_recorded = limits.clock()
        for outcome in transfer(plan.uploads, storage, manifest.run_id, scanned.started_ns, limits):
            path, size = outcome.upload.entry.path, outcome.upload.entry.fingerprint.size
            if outcome.stored:
                files, bytes_sent = files + 1, bytes_sent + size
                records[path] = outcome.stored
            elif outcome.same:
                files_same, bytes_same = files_same + 1, bytes_same + size
                records[path] = outcome.same
            elif outcome.error:
                fail("upload of", path, outcome.error)
                timed_out |= isinstance(outcome.error, TimeoutError)
            else:
                message = f"{outcome.deferred}; the next sync takes it"
                deferred.append(FileFailure(label, path, "SourceChangedError", message))
            if limits.clock() - last_recorded >= _RECORD_EVERY_S:
                manifest.record(records)
                records.clear()
                last_recorded = limits.clock()
        manifest.record(records)
        if not failures:
            manifest.settle()
    return SyncReport(
        files_uploaded=files,
        bytes_uploaded=bytes_sent,
        files_unchanged=files_same,
        bytes_unchanged=bytes_same,
        failures=tuple(failures),
        deferred=tuple(deferred),
        skipped=tuple(scanned.skipped),
        timed_out=timed_out and limits.clock() >= limits.deadline,
    )


def _without_existing(plan: Plan, storage: Storage, scanned: Scan) -> Plan:
    missing = []
    for upload in plan.uploads:
        path = upload.entry.path
        try:
            if storage.exists(path):
                raise FileExistsError(_SUPERSEDED)
            missing.append(upload)
        except OSError as error:
            scanned.failures.append((path, error))
    return replace(plan, uploads=missing, removals=[])


def _clear_the_way(
    plan: Plan, storage: Storage, manifest: Manifest
) -> Iterator[tuple[str, Exception]]:
    interrupted = manifest.interrupted() if storage.has_directories else None
    if interrupted:
        run_id, paths = interrupted
        for path in paths:
            try:
                storage.discard_partial(path, run_id)
            except Exception as error:
                yield path, error
        manifest.settle()
    if not plan.removals:
        return
    # First, lest a kill leaves a claim on a file that is gone: a directory that is moved away and
    # back again brings the very same fingerprints with it.
    manifest.withdraw(plan.removals)
    removed = []
    for path in plan.removals:
        try:
            storage.remove(path)
            removed.append(path)
        except Exception as error:
            yield path, error
    manifest.forget(removed)


def _kind(error: BaseException) -> str:
    # One name for a timeout, whichever library raised it, since users look for it.
    return "TimeoutError" if isinstance(error, TimeoutError) else type(error).__name__
