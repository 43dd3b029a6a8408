"""Artifacts come back whole or not at all, nothing of anybody's is lost, and nothing leaves the
directory."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.fakes import Around, Failing, Killing, ObjectStorage, tree
from tests.engine.support import Disk, fill
from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine import pool
from tune_sync_plugin.engine import restore as restore_module
from tune_sync_plugin.engine.index import INDEX, Entry, Index
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.restore import RestoreOptions, restore
from tune_sync_plugin.engine.scan import Fingerprint
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import Stat, Storage
from tune_sync_plugin.engine.verdict import Verdict, is_inside, judge

FILES = {"log.txt": b"line 1\n", "d/e/model.pt": b"weights" * 999, "empty": b"", "ü #?%\n": b"odd"}


@pytest.fixture(params=["directory", "objects"])
def one(request: pytest.FixtureRequest, root: Path, manifest: Path) -> Disk:
    """The first node's disk; storage has checksums of its own, or has not."""
    inner: Storage = (
        LocalStorage(str(root.parent / "storage"))
        if request.param == "directory"
        else ObjectStorage(root.parent / "objects")
    )
    return Disk(root, manifest, inner)


@pytest.fixture
def plain(root: Path, manifest: Path) -> Disk:
    """The first node's disk, where storage is a directory."""
    return Disk(root, manifest, LocalStorage(str(root.parent / "storage")))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept between attempts."""
    slept: list[float] = []
    monkeypatch.setattr(pool.time, "sleep", slept.append)
    return slept


def stored(disk: Disk) -> dict[str, bytes]:
    """What storage holds, our own index left out."""
    inner = disk.inner
    found = (
        inner.contents()
        if isinstance(inner, ObjectStorage)
        else tree(disk.root.parent / "storage")
        if (disk.root.parent / "storage").exists()
        else tree(disk.root.parent.parent / "storage")
    )
    return {path: content for path, content in found.items() if not indexes.is_ours(path)}


def put(storage: Storage, files: dict[str, bytes]) -> None:
    """Store files that no index names."""
    for path, content in files.items():
        storage.write(path, Memory(content), "run")


# -- the decision, row by row --------------------------------------------------------------------

SENT = Record(Fingerprint(1, 1, 1, 1), "0" * 32)


@pytest.mark.parametrize("nobody_else", [True, False])
@pytest.mark.parametrize("record", [None, SENT])
def test_judge(root: Path, record: Record | None, nobody_else: bool) -> None:
    fill(root, {"here": b"1", "file": b""})
    (root / "dangling").symlink_to("nowhere")
    (root / "out").symlink_to(root.parent)
    (root / "in").symlink_to(root)

    def verdict(path: str) -> Verdict:
        return judge(path, str(root), record, nobody_else=nobody_else)

    for path in ("gone", "d/gone", "file/below", "in/gone"):
        assert verdict(path) is Verdict.MISSING
    known = Verdict.KEPT if nobody_else else Verdict.SENT
    for path in ("here", "dangling", "in/here", "out"):
        assert verdict(path) is (known if record else Verdict.LOCAL)
    for path in ("out/x", "../x", ".tune_sync/index.json"):
        assert verdict(path) is Verdict.REFUSED


# -- what comes back -----------------------------------------------------------------------------


def test_everything_comes_back_and_is_not_sent_again(one: Disk) -> None:
    fill(one.root, FILES)
    one.sync()
    two = one.beside("node-2")
    report = two.restore()
    assert tree(two.root) == FILES
    assert (report.files_restored, report.bytes_restored) == (4, sum(map(len, FILES.values())))
    assert (report.failures, report.warnings, report.from_index) == ((), (), True)
    assert two.storage.kinds() == {"files": 1, "read": 5}, "the index, and each file once"
    again = two.sync(forced=True)
    assert (again.files_uploaded, again.files_unchanged, again.warnings) == (0, 4, ())
    assert set(two.storage.writes) <= {INDEX}
    two.settle()
    two.sync(forced=True)  # what was compared goes into the index once more
    two.sync(forced=True)
    assert two.storage.requests == 0
    # Nothing of ours is left on the disk beside the manifest.
    assert {path.name for path in two.manifest.parent.iterdir()} <= {
        *("m.sqlite", "m.sqlite-wal", "m.sqlite-shm")
    }


def test_only_what_the_index_names(one: Disk) -> None:
    fill(one.root, {"a": b"1"})
    one.sync()
    put(one.inner, {"result.json": b"{}", "checkpoint_1/x": b"c"})
    two = one.beside("node-2")
    two.restore()
    assert tree(two.root) == {"a": b"1"}


def test_without_an_index_what_is_listed_and_not_the_drivers(one: Disk) -> None:
    put(one.inner, FILES | {"result.json": b"{}", "checkpoint_1/x": b"c"})
    two = one.beside("node-2")

    def drivers(path: str) -> bool:
        return path.startswith(("result", "checkpoint_"))

    report = two.restore(drivers=drivers)
    assert tree(two.root) == FILES
    assert (report.files_restored, report.from_index) == (4, False)
    assert two.sync(drivers=drivers).files_uploaded == 0


def test_from_nothing_comes_nothing(one: Disk) -> None:
    report = one.restore()
    assert (report.files_restored, report.failures, tree(one.root)) == (0, (), {})


def test_each_file_goes_where_it_came_from(plain: Disk) -> None:
    indexes.write(
        plain.inner,
        Index({"a": Entry(1), "b": Entry(1, root="trial_dir"), "c": Entry(1, root="unknown")}),
        "run",
    )
    put(plain.inner, {"a": b"1", "b": b"2", "c": b"3"})
    other = plain.root.parent / "other"
    assert plain.restore(roots={"trial_dir": str(other)}).files_restored == 3
    assert (tree(plain.root), tree(other)) == ({"a": b"1", "c": b"3"}, {"b": b"2"})


def test_local_files_win_and_the_stored_ones_are_kept(one: Disk) -> None:
    fill(one.root, {"a": b"theirs", "b": b"equal", "c": b"c"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"mine", "b": b"equal"})
    report = two.restore()
    assert (report.files_local, report.files_restored) == (2, 1)
    assert tree(two.root) == {"a": b"mine", "b": b"equal", "c": b"c"}
    after = two.sync()
    assert (after.files_uploaded, after.files_unchanged) == (1, 2)
    assert "not sent from here; they were kept, such as a.before-1" in after.warnings[0]
    assert stored(one) == {"a": b"mine", "a.before-1": b"theirs", "b": b"equal", "c": b"c"}
    assert "a.before-1" in two.index().entries, "so that it is brought back as well"


def test_what_appears_meanwhile_wins(one: Disk) -> None:
    fill(one.root, {"a": b"theirs"})
    one.sync()
    two = one.beside("node-2")

    class Meddling(Around):
        def read(self, path: str) -> Iterator[bytes]:
            yield from super().read(path)
            if path == "a":
                fill(two.root, {"a": b"mine"})

    report = two.restore(Meddling(one.inner))
    assert (report.files_restored, report.files_local) == (0, 1)
    assert tree(two.root) == {"a": b"mine"}
    two.sync()
    assert stored(one) == {"a": b"mine", "a.before-1": b"theirs"}


# -- from A to B and back ------------------------------------------------------------------------


def test_there_and_back_again(one: Disk) -> None:
    fill(one.root, {"log": b"1\n", "still": b"the same"})
    one.sync()
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"log": b"1\n2\n", "new": b"n"})
    two.sync()
    report = one.restore()
    assert tree(one.root) == {"log": b"1\n2\n", "still": b"the same", "new": b"n"}
    assert (report.files_restored, report.files_kept, report.failures) == (2, 1, ())
    fill(one.root, {"log": b"1\n2\n3\n"})
    assert one.sync().files_uploaded == 1
    assert stored(one) == {"log": b"1\n2\n3\n", "still": b"the same", "new": b"n"}


@pytest.mark.parametrize("content", [b"1\n2\n3\n", b"2\n"], ids=["longer", "of the same size"])
def test_back_to_an_index_that_lags(one: Disk, content: bytes) -> None:
    """B's last sync was not forced, and then B died: the index says what A had sent."""
    fill(one.root, {"log": b"1\n"})
    one.sync()
    two = one.beside("node-2")
    two.restore()
    two.sync(forced=True)
    assert two.index().entries["log"].checksum == one.records()["log"].checksum
    fill(two.root, {"log": content})
    two.sync(forced=False)
    assert two.storage.writes == ["log"]
    assert one.restore().files_restored == 1
    assert tree(one.root) == {"log": content}


