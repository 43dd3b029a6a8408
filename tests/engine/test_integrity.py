"""Uploads are believed only as far as storage can show them; records only as far as they are read.

A storage that says yes and has something else, a manifest that was damaged: what is noticed, what
it costs, and that it is said.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.fakes import Around, Counting, Failing, ObjectStorage, tree
from tests.engine.support import Disk, fill, sync_dir
from tune_sync_plugin.engine import pool
from tune_sync_plugin.engine.index import INDEX
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.source import Content, Memory
from tune_sync_plugin.engine.storage import Stat, Storage
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.report import SyncReport


@pytest.fixture(params=["directory", "objects"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "objects":
        return ObjectStorage(tmp_path / "objects")
    return LocalStorage(str(tmp_path / "storage"))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(pool.time, "sleep", slept.append)
    return slept


def contents(storage: Storage) -> dict[str, bytes]:
    return {path: b"".join(storage.read(path)) for path in storage.files()}


# -- uploads -------------------------------------------------------------------------------------


class Lying(Around):
    """Says that it took a file and did something else, ``times`` times."""

    def __init__(self, inner: Storage, how: str, times: float) -> None:
        super().__init__(inner)
        self._how, self._left = how, times
        self.writes = 0

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self.writes += 1
        content = source.read()
        if self._left <= 0:
            return super().write(path, Memory(content), run_id)
        self._left -= 1
        if self._how == "truncates":
            return super().write(path, Memory(content[:-1]), run_id)
        if self._how == "damages":
            return super().write(path, Memory(bytes([content[0] ^ 1]) + content[1:]), run_id)
        return None


LIES = ["loses", "truncates", "damages"]


def noticed(inner: Storage, how: str, read_back: bool) -> bool:
    """Other bytes of the same size show in an ETag, or when they are read back."""
    return how != "damages" or isinstance(inner, ObjectStorage) or read_back


@pytest.mark.parametrize("read_back", [False, True])
@pytest.mark.parametrize("how", LIES)
def test_an_upload_that_did_not_happen_is_done_again(
    inner: Storage, root: Path, manifest: Path, pauses: list[float], how: str, read_back: bool
) -> None:
    fill(root, {"a": b"content"})
    lying = Lying(inner, how, times=2)
    report = sync_dir(root, lying, manifest, read_back=read_back)
    assert (report.files_uploaded, report.complete) == (1, True)
    if noticed(inner, how, read_back):
        assert (lying.writes, len(pauses)) == (3, 2)
        assert contents(inner) == {"a": b"content"}
    else:
        assert lying.writes == 1, "a size is all that a directory can tell; see verify_content"


@pytest.mark.parametrize("how", LIES)
def test_one_that_never_does_is_a_failure_and_not_recorded(
    inner: Storage, root: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    now = [0.0]
    monkeypatch.setattr(pool.time, "sleep", lambda pause: now.__setitem__(0, now[0] + pause))
    fill(root, {"a": b"content"})
    disk = Disk(root, manifest, inner)
    options = SyncOptions(timeout_s=20, read_back=True)
    lying = Lying(inner, how, times=float("inf"))
    (failure,) = disk.sync(lying, options, clock=lambda: now[0]).failures
    assert (failure.path, failure.error) == ("a", "OSError")
    assert {"loses": "does not have it", "truncates": "holds 6 bytes", "damages": "other bytes"}[
        how
    ] in failure.message
    assert disk.sync().files_uploaded == 1
    assert contents(inner)["a"] == b"content"


class Encrypting(Around):
    """As S3 with SSE-KMS: ETags look like MD5s and are none."""

    has_checksums = True

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        super().write(path, source, run_id)
        return hashlib.md5(os.urandom(8)).hexdigest()

    def stat(self, path: str) -> Stat | None:
        found = super().stat(path)
        return found and Stat(found.size, hashlib.md5(os.urandom(8)).hexdigest())


def test_etags_of_encrypted_objects_cost_one_look(
    inner: Storage, root: Path, manifest: Path, pauses: list[float]
) -> None:
    fill(root, {f"{n}": b"%d" % n for n in range(30)})
    counting = Counting(Encrypting(inner))
    report = sync_dir(root, counting, manifest, concurrency=1)
    assert (report.files_uploaded, report.complete, pauses) == (30, True, [])
    assert counting.kinds() == {"write": 30, "stat": 30, "read": 1}


class Silent(Around):
    """As S3 by pyarrow or s3fs, which don't pass on what it answers to an upload."""

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        super().write(path, source, run_id)
        return None


