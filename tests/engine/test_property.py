"""Random histories of a directory, with syncs that are killed and writers that get in between.

After every sync the destination and the manifest are held against the files themselves, which are
read by plain ``os.walk`` and ``open``: nothing of the engine decides what is expected.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.engine.fakes import Counting, Killing, ObjectStorage, Watched, tree
from tune_sync_plugin.engine import sync as sync_module
from tune_sync_plugin.engine import transfer as transfer_module
from tune_sync_plugin.engine.checksum import checksum_of
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.scan import Fingerprint
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.report import SyncReport

NAMES = [
    *("a", "b", "c", "d"),
    *("two words", " lead", "trail ", ".hidden", "...", "#x", "q?", "%41", "100%", "a+b&c=d"),
    *("new\nline", "tab\t", "back\\slash", "quo\"t'e", "*[x]", "a::b", "~", "x.gz"),
    *("ü✓", "u\u0308"),
    *("n" * 250, "é" * 125),
]
# Half of the paths collide, half are odd.
_name = st.one_of(st.sampled_from(NAMES[:4]), st.sampled_from(NAMES))
paths = st.lists(_name, min_size=1, max_size=3).map("/".join)
contents = st.binary(max_size=12)
indexes = st.integers(0, 10**6)


class Meddling(NamedTuple):
    """What a writer does during a sync, to which file or directories."""

    what: str
    index: int
    other: int


meddlings = st.builds(
    Meddling,
    st.sampled_from(["rewrite", "replace", "append", "truncate", "delete", "swap", "swap"]),
    indexes,
    indexes,
)


@contextlib.contextmanager
def sources_opened() -> Iterator[list[str]]:
    """Every local file that the engine opens for reading."""
    opened: list[str] = []

    class Noted(transfer_module.Source):
        def __init__(self, entry: object, **options: bool) -> None:
            opened.append(entry.path)  # type: ignore[attr-defined]
            super().__init__(entry, **options)  # type: ignore[arg-type]

    with mock.patch.object(transfer_module, "Source", Noted):
        yield opened


def in_the_way(path: str, others: set[str]) -> bool:
    """Whether a file here and the files there can't be in one directory tree."""
    return any(o.startswith(path + "/") or path.startswith(o + "/") for o in others)


