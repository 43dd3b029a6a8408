"""Reading a file that somebody else is still writing."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest

from tests.engine.fakes import Watched, tree
from tests.engine.support import entry_of, fill, sync_dir
from tune_sync_plugin.engine import source as source_module
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.scan import Fingerprint
from tune_sync_plugin.engine.source import CHUNK_BYTES, Source
from tune_sync_plugin.errors import SourceChangedError, SourceError


@pytest.fixture
def file(root: Path) -> Path:
    return fill(root, {"a": b"0123456789"}) / "a"


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 1])
def test_whole_file_in_bounded_chunks(file: Path, size: int) -> None:
    file.write_bytes(os.urandom(size))
    with Source(entry_of(file)) as source:
        chunks = list(source.chunks())
        assert source.read() == b"".join(chunks) == file.read_bytes()
        assert max(map(len, chunks), default=0) <= CHUNK_BYTES
        assert source.checksum == hashlib.md5(file.read_bytes()).hexdigest()


def test_never_reads_beyond_the_size_it_had_when_opened(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[int, int]] = []
    pread = os.pread
    monkeypatch.setattr(
        source_module.os, "pread", lambda fd, n, at: (reads.append((at, n)), pread(fd, n, at))[1]
    )
    entry = entry_of(file)
    with Source(entry) as source:
        with file.open("ab") as out:
            out.write(b"and more")
        assert source.read() == b"0123456789"
        assert source.fingerprint == entry.fingerprint
    assert all(at + count <= 10 for at, count in reads)


def test_grows_while_it_is_read(file: Path) -> None:
    file.write_bytes(b"x" * (CHUNK_BYTES + 5))
    with Source(entry_of(file)) as source:
        chunks = source.chunks()
        first = next(chunks)
        with file.open("ab") as out:
            out.write(b"y" * CHUNK_BYTES)
        assert first + b"".join(chunks) == b"x" * (CHUNK_BYTES + 5)


@pytest.mark.parametrize("size", [0, 9])
def test_shrank_before_it_is_read(file: Path, size: int) -> None:
    entry = entry_of(file)
    os.truncate(file, size)
    with pytest.raises(SourceChangedError, match="a shrank before"):
        Source(entry)


def test_shrinks_while_it_is_read(file: Path) -> None:
    file.write_bytes(b"x" * (3 * CHUNK_BYTES))
    with Source(entry_of(file)) as source:
        chunks = source.chunks()
        next(chunks)
        os.truncate(file, CHUNK_BYTES + 1)
        assert next(chunks) == b"x"
        with pytest.raises(SourceChangedError, match="a shrank"):
            next(chunks)


@pytest.mark.parametrize("content", [b"rewritten!", b"rewritten, and longer"])
def test_rewritten_while_it_is_read(file: Path, content: bytes) -> None:
    file.write_bytes(b"x" * CHUNK_BYTES + file.read_bytes())
    with Source(entry_of(file)) as source:
        chunks = source.chunks()
        next(chunks)
        file.write_bytes(b"y" * CHUNK_BYTES + content)
        with pytest.raises(SourceChangedError, match="a was rewritten while it was read"):
            next(chunks)


def test_rewritten_within_a_tick_of_the_clock(file: Path) -> None:
    """The times don't tell: two writes in a row leave the same."""
    file.write_bytes(b"x" * (CHUNK_BYTES + 1))
    status = file.stat()
    with Source(entry_of(file)) as source:
        chunks = source.chunks()
        next(chunks)
        file.write_bytes(b"y" * (CHUNK_BYTES + 1))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(SourceChangedError, match="a was rewritten"):
            next(chunks)


def test_a_file_rewritten_after_the_scan_arrives_whole(root: Path, manifest: Path) -> None:
    """As Ray writes the state: in place, so that the inode is the old one's."""
    fill(root, {"a": b"1", "state.json": b"{...}"})

    def meddle(moment: str, path: str) -> None:
        if (moment, path) == ("before", "a"):
            (root / "state.json").write_bytes(b"{a longer state}")

    storage = Watched(LocalStorage(str(root.parent / "storage")), meddle)
    assert sync_dir(root, storage, manifest, concurrency=1).complete
    assert tree(root.parent / "storage")["state.json"] == b"{a longer state}"


def test_deleted_while_it_is_read(file: Path) -> None:
    with Source(entry_of(file)) as source:
        file.unlink()
        assert source.read() == b"0123456789"


def test_gone(file: Path) -> None:
    entry = entry_of(file)
    file.unlink()
    with pytest.raises(SourceChangedError, match="a is gone"):
        Source(entry)


def test_its_directory_became_a_file(root: Path) -> None:
    entry = entry_of(fill(root, {"d/a": b"1"}) / "d" / "a")
    (root / "d" / "a").unlink()
    (root / "d").rmdir()
    fill(root, {"d": b""})
    with pytest.raises(SourceChangedError, match="a is gone"):
        Source(entry)


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_something_else_took_its_place(file: Path, kind: str) -> None:
    entry = entry_of(file)
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    outcome: list[BaseException] = []

    def attempt() -> None:
        try:
            Source(entry)
        except SourceChangedError as error:
            outcome.append(error)

    # A thread, since the failure would be to wait for ever.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert "no longer a regular file" in str(outcome)


