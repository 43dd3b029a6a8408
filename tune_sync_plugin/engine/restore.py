"""Brings a trial's artifacts back from storage to a directory that lacks them.

The rules: what is there already stays (unless it is exactly what was sent from here, and the trial
went on with it elsewhere); nothing is written outside the directory; a file appears whole, checked
against the index or the storage's own word, or not at all; and nothing appears any more once the
time is up and training has begun.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine.checksum import checksum_of, etag_matches, hasher, is_like
from tune_sync_plugin.engine.countdown import Countdown, Progress
from tune_sync_plugin.engine.index import Entry, Index
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.pool import Health, Limits, once, run
from tune_sync_plugin.engine.scan import Fingerprint
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.verdict import Verdict, judge
from tune_sync_plugin.errors import SourceError, describe
from tune_sync_plugin.report import FileFailure, RestoreReport


class LocalFileError(SourceError):
    """A file can't be written here; trying again would not help."""


class NotStoredError(SourceError):
    """The index names a file that storage does not have; trying again would not help."""


@dataclass(frozen=True)
class RestoreOptions:
    """How to restore a directory.

    Attributes:
        concurrency: Files on their way at once.
        timeout_s: Seconds after which it stops and names what is missing.
        drivers: Tells, by their paths, the files in storage that are no artifacts: only used where
            there is no index that could.
        without_index: Whether to bring back all that is listed and is an artifact by its name, if
            there is no index.
        writer: Names the disk that this runs on, as :class:`.keeper.Indexing` does.
        others_root: The label of the directory whose files another sync sends from this disk, if
            there is one. What comes back there is that one's to record.
        others_sent: What that one has sent.
    """

    concurrency: int = 64
    timeout_s: float = 1800.0
    drivers: Callable[[str], bool] = lambda path: False
    without_index: bool = True
    writer: str = ""
    others_root: str | None = None
    others_sent: Mapping[str, Record] = field(default_factory=dict)


