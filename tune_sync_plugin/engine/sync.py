"""One sync of one directory: scan -> plan -> transfer -> manifest -> index -> report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.index import INDEX, Entry, is_ours
from tune_sync_plugin.engine.keeper import Indexing, IndexKeeper
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Plan, Reason, Record, Upload, make_plan
from tune_sync_plugin.engine.pool import Limits, once, run
from tune_sync_plugin.engine.scan import Scan, scan
from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import Storage, holds
from tune_sync_plugin.engine.transfer import Outcome, Transfer, is_as_sent
from tune_sync_plugin.errors import describe
from tune_sync_plugin.report import FileFailure, SyncReport

# So often a long sync writes the index, so that a killed one's files can be found.
_INDEX_EVERY_S = 10.0
# What is kept for that at the end, or a tenth of what there is.
_INDEX_S = 5.0
# So many failures of one sync are named; the rest are counted.
_MOST_FAILURES = 1000
# Records are written at least this often, so a killed sync repeats at most so much work.
_RECORD_EVERY_S = 0.2

_TAKEN = "Ray or the driver keeps a file of this name there; rename yours"
_OURS = "the name is that of our own book-keeping in storage; rename yours"
_TWICE = "the working directory and the trial directory both have it; only the first one's is sent"
_SUPERSEDED = "storage has another, from where the trial went on; this one is kept back"


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
        read_back: Whether to read each upload back and compare contents, where storage offers no
            checksum of its own.
        overlaid: Whether several directories may have the same path, which is no failure then.
    """

    keep: Filter = Filter()
    follow_symlinks: bool = False
    concurrency: int = 64
    timeout_s: float = 1800.0
    only_missing: bool = False
    read_back: bool = False
    overlaid: bool = False