def test_what_storage_holds_is_read_back_only_if_asked(root: Path, manifest: Path) -> None:
    fill(root, {f"{n}": b"%d" % n for n in range(9)})
    for read_back, base in ((False, "one"), (True, "two")):
        counting = Counting(LocalStorage(str(root.parent / base)))
        sync_dir(root, counting, root.parent / f"{base}.sqlite", read_back=read_back)
        assert counting.kinds().get("read", 0) == (9 if read_back else 0)
    counting = Counting(ObjectStorage(root.parent / "objects"))
    sync_dir(root, counting, manifest, read_back=True)
    assert counting.kinds() == {"write": 9}, "the answers' ETags tell, and nothing is asked or read"
    counting = Counting(Silent(ObjectStorage(root.parent / "more objects")))
    sync_dir(root, counting, root.parent / "silent.sqlite", read_back=True)
    assert counting.kinds() == {"write": 9, "stat": 9}, "an ETag tells, and nothing is read"


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Access Denied"),
        OSError(
            "When reading information for key 'p/a' in bucket 'results': AWS Error ACCESS_DENIED "
            "during HeadObject operation: No response body."
        ),
    ],
    ids=["s3fs", "pyarrow"],
)
def test_storage_that_may_not_be_looked_at_is_said_once(
    inner: Storage, root: Path, manifest: Path, error: OSError
) -> None:
    class WriteOnly(Silent):
        def stat(self, path: str) -> Stat | None:
            raise error

    fill(root, {f"{n}": b"%d" % n for n in range(9)})
    report = sync_dir(root, WriteOnly(inner), manifest)
    assert (report.files_uploaded, report.complete) == (9, True)
    (warning,) = report.warnings
    assert "does not let them be looked at" in warning


# -- somebody else's -----------------------------------------------------------------------------


def test_a_name_that_is_taken_is_counted_on(inner: Storage, root: Path, manifest: Path) -> None:
    one = Disk(root, manifest, inner)
    fill(root, {"a": b"first", "a.before-1": b"of the same name"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"second"})
    two.sync()
    found = contents(inner)
    assert (found["a"], found["a.before-1"], found["a.before-2"]) == (
        b"second",
        b"of the same name",
        b"first",
    )


def test_a_name_that_is_about_to_be_taken_is_counted_on(
    inner: Storage, root: Path, manifest: Path
) -> None:
    one = Disk(root, manifest, inner)
    fill(root, {"a": b"first"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"second", "a.before-1": b"of the same name, and sent after it"})
    two.sync(options=SyncOptions(timeout_s=20, concurrency=1))
    found = contents(inner)
    assert (found["a"], found["a.before-1"], found["a.before-2"]) == (
        b"second",
        b"of the same name, and sent after it",
        b"first",
    )


def test_setting_aside_survives_an_error_and_is_told_of(
    inner: Storage, root: Path, manifest: Path, pauses: list[float]
) -> None:
    """The second try finds our own file where somebody else's was."""
    one = Disk(root, manifest, inner)
    fill(root, {"a": b"theirs"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"mine"})

    class Unsteady(Silent):
        left = 1

        def stat(self, path: str) -> Stat | None:
            found = super().stat(path)
            if found and path == "a" and b"".join(self.inner.read("a")) == b"mine" and self.left:
                self.left -= 1
                raise ConnectionError("reset")
            return found

    report = two.sync(Unsteady(inner))
    assert (report.files_uploaded, len(pauses)) == (1, 1)
    assert "a.before-1" in report.warnings[0]
    assert {"a.before-1", "a"} <= set(two.index().entries)
    found = contents(inner)
    assert (found["a"], found["a.before-1"]) == (b"mine", b"theirs")
    assert "a.before-2" not in found


def test_a_write_that_fails_after_it_sets_nothing_aside_twice(
    inner: Storage, root: Path, manifest: Path
) -> None:
    one = Disk(root, manifest, inner)
    fill(root, {"a": b"theirs"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"a": b"mine"})
    refused = Failing(inner, lambda path: PermissionError(13, "no"), affects={"a"}.__contains__)
    for _ in range(2):
        assert [f.path for f in two.sync(refused).failures] == ["a"]
    assert two.sync().files_uploaded == 1
    found = contents(inner)
    assert (found["a"], found["a.before-1"]) == (b"mine", b"theirs")
    assert "a.before-2" not in found