def test_back_after_a_kill_before_the_index_was_written(one: Disk) -> None:
    fill(one.root, {"log": b"1\n"})
    one.sync()
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"log": b"1\n2\n"})
    # The first index says who goes on; the one after the upload never comes.
    indexed: list[str] = []

    class Killed(Around):
        def write(self, path: str, source: Any, run_id: str) -> None:
            if path == INDEX and indexed:
                raise PermissionError("as if killed")
            indexed.append(path)
            super().write(path, source, run_id)

    two.sync(Killed(one.inner))
    assert stored(one) == {"log": b"1\n2\n"}
    one.restore()
    assert tree(one.root) == {"log": b"1\n2\n"}


def test_what_a_killed_node_stored_last_is_not_overwritten(one: Disk) -> None:
    """It was killed before it put that into the index, so that nobody knows of it."""
    fill(one.root, {"a": b"1"})
    one.sync()
    fill(one.root, {"late": b"theirs"})
    killed = Failing(
        one.inner, lambda path: PermissionError("as if killed"), affects={INDEX}.__contains__
    )
    one.sync(killed)
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"late": b"mine", "new": b"n"})
    assert two.sync().files_uploaded == 2
    assert stored(one) == {"a": b"1", "late": b"mine", "late.before-1": b"theirs", "new": b"n"}