class History(RuleBasedStateMachine):
    """What training code may do to its directory, and what the engine promises about it."""

    def __init__(self) -> None:
        super().__init__()
        # In memory where that is possible: each sync of a manifest to a disk takes milliseconds.
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.base = Path(tempfile.mkdtemp(prefix="tune_sync_history-", dir=shm))
        self.root = self.base / "trial"
        self.root.mkdir()
        self.manifest = str(self.base / "manifest" / "m.sqlite")

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    @property
    def storage(self) -> Storage:
        """A new one for each sync, as each Ray task has its own."""
        storage = LocalStorage(str(self.base / "storage"))
        storage.append_from = 3  # what is here is short
        return storage

    def destination(self) -> dict[str, bytes]:
        """What storage holds, half-written files included."""
        return tree(self.base / "storage")

    # -- what the training code does -------------------------------------------------------------

    def files(self) -> list[str]:
        return sorted(tree(self.root))

    def some_file(self, index: int) -> Path | None:
        files = self.files()
        return self.root / files[index % len(files)] if files else None

    def some_directory(self, index: int) -> Path | None:
        found = sorted(Path(d) for d, _, _ in os.walk(self.root) if d != str(self.root))
        return found[index % len(found)] if found else None

    @initialize(entries=st.dictionaries(paths, contents, max_size=4))
    def begin(self, entries: dict[str, bytes]) -> None:
        for path, content in entries.items():
            self.write(path, content)

    @rule(path=paths, content=contents)
    def write(self, path: str, content: bytes) -> None:
        """Create a file, or rewrite it in place."""
        target = self.root / path
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    @rule(index=indexes, more=st.binary(min_size=1, max_size=5))
    def append(self, index: int, more: bytes) -> None:
        if file := self.some_file(index):
            with file.open("ab") as out:
                out.write(more)

    @rule(index=indexes, restore_mtime=st.booleans(), by_rename=st.booleans())
    def rewrite_same_size(self, index: int, restore_mtime: bool, by_rename: bool) -> None:
        if file := self.some_file(index):
            before = file.stat()
            content = bytes(byte ^ 1 for byte in file.read_bytes())
            target = self.base / "new" if by_rename else file
            # Not write_bytes, which truncates first: this is how a counter is updated in place.
            with open(target, "wb" if by_rename else "r+b") as out:
                out.write(content)
            if restore_mtime:
                os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
            target.replace(file)

    @rule(index=indexes, size=st.integers(0, 6))
    def truncate(self, index: int, size: int) -> None:
        if file := self.some_file(index):
            os.truncate(file, min(size, file.stat().st_size))

    @rule(index=indexes, path=paths)
    def rename_file(self, index: int, path: str) -> None:
        file, target = self.some_file(index), self.root / path
        if file:
            with contextlib.suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)

    @rule(index=indexes, other=indexes)
    def swap_directories(self, index: int, other: int) -> None:
        one, two = self.some_directory(index), self.some_directory(other)
        if one and two and one not in (two, *two.parents) and two not in one.parents:
            one.rename(self.base / "aside")
            two.rename(one)
            (self.base / "aside").rename(two)

    @rule(index=indexes, path=paths)
    def rename_directory(self, index: int, path: str) -> None:
        directory, target = self.some_directory(index), self.root / path
        if directory and not target.exists():
            with contextlib.suppress(OSError):
                directory.rename(target)

    @rule(index=indexes)
    def delete(self, index: int) -> None:
        if file := self.some_file(index):
            file.unlink()

    @rule(index=indexes, name=_name, content=contents)
    def file_becomes_directory(self, index: int, name: str, content: bytes) -> None:
        if file := self.some_file(index):
            file.unlink()
            file.mkdir()
            (file / name).write_bytes(content)

    @rule(index=indexes, content=contents)
    def directory_becomes_file(self, index: int, content: bytes) -> None:
        if directory := self.some_directory(index):
            shutil.rmtree(directory)
            directory.write_bytes(content)

    @rule(index=indexes)
    def directory_is_hidden_and_comes_back_after_a_sync(self, index: int) -> None:
        """The files' fingerprints survive this; what storage holds of them may not."""
        if directory := self.some_directory(index):
            directory.rename(self.base / "aside")
            directory.write_bytes(b"in the way")
            self.sync_is_killed(index % 12, 1)
            directory.unlink()
            (self.base / "aside").rename(directory)

    # -- syncs -----------------------------------------------------------------------------------

    def run(self, storage: Storage, concurrency: int = 4) -> SyncReport:
        options = SyncOptions(concurrency=concurrency, timeout_s=10)
        return sync([str(self.root)], storage, self.manifest, options)

    @rule()
    def sync_in_peace(self) -> None:
        source, before = tree(self.root), self.destination()
        report = self.run(self.storage)
        assert report.complete, report.failures
        after = self.destination()
        assert {path: after.get(path) for path in source} == source
        assert not [path for path in after if path.endswith(".part")]
        assert report.files_uploaded + report.files_unchanged == len(source)
        self.check_only_removed_what_was_in_the_way(before, after, source)
        self.check_manifest()
        self.check_unchanged_costs_nothing()

    def check_unchanged_costs_nothing(self) -> None:
        counting = Counting(self.storage)
        records = self.records()
        with sources_opened() as opened:
            report = self.run(counting)
        assert report.complete
        assert counting.requests == 0
        assert {path for path in opened if not records[path].racy} == set()

    @rule(countdown=st.integers(1, 25), concurrency=st.sampled_from([1, 3]))
    def sync_is_killed(self, countdown: int, concurrency: int) -> None:
        source, before = tree(self.root), self.destination()
        child = os.fork()
        if child == 0:
            self.run_and_be_killed(countdown, concurrency)
        os.waitpid(child, 0)
        after = self.destination()
        for path, content in after.items():
            if not path.endswith(".part"):
                whole = content in (before.get(path), source.get(path))
                assert whole or self.is_on_its_way(before.get(path), content, source.get(path)), (
                    f"half a file: {path}"
                )
        self.check_only_removed_what_was_in_the_way(before, after, source)
        self.check_manifest()

    def is_on_its_way(self, before: bytes | None, now: bytes, after: bytes | None) -> bool:
        """Whether it is what a directory may show of an append: more than before, less than all."""
        known = before is not None and after is not None
        return known and now.startswith(before) and after.startswith(now)

    def run_and_be_killed(self, countdown: int, concurrency: int) -> None:
        try:
            killing = Killing(self.storage, countdown)
            sync_module._RECORD_EVERY_S = 0.0
            for method in ("withdraw", "record", "forget"):
                setattr(Manifest, method, killing.wrap(getattr(Manifest, method)))
            self.run(killing, concurrency)
        finally:
            os._exit(0)

    @rule(at=st.integers(0, 8), meddlings=st.lists(meddlings, min_size=1, max_size=3))
    def sync_beside_a_writer(self, at: int, meddlings: list[Meddling]) -> None:
        """Any promise about this sync is off, but the next ones must make up for it."""
        moments = iter(range(10**9))
        swapped: list[Meddling] = []

        def meddle(moment: str, path: str) -> None:
            if 0 <= (now := next(moments) - at) < len(meddlings):
                self.meddle(meddlings[now])
                swapped.extend(m for m in [meddlings[now]] if m.what == "swap")

        self.run(Watched(self.storage, meddle), concurrency=1)
        for meddling in reversed(swapped):
            self.meddle(meddling)
        self.check_manifest()

    def meddle(self, meddling: Meddling) -> None:
        what, index, other = meddling
        if what == "rewrite":
            self.rewrite_same_size(index, restore_mtime=other % 2 == 0, by_rename=other % 3 == 0)
        elif what == "replace" and (file := self.some_file(index)):
            (self.base / "new").write_bytes(b"a whole new file")
            (self.base / "new").replace(file)
        elif what == "append":
            self.append(index, b"more")
        elif what == "truncate":
            self.truncate(index, other % 4)
        elif what == "delete":
            self.delete(index)
        elif what == "swap":
            self.swap_directories(index, other)

    # -- what must hold --------------------------------------------------------------------------

    def records(self) -> dict[str, Record]:
        manifest = Manifest(self.manifest, self.storage.name)
        assert manifest.warning is None
        records = manifest.load()
        manifest.close()
        return records

    def check_manifest(self) -> None:
        """A record that matches the local file must be true of what storage holds."""
        source, destination = tree(self.root), self.destination()
        for path, record in self.records().items():
            if path not in source or record.fingerprint.size < 0:
                continue
            if record.fingerprint != Fingerprint.of(os.stat(self.root / path)):
                continue
            same = checksum_of([source[path]], like=record.checksum) == record.checksum
            if record.rolling:
                assert same == (checksum_of([source[path]], like=record.rolling) == record.rolling)
            if not record.racy or same:
                assert destination.get(path) == source[path], f"{path}: {record}"

    def check_only_removed_what_was_in_the_way(
        self, before: dict[str, bytes], after: dict[str, bytes], source: dict[str, bytes]
    ) -> None:
        for path, content in before.items():
            if path in source or path.endswith(".part"):
                continue
            if path not in after:
                assert self.storage.has_directories
                assert in_the_way(path, set(source)), f"{path} was removed without need"
            else:
                assert after[path] == content