# -- a directory that the trial has left ---------------------------------------------------------


def test_what_was_sent_and_is_newer_elsewhere_is_no_failure(
    inner: Storage, root: Path, manifest: Path
) -> None:
    """A file's last change may lie too close to the scan to tell; it was sent all the same."""
    one = Disk(root, manifest, inner)
    fill(root, {"log": b"1\n", "equal": b"e", "unsent": b"u", "lost": b"l"})
    for path in ("log", "equal", "lost"):
        os.utime(root / path, ns=(2**62, 2**62))  # always racy
    one.sync()
    two = one.beside("node-2")
    two.restore()
    fill(two.root, {"log": b"1\n2\n"})
    two.sync(shared=True, forced=True)
    fill(root, {"lost": b"last words", "new": b"n"})
    options = SyncOptions(timeout_s=20, only_missing=True)
    report = one.sync(options=options, shared=True)
    assert [f.path for f in report.failures] == ["lost"]
    assert "kept back" in report.failures[0].message
    assert (report.files_uploaded, report.files_unchanged) == (1, 3)
    assert contents(inner)["log"] == b"1\n2\n"
    assert contents(inner)["lost"] == b"l"
    # And the other's index still has its own word.
    assert two.index().entries["log"].size == 4


def test_a_place_left_waits_for_storage_as_any_does(
    inner: Storage, root: Path, manifest: Path, pauses: list[float]
) -> None:
    fill(root, {"a": b"1"})

    class Unsteady(Silent):
        left = 2

        def stat(self, path: str) -> Stat | None:
            self.left -= 1
            if self.left >= 0:
                raise ConnectionError("reset")
            return super().stat(path)

    report = sync_dir(root, Unsteady(inner), manifest, only_missing=True)
    assert (report.files_uploaded, report.complete, len(pauses)) == (1, True, 2)


# -- a damaged manifest --------------------------------------------------------------------------


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _noise(data: bytes) -> bytes:
    return data[:100] + os.urandom(len(data) - 100)


def _nonsense(data: bytes) -> bytes:
    return b"no database at all\n" * 99


_JOURNAL = ("-wal", "-shm")


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("damage", [_truncated, _noise, _nonsense])
def test_a_damaged_manifest_costs_a_comparison_and_no_upload(
    inner: Storage, root: Path, manifest: Path, damage: Callable[[bytes], bytes], with_index: bool
) -> None:
    files = {f"d/{n:03}": b"content %d" % n for n in range(100)}
    disk = Disk(root, manifest, inner)
    fill(root, files)

    def sync(storage: Storage) -> SyncReport:
        return disk.sync(storage) if with_index else sync_dir(root, storage, manifest)

    sync(inner)
    broken = damage(manifest.read_bytes())
    manifest.write_bytes(broken)
    fill(root, {"d/007": b"CONTENT 7", "d/008": b"longer than before", "new": b"n"})
    counting = Counting(inner)
    report = sync(counting)
    changed = {"d/007", "d/008", "new"}
    assert set(counting.writes) - {INDEX} == changed
    assert (report.files_uploaded, report.files_unchanged) == (3, 98)
    assert report.complete, report.failures
    (warning,) = report.warnings
    (aside,) = (p for p in manifest.parent.glob("*.corrupt-*") if p.suffix[-4:] not in _JOURNAL)
    assert aside.name in warning
    assert "was unreadable" in warning
    assert aside.read_bytes() == broken
    assert {p: c for p, c in contents(inner).items() if not p.startswith(".tune_sync")} == tree(
        root
    )
    again = Counting(inner)
    assert sync(again).warnings == ()
    assert set(again.writes) <= {INDEX}


def test_a_damaged_manifest_where_nothing_can_be_listed_costs_uploads(
    root: Path, manifest: Path
) -> None:
    class Unlistable(Around):
        def files(self) -> dict[str, int]:
            raise PermissionError(13, "no")

        def read(self, path: str) -> Iterator[bytes]:
            return super().read(path)

    inner = LocalStorage(str(root.parent / "storage"))
    fill(root, {"a": b"1", "b": b"2"})
    sync_dir(root, inner, manifest)
    manifest.write_bytes(b"nonsense" * 99)
    report = sync_dir(root, Unlistable(inner), manifest)
    assert (report.files_uploaded, report.complete) == (2, True)