def test_records_are_doubted_where_storage_could_not_be_asked(one: Disk) -> None:
    fill(one.root, {"log": b"1\n", "b": b"2"})
    one.sync()
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"log": b"1\n2\n"})
    two.sync()

    class Refusing(Around):
        def read(self, path: str) -> Iterator[bytes]:
            raise PermissionError(13, "as in an outage")

    assert one.restore(Refusing(one.inner)).failures
    fill(one.root, {"log": b"1\nx\n"})
    report = one.sync()
    assert (report.files_uploaded, report.files_unchanged) == (1, 1)
    assert stored(one) == {"log": b"1\nx\n", "log.before-1": b"1\n2\n", "b": b"2"}


def test_where_nobody_else_was_nothing_is_asked(one: Disk) -> None:
    """A new driver does not know where a trial was; the index may lag behind the manifest."""
    fill(one.root, {"log": b"1\n", "b": b"2"})
    one.sync()
    fill(one.root, {"log": b"1\n2\n"})
    one.sync()
    fill(one.root, {"log": b"1\n2\n3\n"})
    report = one.restore()
    assert (report.files_kept, report.files_local, report.files_restored) == (2, 0, 0)
    assert one.storage.kinds() == {"read": 1}
    one.sync()
    assert stored(one) == {"log": b"1\n2\n3\n", "b": b"2"}, "and nothing is set aside"


def test_what_was_written_after_the_last_sync_stays_and_so_does_what_others_sent(
    one: Disk,
) -> None:
    fill(one.root, {"log": b"1\n", "own": b"1"})
    one.sync()
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"log": b"1\n2b\n"})
    two.sync()
    fill(one.root, {"log": b"1\n2a\n", "own": b"2"})
    report = one.restore()
    assert (report.files_local, report.files_kept) == (1, 1)
    one.sync()
    assert stored(one) == {"log": b"1\n2a\n", "log.before-1": b"1\n2b\n", "own": b"2"}


def test_what_is_no_longer_stored_is_sent_again(plain: Disk) -> None:
    fill(plain.root, {"a": b"1", "b": b"1"})
    plain.settle()
    two = plain.beside("node-2")
    two.restore()
    fill(two.root, {"b": b"2"})
    two.sync()
    (plain.root.parent / "storage" / "a").unlink()
    assert plain.restore().files_local == 1
    assert plain.sync().files_uploaded == 1
    assert stored(plain) == {"a": b"1", "b": b"2"}


