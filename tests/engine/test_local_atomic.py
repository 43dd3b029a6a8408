"""Nobody who looks at a local destination ever sees a part of a file."""

from __future__ import annotations

import multiprocessing
import os
import socket
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.engine.fakes import Failing, tree
from tests.engine.support import entry_of, fill, put, sync_dir
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.source import CHUNK_BYTES, Source
from tune_sync_plugin.engine.storage import partial_path
from tune_sync_plugin.errors import SourceChangedError

SIZES = [3 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1, CHUNK_BYTES // 2]


def _content(number: int) -> bytes:
    """A file that says in each byte which one it is, so that a mixture shows."""
    return bytes([number % 251]) * SIZES[number % len(SIZES)]


def _watch(path: str, stop: Event, seen: multiprocessing.SimpleQueue[tuple[int, str]]) -> None:
    reads, problem = 0, ""
    while not stop.is_set() and not problem:
        try:
            with open(path, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            problem = "missing" if reads else ""
            continue
        reads += 1
        if len(content) not in SIZES or content.count(content[:1]) != len(content):
            problem = f"{len(content)} bytes, beginning with {content[:1]!r}"
    seen.put((reads, problem))


def test_a_reader_never_sees_a_partial_file(root: Path, manifest: Path) -> None:
    there = root.parent / "storage"
    context = multiprocessing.get_context("fork")
    stop, seen = context.Event(), context.SimpleQueue()
    reader = context.Process(target=_watch, args=(str(there / "file"), stop, seen), daemon=True)
    reader.start()
    try:
        for number in range(40):
            fill(root, {"file": _content(number)})
            assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    finally:
        stop.set()
    reads, problem = seen.get()
    reader.join(10)
    assert not problem
    assert reads > 5


def test_a_file_that_shrinks_leaves_the_old_one_whole(root: Path) -> None:
    there = root.parent / "storage"
    storage = LocalStorage(str(there))
    file = fill(root, {"a": b"old" * CHUNK_BYTES}) / "a"
    put(storage, file)
    file.write_bytes(b"newer" * CHUNK_BYTES)
    with Source(entry_of(file)) as source:
        os.truncate(file, CHUNK_BYTES + 1)
        with pytest.raises(SourceChangedError):
            storage.write("a", source, "run")
    assert tree(there) == {"a": b"old" * CHUNK_BYTES}


def test_readers_that_have_the_old_file_open_keep_it(root: Path) -> None:
    there = root.parent / "storage"
    file = fill(root, {"a": b"old"}) / "a"
    put(LocalStorage(str(there)), file)
    with (there / "a").open("rb") as reader:
        file.write_bytes(b"new and longer")
        put(LocalStorage(str(there)), file)
        assert reader.read() == b"old"


def test_partial_names_are_unique_short_and_beside_the_file() -> None:
    names = {partial_path(path, run) for path in ("a", "d/a", "d/b", "n" * 255) for run in "12"}
    assert len(names) == 8
    assert max(len(name) for name in names) < 60
    assert os.path.dirname(partial_path("d/e/a", "1")) == "d/e"


def test_a_stored_link_is_replaced_and_not_written_through(root: Path) -> None:
    there = fill(root.parent / "storage", {})
    there.mkdir()
    fill(root.parent, {"precious": b"keep me"})
    (there / "a").symlink_to(root.parent / "precious")
    put(LocalStorage(str(there)), fill(root, {"a": b"new"}) / "a")
    assert (root.parent / "precious").read_bytes() == b"keep me"
    assert not (there / "a").is_symlink()


def test_remove_takes_emptied_directories_and_nothing_else(root: Path) -> None:
    there = fill(root.parent / "storage", {"a/b/c": b"", "a/d": b"", "e": b""})
    storage = LocalStorage(str(there))
    storage.remove("a/b/c")
    assert sorted(path.name for path in there.rglob("*")) == ["a", "d", "e"]
    for path in ("a/b/c", "never", "e/x", "a"):
        storage.remove(path)
    assert sorted(tree(there)) == ["a/d", "e"]
    storage.remove("e")
    storage.remove("a/d")
    assert list(there.iterdir()) == []


def test_a_destination_that_was_deleted_is_made_anew(root: Path, manifest: Path) -> None:
    there = root.parent / "storage"
    storage = LocalStorage(str(there))
    fill(root, {"d/a": b"1"})
    sync_dir(root, storage, manifest)
    fill(root, {"d/b": b"2"})
    (there / "d" / "a").unlink()
    (there / "d").rmdir()
    assert sync_dir(root, storage, manifest).complete
    assert tree(there) == {"d/b": b"2"}


# -- what is no file, in a whole sync ------------------------------------------------------------


def test_special_files_are_named_and_the_rest_goes(root: Path, manifest: Path) -> None:
    fill(root, {"a": b"1", "d/b": b"2"})
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "d" / "sock"))
    (root / "loop").symlink_to("loop")
    (root / "d" / "up").symlink_to("..")
    (root / "dangling").symlink_to("nowhere")
    there = root.parent / "storage"
    for follow in (False, True):
        report = sync_dir(root, LocalStorage(str(there)), manifest, follow_symlinks=follow)
        assert report.complete, report.failures
        assert [entry.split(" (")[0] for entry in sorted(report.skipped)] == [
            *("d/sock", "d/up", "dangling", "fifo", "loop")
        ]
    assert tree(there) == {"a": b"1", "d/b": b"2"}