def restore(
    roots: Mapping[str, str],
    storage: Storage,
    manifest_path: str,
    options: RestoreOptions = RestoreOptions(),
    *,
    label: str = "",
    progress: Progress = lambda left: None,
    clock: Callable[[], float] = time.monotonic,
) -> RestoreReport:
    """Bring back what storage's index names and is not here; raises nothing but bugs.

    What was brought back is recorded in the manifest, so that the next sync does not send it again;
    what was not is recorded as somebody else's, so that no sync overwrites it.

    Args:
        roots: The local directories by their labels; ``""`` is the one for unknown labels.
        storage: Where from.
        manifest_path: The manifest that syncs of these directories use.
        options: See :class:`RestoreOptions`.
        label: Who this is for (a trial's id); repeated in the report's failures.
        progress: Told how many bytes are left.
        clock: Seconds, monotonic.

    Example:
        >>> import os, tempfile
        >>> from tune_sync_plugin.engine.local_storage import LocalStorage
        >>> from tune_sync_plugin.engine.keeper import Indexing
        >>> from tune_sync_plugin.engine.sync import sync
        >>> there = tempfile.mkdtemp()
        >>> os.mkdir(f"{there}/a"); _ = open(f"{there}/a/x", "w").write("12345")
        >>> storage = LocalStorage(f"{there}/s")
        >>> _ = sync([f"{there}/a"], storage, f"{there}/manifest", indexing=Indexing())
        >>> restore({"": f"{there}/b"}, storage, f"{there}/other").files_restored
        1
        >>> open(f"{there}/b/x").read()
        '12345'
    """
    started = clock()
    limits = Limits(options.concurrency, started + options.timeout_s, clock)
    warnings: list[str] = []
    manifest = Manifest(manifest_path, storage.name)
    try:
        try:
            found = once(
                lambda: indexes.read_or_rebuild(
                    storage, manifest.run_id, options.drivers, warnings.append
                ),
                limits,
            )
            index = found or Index()
            nobody_else = found is not None and found.writer == options.writer
            # Whoever sent files may have been killed before they were in the index.
            stored = {} if nobody_else else once(storage.files, limits)
            if not found and options.without_index:
                index = Index(indexes.from_listing(stored, options.drivers))
        except BaseException as error:
            manifest.doubt()
            message = f"reading the index of {storage.name} failed: {describe(error)}"
            failure = FileFailure(label, "", type(error).__name__, message)
            return RestoreReport(failures=(failure,), duration_s=clock() - started)
        # On the disk where the directories are, so that a finished file only has to be linked.
        staging = f"{manifest_path}.restoring-{manifest.run_id}"
        for left in glob.glob(f"{glob.escape(manifest_path)}.restoring-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a restore that was killed
        restorer = _Restorer(roots, storage, manifest, limits, label, staging, options, progress)
        report = restorer.bring_back(index, nobody_else=nobody_else)
        manifest.see(stored)
        return replace(
            report,
            from_index=found is not None,
            warnings=(*warnings, *([manifest.warning] if manifest.warning else [])),
            duration_s=clock() - started,
        )
    finally:
        manifest.close()


class _Fetch(NamedTuple):
    path: str
    entry: Entry
    record: Record | None  # what was sent from here, if anything was


@dataclass
class _Tally:
    """What has come of it so far."""

    records: dict[str, Record] = field(default_factory=dict)
    foreign: dict[str, Entry] = field(default_factory=dict)
    failures: list[FileFailure] = field(default_factory=list)
    count: int = 0
    size: int = 0
    kept: int = 0
    local: int = 0


@dataclass
class _Restorer:
    roots: Mapping[str, str]
    storage: Storage
    manifest: Manifest
    limits: Limits
    label: str
    staging: str
    options: RestoreOptions
    progress: Progress
    _over: bool = field(default=False, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def _root(self, entry: Entry) -> str:
        return self.roots.get(entry.root, self.roots[""])

    def bring_back(self, index: Index, *, nobody_else: bool) -> RestoreReport:
        """Do it; ``nobody_else`` says that nothing was sent since but from here."""
        tally = _Tally()
        fetches = self._choose(index, nobody_else, tally)
        # Small ones first: most of them are back, whatever happens to the rest.
        fetches.sort(key=lambda fetch: (fetch.entry.size or 0, fetch.path))
        countdown = Countdown(sum(fetch.entry.size or 0 for fetch in fetches), self.progress)

        def bring(fetch: _Fetch, health: Health) -> Record | Verdict:
            with countdown.file(fetch.entry.size or 0) as arrived:
                return self._fetch(fetch, health, arrived)

        try:
            for fetch, result in run(fetches, bring, self.limits):
                self._take(fetch, result, tally)
        finally:
            with self._lock:
                self._over = True
            shutil.rmtree(self.staging, ignore_errors=True)
        self.manifest.disown(tally.foreign)
        self.manifest.record(tally.records)
        self.manifest.index_read(index)
        return RestoreReport(
            tally.count, tally.size, tally.kept, tally.local, tuple(tally.failures)
        )

    def _choose(self, index: Index, nobody_else: bool, tally: _Tally) -> list[_Fetch]:
        known = self.manifest.load()
        fetches = []
        for path, entry in index.entries.items():
            others = entry.root == self.options.others_root
            fetch = _Fetch(path, entry, (self.options.others_sent if others else known).get(path))
            try:
                verdict = judge(path, self._root(entry), fetch.record, nobody_else=nobody_else)
            except OSError as error:
                tally.foreign[path] = entry
                tally.failures.append(self._failure(fetch, error))
                continue
            if verdict is Verdict.REFUSED:
                message = f"{self.storage.name} names {path!r}, which is no place in a directory"
                tally.failures.append(FileFailure(self.label, path, "ValueError", message))
            elif verdict in (Verdict.LOCAL, Verdict.KEPT):
                self._take(fetch, verdict, tally)
            else:
                replaces = verdict is Verdict.SENT
                fetches.append(fetch if replaces else fetch._replace(record=None))
        return fetches

    def _take(self, fetch: _Fetch, result: object, tally: _Tally) -> None:
        if isinstance(result, Record):
            tally.count, tally.size = tally.count + 1, tally.size + result.fingerprint.size
            if result.root == self.options.others_root:
                tally.foreign[fetch.path] = Entry(root=result.root)
            else:
                tally.records[fetch.path] = result
        elif result is Verdict.KEPT:
            tally.kept += 1
        elif result is Verdict.LOCAL:
            tally.local += 1
            tally.foreign[fetch.path] = fetch.entry
        elif isinstance(result, BaseException):
            tally.foreign[fetch.path] = fetch.entry
            tally.failures.append(self._failure(fetch, result))

    def _failure(self, fetch: _Fetch, error: BaseException) -> FileFailure:
        message = f"restoring {self.storage.name}/{fetch.path} failed: {describe(error)}"
        return FileFailure(self.label, fetch.path, type(error).__name__, message)

    def _fetch(
        self, fetch: _Fetch, health: Health, arrived: Callable[[int], None]
    ) -> Record | Verdict:
        """Bring one file back, unless what is here turns out to be it, or not to be replaced."""
        staged = os.path.join(self.staging, f"{threading.get_ident()}")
        record = fetch.record
        if self._over:
            raise TimeoutError("given up")
        if record:
            found = self.storage.stat(fetch.path)
            health.succeeded()
            if found is None:
                return Verdict.LOCAL
            same = found.etag and found.etag == record.etag
            same = same or etag_matches(record.checksum, found.etag)
            if found.size == record.size and same:
                return Verdict.KEPT
        try:
            with _locally(self.staging):
                os.makedirs(self.staging, exist_ok=True)
            checksum = self._download(fetch, staged, arrived)
            health.succeeded()
            if record and self._equals(staged, checksum, record.checksum):
                return Verdict.KEPT
            return self._publish(fetch, staged, checksum)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(staged)

    def _download(self, fetch: _Fetch, staged: str, arrived: Callable[[int], None]) -> str:
        path, entry = fetch.path, fetch.entry
        checksum, size = hasher(entry.checksum), 0
        with _locally(staged):
            out = open(staged, "wb", buffering=0)  # noqa: SIM115 - closed below
        with out:
            for chunk in self._read(path):
                if self._over:
                    raise TimeoutError("given up")
                checksum.update(chunk)
                size += len(chunk)
                with _locally(staged):
                    view = memoryview(chunk)
                    while view:
                        view = view[out.write(view) :]
                arrived(len(chunk))
        text = checksum.text()
        if size == entry.size and entry.checksum and self._equals(staged, text, entry.checksum):
            return text
        # Newer than the index, which is not written with every upload: let storage vouch for it.
        stat = self.storage.stat(path)
        right = stat is not None and stat.size == size
        vouched = etag_matches(text, stat.etag) if stat else None
        if right and (vouched is False or (vouched is None and entry.checksum)):
            # Something contradicts: an encrypted object's ETag is no checksum, and the index may
            # lag. But the same bytes twice are no accident.
            right = checksum_of(self._read(path), like=text) == text
        if not right:
            raise OSError(f"{size} bytes arrived, which are not what storage says it has")
        return text

    def _read(self, path: str) -> Iterator[bytes]:
        try:
            yield from self.storage.read(path)
        except FileNotFoundError as error:
            raise NotStoredError("the index names it, but storage does not have it") from error

    @staticmethod
    def _equals(staged: str, text: str, wanted: str) -> bool:
        if is_like(text, wanted):
            return text == wanted
        with open(staged, "rb") as file:
            return checksum_of(iter(lambda: file.read(1 << 20), b""), like=wanted) == wanted

    def _publish(self, fetch: _Fetch, staged: str, checksum: str) -> Record | Verdict:
        root = self._root(fetch.entry)
        target = os.path.join(root, fetch.path)
        with self._lock:
            if self._over:
                raise TimeoutError("given up")
            with _locally(target):
                os.makedirs(os.path.dirname(target), exist_ok=True)
                try:
                    if fetch.record is None:
                        _link(staged, target)
                    elif Fingerprint.of(os.stat(target)) == fetch.record.fingerprint:
                        os.replace(staged, target)
                    else:
                        return Verdict.LOCAL
                except FileExistsError:
                    return Verdict.LOCAL
            # Always racy: whoever opens it next may write to it within the same clock tick.
            facts = Fingerprint.of(os.stat(target))
        return Record(facts, checksum, racy=True, root=fetch.entry.root)


@contextlib.contextmanager
def _locally(path: str) -> Iterator[None]:
    """Keeps a local disk's error from being taken for the storage's."""
    try:
        yield
    except OSError as error:
        raise LocalFileError(f"writing {path}: {error}") from error


def _link(staged: str, target: str) -> None:
    """Give a file its name, unless somebody else has it; without the moment of a half one."""
    try:
        os.link(staged, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        os.rename(staged, target)
    else:
        os.unlink(staged)