# -- names ---------------------------------------------------------------------------------------

EVIL = [
    *("../x", "a/../../x", "/etc/x", "//x", "a//b", "a/", "", ".", "./a", "a/.", ".."),
    *("nul\0", "a/nul\0/b", ".tune_sync/x", ".tune_sync/index.json", "out/x", "out/d/x"),
]


@pytest.mark.parametrize("path", EVIL, ids=repr)
def test_nothing_is_written_outside(plain: Disk, path: str) -> None:
    (plain.root / "out").symlink_to(plain.root.parent / "elsewhere")
    (plain.root.parent / "elsewhere").mkdir()
    indexes.write(plain.inner, Index({path: Entry(4), "fine": Entry(4)}), "run")
    put(plain.inner, {"fine": b"fine"})

    class Obliging(Around):
        def read(self, name: str) -> Iterator[bytes]:
            return super().read(name) if name in (INDEX, "fine") else iter([b"evil"])

        def stat(self, name: str) -> Stat:
            return Stat(4)

    before = tree(plain.root.parent)
    report = plain.restore(Obliging(plain.inner))
    assert [(f.path, f.error) for f in report.failures] == [(path, "ValueError")]
    after = {p: c for p, c in tree(plain.root.parent).items() if not p.startswith("manifests/")}
    assert after == {**before, "trial/fine": b"fine"}


def test_links_that_stay_inside_are_followed(root: Path) -> None:
    (root / "d").mkdir()
    (root / "in").symlink_to("d")
    (root / "loop").symlink_to("loop")
    assert is_inside(str(root), "in/x")
    link = root.parent / "link"
    link.symlink_to(root)
    assert is_inside(str(link), "d/x")
    assert not is_inside(str(root / "d"), "../d/x")


def test_a_sibling_of_a_like_name_is_outside(root: Path) -> None:
    (root.parent / "trial-2").mkdir()
    (root / "out").symlink_to(root.parent / "trial-2")
    assert not is_inside(str(root), "out/x")


def test_a_name_that_is_too_long_here_fails_alone(plain: Disk) -> None:
    names = ["n" * 300, "d/" * 3000 + "x", "fine"]
    indexes.write(plain.inner, Index(dict.fromkeys(names, Entry(1))), "run")
    put(plain.inner, {"fine": b"1"})
    report = plain.restore()
    assert {f.path for f in report.failures} == set(names[:2])
    assert all(f.error == "OSError" for f in report.failures)
    assert tree(plain.root) == {"fine": b"1"}


def test_a_file_where_a_directory_should_be_stays(one: Disk) -> None:
    fill(one.root, {"a/b": b"1", "c": b"2"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"mine"})
    (two.root / "c").mkdir()
    report = two.restore()
    assert [f.path for f in report.failures] == ["a/b"]
    assert report.files_local == 1
    assert tree(two.root) == {"a": b"mine"}
    assert (two.root / "c").is_dir()


# -- damage on the way ---------------------------------------------------------------------------


class Damaging(Around):
    """What it hands out is not what is stored, the first ``times`` times for each file."""

    def __init__(
        self, inner: Storage, damage: Callable[[bytes], bytes], times: float = float("inf")
    ) -> None:
        super().__init__(inner)
        self._damage, self._times = damage, times
        self.reads = 0

    def read(self, path: str) -> Iterator[bytes]:
        content = b"".join(super().read(path))
        if path != INDEX:
            self.reads += 1
            if self.reads <= self._times:
                content = self._damage(content)
        yield content