def sync(
    roots: Sequence[str],
    storage: Storage,
    manifest_path: str,
    options: SyncOptions = SyncOptions(),
    *,
    label: str = "",
    taken: Callable[[str], bool] = lambda path: False,
    occupied: Collection[str] = frozenset(),
    indexing: Indexing | None = None,
    labels: Mapping[str, str] = MappingProxyType({}),
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
        occupied: Paths for which ``taken`` may have changed since they were synced.
        indexing: How to keep the index in storage that a restore needs; default: there is none.
        labels: Names of roots, which the index notes for their files.
        clock: Seconds, monotonic.

    Example:
        >>> import os, tempfile
        >>> from tune_sync_plugin.engine.local_storage import LocalStorage
        >>> there = tempfile.mkdtemp()
        >>> os.mkdir(f"{there}/a"); _ = open(f"{there}/a/x", "w").write("12345")
        >>> report = sync([f"{there}/a"], LocalStorage(f"{there}/b"), f"{there}/manifest")
        >>> report.files_uploaded, report.bytes_uploaded, os.listdir(f"{there}/b")
        (1, 5, ['x'])
        >>> sync([f"{there}/a"], LocalStorage(f"{there}/b"), f"{there}/manifest").files_uploaded
        0
    """
    started = clock()
    limits = Limits(options.concurrency, started + options.timeout_s, clock)
    # Not made before there is something to record: its being there says that files have been here.
    manifest = Manifest(manifest_path, storage.name) if os.path.exists(manifest_path) else None
    try:
        known = manifest.take_settled() if manifest else set()
        if occupied:
            known = {state for state in known if state[0] not in occupied}
        scanned = scan(
            roots,
            options.keep,
            follow_symlinks=options.follow_symlinks,
            labels=labels,
            known=known,
        )
        del known
        _leave_out(scanned, taken)
        if not options.overlaid:
            scanned.failures += [(path, FileExistsError(_TWICE)) for path in scanned.conflicts]
        if manifest is None:
            if scanned.is_empty and not (indexing and indexing.also):
                return SyncReport(duration_s=clock() - started)
            manifest = Manifest(manifest_path, storage.name)
        keeper = IndexKeeper(indexing, storage, manifest, limits) if indexing else None
        plan = _plan(scanned, storage, manifest, keeper, limits)
        if options.only_missing:
            plan = _without_existing(plan, storage, scanned, limits)
        transfer = Transfer(
            storage,
            manifest.run_id,
            scanned.started_ns,
            options.read_back,
            shared=indexing is not None and indexing.shared,
        )
        if keeper:
            # Files that fail till the end must leave time to write down those that arrived.
            spare_s = min(_INDEX_S, options.timeout_s / 10)
            limits = replace(limits, deadline=limits.deadline - spare_s)
        report = _Sync(storage, manifest, keeper, limits, label).carry_out(plan, scanned, transfer)
        warnings = [manifest.warning] if manifest.warning else []
        warnings += keeper.warnings if keeper else []
        warnings += [transfer.unchecked] if transfer.unchecked else []
        return replace(report, warnings=(*report.warnings, *warnings), duration_s=clock() - started)
    finally:
        if manifest:
            manifest.close()


def _leave_out(scanned: Scan, taken: Callable[[str], bool]) -> None:
    for path in [path for path in scanned.files if taken(path) or is_ours(path)]:
        del scanned.files[path]
        problem = FileExistsError(_OURS if is_ours(path) else _TAKEN)
        scanned.failures.append((path, problem))


def _plan(
    scanned: Scan,
    storage: Storage,
    manifest: Manifest,
    keeper: IndexKeeper | None,
    limits: Limits,
) -> Plan:
    files = scanned.files
    known = manifest.records(files)
    unrecorded: dict[str, Reason] = {}
    unknown = [p for p in files if p not in known or known[p].size < 0]
    if unknown:
        unrecorded = keeper.meet(unknown) if keeper else {}
        if manifest.damaged:
            unrecorded = _of_equal_size(scanned, storage, limits) | unrecorded
    gone: set[str] = set()
    if files and storage.has_directories:
        gone = manifest.paths() - scanned.unchanged - files.keys()
    plan = make_plan(files, known, unrecorded, gone=gone, scanned_ns=scanned.started_ns)
    return replace(
        plan,
        files_unchanged=plan.files_unchanged + len(scanned.unchanged),
        bytes_unchanged=plan.bytes_unchanged + scanned.bytes_unchanged,
    )


def _of_equal_size(scanned: Scan, storage: Storage, limits: Limits) -> dict[str, Reason]:
    try:
        stored = once(storage.files, limits)
    except BaseException:
        return {}  # then everything is sent again
    return {
        path: Reason.UNRECORDED
        for path, entry in scanned.files.items()
        if stored.get(path) == entry.fingerprint.size
    }


@dataclass
class _Sync:
    """What one sync has done so far."""

    storage: Storage
    manifest: Manifest
    keeper: IndexKeeper | None
    limits: Limits
    label: str
    failures: list[FileFailure] = field(default_factory=list)
    deferred: list[FileFailure] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)
    aside: dict[str, Entry] = field(default_factory=dict)
    files: int = 0
    bytes_sent: int = 0
    files_same: int = 0
    bytes_same: int = 0
    timed_out: bool = False
    _failed: int = 0

    def carry_out(self, plan: Plan, scanned: Scan, transfer: Transfer) -> SyncReport:
        self.files_same, self.bytes_same = plan.files_unchanged, plan.bytes_unchanged
        for path, error in scanned.failures:
            self._fail("sync to", path, error)
        for path, problem in _clear_the_way(plan, self.storage, self.manifest):
            self._fail("removal of", path, problem)
        if plan.uploads:
            unwritten = self.keeper.claim() if self.keeper else None
            if unwritten:
                self._fail("writing of the index", INDEX, unwritten)
            self._upload(plan, transfer)
        if self.keeper and (self.files or not self.failures):
            unwritten = self.keeper.keep(forced=self.keeper.indexing.forced)
            if unwritten:
                self._fail("writing of the index", INDEX, unwritten)
                # It may still arrive, and must not do so after a later one.
                self.timed_out |= isinstance(unwritten, TimeoutError)
        if self._failed > _MOST_FAILURES:
            more = f"{self._failed - _MOST_FAILURES} more files were not synced"
            self.failures.append(FileFailure(self.label, "", "SyncError", more))
        files_stored, bytes_stored = self.manifest.stored()
        warnings = []
        if self.aside:
            warnings.append(
                f"{self.storage.name} had {len(self.aside)} files of the same names that were not "
                f"sent from here; they were kept, such as {next(iter(self.aside))}"
            )
        return SyncReport(
            files_uploaded=self.files,
            bytes_uploaded=self.bytes_sent,
            files_unchanged=self.files_same,
            bytes_unchanged=self.bytes_same,
            failures=tuple(self.failures),
            deferred=tuple(self.deferred),
            files_stored=files_stored,
            bytes_stored=bytes_stored,
            skipped=tuple(scanned.skipped),
            warnings=tuple(warnings),
            timed_out=self.timed_out and self.limits.clock() >= self.limits.deadline,
        )

    def _upload(self, plan: Plan, transfer: Transfer) -> None:
        self.manifest.withdraw(upload.entry.path for upload in plan.uploads)
        recorded = indexed = self.limits.clock()
        for outcome in transfer(plan.uploads, self.limits):
            self._take(outcome)
            now = self.limits.clock()
            if now - recorded >= _RECORD_EVERY_S:
                self._record()
                recorded = now
            if self.keeper and now - indexed >= _INDEX_EVERY_S:
                self._record()
                self.keeper.keep(forced=False)  # if it fails, the last one will tell
                indexed = self.limits.clock()
        self._record()
        if not self.failures:
            self.manifest.settle()

    def _take(self, outcome: Outcome) -> None:
        path, size = outcome.upload.entry.path, outcome.upload.entry.fingerprint.size
        if outcome.stored:
            self.files, self.bytes_sent = self.files + 1, self.bytes_sent + outcome.bytes_sent
            self.records[path] = outcome.stored
        elif outcome.same:
            self.files_same, self.bytes_same = self.files_same + 1, self.bytes_same + size
            self.records[path] = outcome.same
        elif outcome.error:
            self._fail("upload of", path, outcome.error)
            self.timed_out |= isinstance(outcome.error, TimeoutError)
        else:
            message = f"{outcome.deferred}; the next sync takes it"
            self.deferred.append(FileFailure(self.label, path, "SourceChangedError", message))
        if outcome.set_aside:
            name, stat = outcome.set_aside
            self.aside[name] = Entry(stat.size, root=outcome.upload.entry.root)

    def _record(self) -> None:
        self.manifest.record(self.records)
        self.records.clear()
        if self.aside and self.keeper:
            self.manifest.meet(self.aside)

    def _fail(self, operation: str, path: str, error: BaseException) -> None:
        self._failed += 1
        if self._failed > _MOST_FAILURES:
            return  # a report travels, and stays in the driver's memory
        message = f"{operation} {self.storage.name}/{path} failed: {describe(error)}"
        self.failures.append(FileFailure(self.label, path, _kind(error), message))


def _without_existing(plan: Plan, storage: Storage, scanned: Scan, limits: Limits) -> Plan:
    missing, same = [], []
    for upload, found in run(plan.uploads, lambda u, _: _compare(u, storage), limits):
        if found is None:
            missing.append(upload)
        elif found is True:
            same.append(upload.entry.fingerprint.size)
        else:
            error = found if isinstance(found, BaseException) else FileExistsError(_SUPERSEDED)
            scanned.failures.append((upload.entry.path, error))
    return replace(
        plan,
        uploads=missing,
        removals=[],
        files_unchanged=plan.files_unchanged + len(same),
        bytes_unchanged=plan.bytes_unchanged + sum(same),
    )


def _compare(upload: Upload, storage: Storage) -> bool | None:
    """Whether storage has what is here; ``None`` if it has nothing."""
    found = storage.stat(upload.entry.path)
    if not found:
        return None
    with Source(upload.entry, etags=storage.has_checksums) as source:
        if upload.reason is Reason.UNPROVEN and is_as_sent(source, upload.sent):
            return True  # it was sent; what is there now is newer, and this no loss
        return holds(storage, upload.entry.path, found, source.size, source.compute_checksum())


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