class ObjectHistory(History):
    """The same on a store where ``a`` and ``a/b`` do not exclude each other."""

    @property
    def storage(self) -> ObjectStorage:
        return ObjectStorage(self.base / "storage")

    def destination(self) -> dict[str, bytes]:
        return self.storage.contents()

    def is_on_its_way(self, before: bytes | None, now: bytes, after: bytes | None) -> bool:
        return False


class CoarseHistory(History):
    """The same on a file system that knows the time only to the second, as ext3 and HFS+ do.

    Everything here happens within a second or so, hence times prove nothing at all.
    """

    def __init__(self) -> None:
        super().__init__()
        exact = Fingerprint.of

        def coarse(status: os.stat_result) -> Fingerprint:
            size, mtime_ns, ctime_ns, inode = exact(status)
            return Fingerprint(size, mtime_ns // 10**9 * 10**9, ctime_ns // 10**9 * 10**9, inode)

        self._patch = mock.patch.object(Fingerprint, "of", staticmethod(coarse))
        self._patch.start()

    def teardown(self) -> None:
        self._patch.stop()
        super().teardown()


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        derandomize=False,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


TestLocal = History.TestCase
TestLocal.settings = _settings(100)
TestObjects = ObjectHistory.TestCase
TestObjects.settings = _settings(30)
TestCoarseClock = CoarseHistory.TestCase
TestCoarseClock.settings = _settings(50)