def test_names_that_can_not_be_stored_are_reported_by_name(root: Path, manifest: Path) -> None:
    fill(root, {"a": b"1"})
    os.close(os.open(os.fsencode(root) + b"/\xff", os.O_CREAT))
    report = sync_dir(root, LocalStorage(str(root.parent / "storage")), manifest)
    assert [(failure.path, failure.error) for failure in report.failures] == [("\\xff", "OSError")]
    assert "not valid UTF-8" in report.failures[0].message
    assert tree(root.parent / "storage") == {"a": b"1"}


def test_unreadable_files_are_reported_and_the_rest_goes(
    root: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, {"a": b"1", "closed": b"2"})
    real = os.open

    # Root may read everything, and tests run as root.
    def refuse(path: str, *args: int) -> int:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    report = sync_dir(root, LocalStorage(str(root.parent / "storage")), manifest)
    assert [failure.path for failure in report.failures] == ["closed"]
    assert "reading closed failed: Permission denied" in report.failures[0].message
    assert tree(root.parent / "storage") == {"a": b"1"}


def test_two_names_that_exclude_each_other_are_reported(root: Path, manifest: Path) -> None:
    """From two roots: one has a file where the other has a directory."""
    fill(root, {"a": b"1"})
    other = fill(root.parent / "other", {"a/b": b"22", "c": b"3"})
    storage = LocalStorage(str(root.parent / "storage"))
    report = sync_dir(root, storage, manifest, roots=[other])
    assert [failure.path for failure in report.failures] in (["a"], ["a/b"])
    assert tree(root.parent / "storage")["c"] == b"3"


def test_storage_in_the_way_of_a_file_is_reported(root: Path, manifest: Path) -> None:
    there = fill(root.parent / "storage", {"a/theirs": b"not ours to remove"})
    fill(root, {"a": b"1"})
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert [failure.path for failure in report.failures] == ["a"]
    assert tree(there) == {"a/theirs": b"not ours to remove"}


def test_a_failed_write_leaves_no_partial_file(root: Path, manifest: Path) -> None:
    fill(root, {"d/a": b"1"})
    there = root.parent / "storage"
    fill(there, {"d/a/in the way": b""})
    storage = Failing(LocalStorage(str(there)), lambda path: ConnectionError(), times=0)
    assert not sync_dir(root, storage, manifest).complete
    assert sorted(tree(there)) == ["d/a/in the way"]