def _random_byte(content: bytes) -> bytes:
    """Noise, which is not the same twice."""
    return os.urandom(8) + content[8:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-1],
    "nothing": lambda content: b"",
    "longer": lambda content: content + b"x",
    "flipped": lambda content: bytes([content[0] ^ 1]) + content[1:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_download_is_tried_again(
    one: Disk, pauses: list[float], damage: Callable[[bytes], bytes]
) -> None:
    fill(one.root, {"a": b"content"})
    one.sync()
    two = one.beside("node-2")
    report = two.restore(Damaging(one.inner, damage, times=1))
    assert (report.files_restored, tree(two.root)) == (1, {"a": b"content"})
    assert len(pauses) == 1


@pytest.mark.parametrize("damage", [*DAMAGES.values(), _random_byte], ids=[*DAMAGES, "noise"])
def test_one_that_stays_damaged_is_refused(
    one: Disk, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    if damage is DAMAGES["flipped"]:
        pytest.skip("the same wrong bytes each time are what storage holds")
    now = [0.0]
    monkeypatch.setattr(pool.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    fill(one.root, {"a": b"content" * 99})
    one.sync()
    two = one.beside("node-2")
    report = two.restore(Damaging(one.inner, damage), clock=lambda: now[0])
    assert [f.path for f in report.failures] == ["a"]
    assert "not what storage says it has" in report.failures[0].message
    assert tree(two.root) == {}
    # It is still there, and nothing from here takes its place.
    fill(two.root, {"a": b"mine"})
    two.sync()
    assert stored(one) == {"a": b"mine", "a.before-1": b"content" * 99}


@pytest.mark.parametrize("content", [b"newer!!", b"newer, longer", b""])
def test_one_that_is_newer_than_the_index_is_taken(one: Disk, content: bytes) -> None:
    fill(one.root, {"a": b"content"})
    one.sync()
    fill(one.root, {"a": content})
    one.sync(forced=False)
    assert one.storage.writes == ["a"]
    two = one.beside("node-2")
    assert two.restore().files_restored == 1
    assert tree(two.root) == {"a": content}
    assert two.sync().files_uploaded == 0


def test_one_that_is_indexed_and_gone_is_named_at_once(plain: Disk, pauses: list[float]) -> None:
    fill(plain.root, {"a": b"1", "b": b"2"})
    plain.sync()
    (plain.root.parent / "storage" / "a").unlink()
    two = plain.beside("node-2")
    report = two.restore()
    assert [f.path for f in report.failures] == ["a"]
    assert "storage does not have it" in report.failures[0].message
    assert report.failures[0].trial == "trial_1"
    assert tree(two.root) == {"b": b"2"}
    assert pauses == [], "it does not appear by waiting"


def test_read_errors_that_pass_do(one: Disk, pauses: list[float]) -> None:
    fill(one.root, FILES)
    one.sync()

    class Unsteady(Around):
        def __init__(self, inner: Storage) -> None:
            super().__init__(inner)
            self.failed: set[str] = set()

        def read(self, path: str) -> Iterator[bytes]:
            for number, chunk in enumerate(super().read(path)):
                yield chunk[:3]
                if path not in self.failed and not number:
                    self.failed.add(path)
                    raise ConnectionError("reset")
                yield chunk[3:]

    two = one.beside("node-2")
    left: list[int] = []
    assert two.restore(Unsteady(one.inner), progress=left.append).failures == ()
    assert tree(two.root) == FILES
    # What arrived of a file that failed is owed again.
    assert left[0] == max(left) == sum(map(len, FILES.values()))
    assert (left[-1], min(left)) == (0, 0)
    assert any(after > before for before, after in itertools.pairwise(left))


def test_read_errors_that_stay_are_named_and_show_no_secret(one: Disk) -> None:
    fill(one.root, FILES)
    one.sync()

    class Refusing(Around):
        def read(self, path: str) -> Iterator[bytes]:
            if path == "log.txt":
                raise PermissionError("403 at https://key:hush@host/b?X-Amz-Signature=hush2")
            return super().read(path)

    two = one.beside("node-2")
    (failure,) = two.restore(Refusing(one.inner)).failures
    assert (failure.path, failure.error) == ("log.txt", "PermissionError")
    assert "restoring" in failure.message
    assert "hush" not in failure.message
    assert tree(two.root) == {path: c for path, c in FILES.items() if path != "log.txt"}


def test_an_index_that_can_not_be_read_is_a_failure_and_protects_what_is_there(one: Disk) -> None:
    fill(one.root, {"a": b"theirs"})
    one.sync()

    class Refusing(Around):
        def read(self, path: str) -> Iterator[bytes]:
            raise PermissionError(13, "no")

    two = one.beside("node-2")
    (failure,) = two.restore(Refusing(one.inner)).failures
    assert (failure.trial, failure.path, failure.error) == ("trial_1", "", "PermissionError")
    fill(two.root, {"a": b"mine"})
    two.sync()
    assert stored(one) == {"a": b"mine", "a.before-1": b"theirs"}


def test_a_full_disk_leaves_no_half_file(one: Disk) -> None:
    fill(one.root, {"big": b"x" * 300_000, "small": b"y"})
    one.sync()
    two = one.beside("node-2")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            report = two.restore()
            named = [(f.path, f.error) for f in report.failures]
            status = 0 if named == [("big", "LocalFileError")] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tree(two.root) == {"small": b"y"}
    assert not list(two.manifest.parent.glob("*restoring*"))


def test_a_directory_that_can_not_be_written_is_named_by_each_file(
    one: Disk, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    fill(one.root, {"a": b"1", "b": b"2"})
    one.sync()
    two = one.beside("node-2")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(restore_module, "_link", full)
    report = two.restore()
    assert sorted((f.path, f.error) for f in report.failures) == [
        ("a", "LocalFileError"),
        ("b", "LocalFileError"),
    ]
    assert "No space left" in report.failures[0].message
    assert (tree(two.root), pauses) == ({}, [])


def test_a_file_system_without_links(one: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(one.root, FILES)
    one.sync()
    two = one.beside("node-2")

    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links here")

    monkeypatch.setattr(restore_module.os, "link", unsupported)
    assert two.restore().files_restored == 4
    assert tree(two.root) == FILES
    assert two.sync().files_uploaded == 0


# -- the deadline, and kills ---------------------------------------------------------------------


class HangingReads(Around):
    """Reads of all but the index stop in the middle until ``release`` is called."""

    def __init__(self, inner: Storage, hangs: Callable[[str], bool], when: str = "before") -> None:
        super().__init__(inner)
        self._hangs, self._when = hangs, when
        self._released = threading.Event()
        self.ended = threading.Semaphore(0)

    def read(self, path: str) -> Iterator[bytes]:
        try:
            for chunk in super().read(path):
                self._hang(path, when="before")
                yield chunk
            self._hang(path, when="after")
        finally:
            if self._hangs(path):
                self.ended.release()

    def _hang(self, path: str, when: str) -> None:
        if when == self._when and self._hangs(path) and not self._released.wait(60):
            raise RuntimeError("the test never released the hung read")

    def release(self) -> None:
        self._released.set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_appears_after_the_deadline(one: Disk, when: str) -> None:
    fill(one.root, {"a": b"1", "hung": b"2"})
    one.sync()
    two = one.beside("node-2")
    hanging = HangingReads(one.inner, {"hung"}.__contains__, when)
    started = time.monotonic()
    report = two.restore(hanging, timeout_s=1.0)
    assert time.monotonic() - started < 15
    assert [(f.path, f.error) for f in report.failures] == [("hung", "TimeoutError")]
    hanging.release()
    assert hanging.ended.acquire(timeout=20)
    for thread in threading.enumerate():
        if thread.name == "tune_sync_transfer":
            thread.join(timeout=20)
    assert tree(two.root) == {"a": b"1"}
    assert not list(two.manifest.parent.glob("*restoring*"))
    fill(two.root, {"hung": b"mine"})
    two.sync()
    assert stored(one) == {"a": b"1", "hung": b"mine", "hung.before-1": b"2"}


def test_an_index_that_hangs_is_given_up_too(one: Disk) -> None:
    fill(one.root, {"a": b"1"})
    one.sync()
    two = one.beside("node-2")
    hanging = HangingReads(one.inner, lambda path: True)
    try:
        (failure,) = two.restore(hanging, timeout_s=0.5).failures
    finally:
        hanging.release()
    assert (failure.path, failure.error) == ("", "TimeoutError")


class KillingReads(Killing):
    """Kills at the reads as well."""

    def read(self, path: str) -> Iterator[bytes]:
        self.step()
        for chunk in super().read(path):
            yield chunk[:2]
            self.step()
            yield chunk[2:]


def in_a_child(do: Callable[[], object]) -> None:
    """Do something that may kill its process."""
    child = os.fork()
    if child == 0:
        try:
            do()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("countdown", range(1, 22))
def test_killed_at_any_step_and_done_again(one: Disk, countdown: int) -> None:
    fill(one.root, FILES)
    one.sync()
    fill(one.root, {"later": b"not in the index"})
    two = one.beside("node-2")

    def killed() -> None:
        killing = KillingReads(one.inner, countdown)
        for method in ("disown", "record", "index_read"):
            setattr(Manifest, method, killing.wrap(getattr(Manifest, method)))
        restore_module._link = killing.wrap(restore_module._link)
        two.restore(killing, concurrency=1)

    in_a_child(killed)
    found = tree(two.root)
    assert found.items() <= FILES.items(), "whole files only"
    report = two.restore()
    assert report.failures == ()
    assert tree(two.root) == FILES
    assert not list(two.manifest.parent.glob("*restoring*"))
    assert two.sync().files_uploaded == 0
    assert stored(one) == FILES
    assert two.sync().complete


# -- contract ------------------------------------------------------------------------------------


def test_restoring_twice_does_nothing(one: Disk) -> None:
    fill(one.root, FILES)
    one.sync()
    two = one.beside("node-2")
    two.restore()
    before = {path: os.stat(two.root / path) for path in FILES}
    report = two.restore()
    assert (report.files_restored, report.files_kept) == (0, 4)
    assert {path: os.stat(two.root / path) for path in FILES} == before


def test_a_restore_can_not_fail_but_by_its_report(root: Path) -> None:
    class Broken(Around):
        name = "broken:/"

        def __init__(self) -> None:
            pass

        def read(self, path: str) -> Iterator[bytes]:
            raise KeyError("a bug of a client's")

    report = restore({"": str(root)}, Broken(), str(root.parent / "m"), RestoreOptions())
    assert [f.error for f in report.failures] == ["KeyError"]


def test_uploads_that_fail_do_not_forget_whose_the_file_was(one: Disk) -> None:
    """The look at what is there comes after the record is withdrawn."""
    fill(one.root, {"a": b"theirs"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"mine"})
    for storage in (
        Failing(one.inner, lambda path: PermissionError(13, "no"), affects={"a"}.__contains__),
        _Blind(one.inner),
    ):
        assert [f.path for f in two.sync(storage).failures] == ["a"]
    two.sync()
    assert stored(one) == {"a": b"mine", "a.before-1": b"theirs"}


class _Blind(Around):
    """Does not tell what it has."""

    def stat(self, path: str) -> Stat | None:
        raise PermissionError(13, "no")


def test_a_disk_that_comes_back_claims_the_index_each_time(one: Disk) -> None:
    """Also if it did so before, and only contents change: else the other trusts its own records."""
    two = one.beside("node-2")
    fill(one.root, {"log": b"1"})
    one.sync()
    for disk, content in ((two, b"12"), (one, b"123"), (two, b"1234"), (one, b"12345")):
        disk.restore()
        assert (disk.root / "log").read_bytes() == content[:-1]
        fill(disk.root, {"log": content})
        disk.sync()
    assert stored(one) == {"log": b"12345"}


def test_what_came_from_elsewhere_is_no_more_ours_for_being_in_our_index(one: Disk) -> None:
    fill(one.root, {"model": b"theirs"})
    one.sync()
    two = one.beside("node-2")

    class Refusing(Around):
        def read(self, path: str) -> Iterator[bytes]:
            raise PermissionError(13, "as in an outage")

    for written in ({"log": b"1"}, {"model": b"mine"}):
        assert two.restore(Refusing(one.inner)).failures
        fill(two.root, written)
        two.sync()
    assert stored(one) == {"model": b"mine", "model.before-1": b"theirs", "log": b"1"}