def test_a_file_that_was_replaced_is_read_as_what_it_is(file: Path) -> None:
    """Neither cut at the old one's size nor recorded under the old one's fingerprint."""
    entry = entry_of(file)
    (file.parent / "new").write_bytes(b"a longer one than that")
    (file.parent / "new").replace(file)
    with Source(entry) as source:
        assert source.read() == b"a longer one than that"
        assert source.fingerprint == Fingerprint.of(file.stat())


def test_read_errors_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> bytes:
        raise OSError(5, "Input/output error")

    with Source(entry_of(file)) as source:
        monkeypatch.setattr(source_module.os, "pread", broken)
        with pytest.raises(SourceError, match="reading a failed: Input/output error") as caught:
            source.read()
    assert not isinstance(caught.value, SourceChangedError)


def test_hashes_what_it_hands_out(file: Path) -> None:
    with Source(entry_of(file)) as source:
        first = source.chunks()
        next(first)
        assert source.checksum == "", "not all of it was handed out"
        file.write_bytes(b"9876543210")
        assert list(first) == []
        assert source.matches(hashlib.md5(b"9876543210").hexdigest())
    with Source(entry_of(file)) as source:
        source.read()
        file.write_bytes(b"0123456789")
        assert source.checksum == hashlib.md5(b"9876543210").hexdigest()
        assert not source.matches(source.checksum)


def test_closes_its_file(file: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with Source(entry_of(file)):
        pass
    entry = entry_of(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(SourceChangedError):
        Source(entry)
    assert set(os.listdir("/proc/self/fd")) == before


# -- in a sync -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["shrinks", "vanishes"])
def test_a_sync_defers_what_changed_and_takes_the_rest(
    root: Path, manifest: Path, what: str
) -> None:
    fill(root, {"a": b"1", "b": b"22", "c": b"333"})
    there = root.parent / "storage"
    fill(there, {"b": b"the old one"})

    def meddle(moment: str, path: str) -> None:
        if (moment, path) == ("before", "a"):
            if what == "shrinks":
                os.truncate(root / "b", 1)
            else:
                (root / "b").unlink()

    storage = Watched(LocalStorage(str(there)), meddle)
    report = sync_dir(root, storage, manifest, concurrency=1)
    assert (report.files_uploaded, report.failures, report.complete) == (2, (), False)
    assert [(d.trial, d.path) for d in report.deferred] == [("trial_1", "b")]
    assert "the next sync takes it" in report.deferred[0].message
    assert tree(there) == {"a": b"1", "b": b"the old one", "c": b"333"}
    assert sync_dir(root, storage, manifest).complete


def test_a_file_replaced_after_the_scan_arrives_whole(root: Path, manifest: Path) -> None:
    fill(root, {"a": b"1", "state.json": b"{...}"})
    fill(root.parent, {"new": b"{a longer state}"})

    def meddle(moment: str, path: str) -> None:
        if (moment, path) == ("before", "a"):
            (root.parent / "new").replace(root / "state.json")

    storage = Watched(LocalStorage(str(root.parent / "storage")), meddle)
    assert sync_dir(root, storage, manifest, concurrency=1).complete
    assert tree(root.parent / "storage")["state.json"] == b"{a longer state}"


def test_a_file_that_grows_during_its_upload_is_taken_again(root: Path, manifest: Path) -> None:
    fill(root, {"log": b"line 1\n"})
    there = root.parent / "storage"

    def meddle(moment: str, path: str) -> None:
        if moment == "before":
            with (root / "log").open("ab") as out:
                out.write(b"line 2\n")

    sync_dir(root, Watched(LocalStorage(str(there)), meddle), manifest)
    assert tree(there) == {"log": b"line 1\n"}
    assert sync_dir(root, LocalStorage(str(there)), manifest).files_uploaded == 1
    assert tree(there) == tree(root)


def test_contents_that_flicker_under_one_fingerprint(
    root: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On coarse clocks a file may be 0 when scanned, 1 when sent and 0 for ever after."""
    exact = Fingerprint.of
    monkeypatch.setattr(
        Fingerprint, "of", staticmethod(lambda s: exact(s)._replace(mtime_ns=0, ctime_ns=2**62))
    )
    fill(root, {"flag": b"0"})
    flips = {"before": b"1", "after": b"0"}

    def meddle(moment: str, path: str) -> None:
        if moment in flips:
            with (root / "flag").open("r+b") as out:
                out.write(flips[moment])

    there = root.parent / "storage"
    sync_dir(root, Watched(LocalStorage(str(there)), meddle), manifest)
    assert tree(there) == {"flag": b"1"}
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert tree(there) == {"flag": b"0"}
    assert report.files_uploaded == 1
    assert sync_dir(root, LocalStorage(str(there)), manifest).files_unchanged == 1
