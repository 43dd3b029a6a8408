"""Disks that are full: the storage's, and the node's own while the manifest is written.

Real file systems of two megabytes, mounted for the test, and the engine's ``sync`` between real
directories. What a sync makes of errors that a storage raises is in tests/engine.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.fakes import tree
from tests.engine.support import fill, sync_dir
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.report import SyncReport

SIZE = 2 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of two megabytes."""
    path = tmp_path / "small_disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` here")
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is refused here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "trial"
    path.mkdir()
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return tmp_path / "tune_sync" / "m.sqlite"


def eat(disk: Path, leave: int = 0) -> Path:
    """Fill a file system up to ``leave`` bytes, with a file that is not ours."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - leave))
    return ballast


def size_of(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def failed(report: SyncReport) -> set[str]:
    return {failure.path for failure in report.failures}


# -- storage is full -------------------------------------------------------------------------------


def test_storage_is_full(
    root: Path, manifest: Path, small_disk: Path, figure: Callable[..., None]
) -> None:
    there = small_disk / "storage"
    storage = LocalStorage(str(there))
    old = {"small": b"s" * 1000, "large": b"old" * 100_000}
    fill(root, old)
    assert sync_dir(root, storage, manifest).complete

    ballast = eat(small_disk, leave=600_000)
    written = {f"fits_{n}": bytes([n]) * 50_000 for n in range(5)}
    written |= {"small": b"S" * 2000, "large": b"new" * 400_000, "too_large": b"x" * SIZE}
    fill(root, written)
    # One after the other, small ones first; side by side they could take each other's room.
    report = sync_dir(root, storage, manifest, concurrency=1)

    stored = tree(there)
    assert failed(report) == {"large", "too_large"}
    for failure in report.failures:
        assert failure.error == "OSError"
        assert "No space left on device" in failure.message
    assert not report.timed_out
    # What fits is there, what does not is what it was before, and nobody sees half of one.
    fits = {path: content for path, content in written.items() if path not in failed(report)}
    assert stored == fits | {"large": old["large"]}

    # Still full: named again, nothing else is sent again.
    report = sync_dir(root, storage, manifest, concurrency=1)
    assert failed(report) == {"large", "too_large"}
    assert report.files_uploaded == 0
    assert tree(there) == stored

    lost = sum(len(written[path]) for path in failed(report))
    figure("storage full", written=size_of(written), stored=size_of(fits), lost=lost)
    assert size_of(fits) + lost == size_of(written)

    # Space returns, but still not for all of it.
    ballast.unlink()
    # One at a time: what does not fit must not take the room of what does.
    again = sync_dir(root, storage, manifest, concurrency=1)
    assert failed(again) == {"too_large"}
    (root / "too_large").write_bytes(b"now it fits")
    assert sync_dir(root, storage, manifest).complete
    assert tree(there) == tree(root)


def test_storage_that_fills_up_under_parallel_uploads(
    root: Path, manifest: Path, small_disk: Path
) -> None:
    """Which ones fit is chance; that each is whole or named is not."""
    there = small_disk / "storage"
    ballast = eat(small_disk, leave=600_000)
    written = {f"file_{n:02}": bytes([n]) * 100_000 for n in range(16)}
    fill(root, written)
    torn: list[str] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            torn.extend(
                path for path, content in _visible(there).items() if content != written.get(path)
            )

    reader = threading.Thread(target=read)
    reader.start()
    try:
        report = sync_dir(root, LocalStorage(str(there)), manifest)
    finally:
        over.set()
        reader.join(20)
    assert not torn
    stored = tree(there)
    assert stored == {path: written[path] for path in written.keys() - failed(report)}
    assert 1 <= len(stored) < len(written)
    assert report.files_uploaded == len(stored)

    ballast.unlink()
    assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    assert tree(there) == tree(root)


def _visible(there: Path) -> dict[str, bytes]:
    """What a reader that lists the directory takes for files."""
    found = {}
    for path in sorted(there.glob("file_*")):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.read_bytes()
    return found


def test_storage_without_room_for_a_directory(root: Path, manifest: Path, small_disk: Path) -> None:
    there = small_disk / "storage"
    there.mkdir()
    ballast = eat(small_disk)
    fill(root, {"a": b"1" * 10_000, "deep/b": b"2" * 10_000, "deep/empty": b""})
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    # An empty one needs no room, or a little for its name.
    assert {"a", "deep/b"} <= failed(report) <= {"a", "deep/b", "deep/empty"}
    assert set(tree(there)) == {"a", "deep/b", "deep/empty"} - failed(report)
    ballast.unlink()
    assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    assert tree(there) == tree(root)


# -- the node's own disk is full -------------------------------------------------------------------


def check_usable(manifest: Path) -> None:
    """Whatever is left of a manifest must be a database without damage."""
    if manifest.exists():
        with contextlib.closing(sqlite3.connect(manifest)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 45_000, 80_000, 120_000, 200_000])
def test_the_nodes_disk_is_full(
    root: Path, tmp_path: Path, small_disk: Path, figure: Callable[..., None], leave: int
) -> None:
    """No room for a manifest, or for its beginning only: the files are what counts."""
    there, manifest = tmp_path / "storage", small_disk / "tune_sync" / "m.sqlite"
    ballast = eat(small_disk, leave)
    names = [f"{n:03}".ljust(240, "n") for n in range(300)]
    written = {name: f"old {name}".encode() for name in names}
    fill(root, written)
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert report.complete, report.failures
    assert tree(there) == written
    assert len(report.warnings) == 1
    assert "can't be used" in report.warnings[0]
    assert report.warnings[0].count(str(manifest)) == 1
    figure(
        f"node's disk full but for {leave:,} B",
        written=size_of(written),
        stored=size_of(tree(there)),
    )

    # Space returns: one full sync, and from then on it is remembered again.
    ballast.unlink()
    check_usable(manifest)
    fill(root, {names[0]: b"new"})
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert report.complete
    assert report.warnings == ()
    assert tree(there) == tree(root)
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert report.files_uploaded == 0
    assert report.warnings == ()


@pytest.mark.parametrize("leave", [0, 4096, 16_000, 40_000, 70_000, 100_000, 150_000])
def test_the_nodes_disk_fills_up_between_syncs(
    root: Path, tmp_path: Path, small_disk: Path, leave: int
) -> None:
    """What the manifest claims must not outlive what is about to be overwritten."""
    there, manifest = tmp_path / "storage", small_disk / "tune_sync" / "m.sqlite"
    names = [f"{n:03}".ljust(240, "n") for n in range(300)]
    names = [f"dir/{name}" for name in names]
    fill(root, dict.fromkeys(names, b"old"))
    assert sync_dir(root, LocalStorage(str(there)), manifest).warnings == ()

    ballast = eat(small_disk, leave)
    (root / "dir").rename(tmp_path / "aside")
    fill(root, dict.fromkeys(names, b"newer"))
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    assert report.complete, report.failures
    assert tree(there) == dict.fromkeys(names, b"newer")

    # The old files come back, with the fingerprints they had, since only their directory moved. A
    # manifest that still claimed them would be believed.
    ballast.unlink()
    check_usable(manifest)
    (root / "dir").rename(tmp_path / "newer")
    (tmp_path / "aside").rename(root / "dir")
    assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    assert tree(there) == dict.fromkeys(names, b"old")
    assert sync_dir(root, LocalStorage(str(there)), manifest).files_uploaded == 0


def test_both_are_full(root: Path, small_disk: Path) -> None:
    """As on a machine whose one disk holds training's files, ours and a local storage."""
    there, manifest = small_disk / "storage", small_disk / "tune_sync" / "m.sqlite"
    fill(root, {"a": b"old", "b": b"b" * 1000})
    assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    ballast = eat(small_disk)
    fill(root, {"a": b"new" * 1000, "c": b"c" * 10_000})
    report = sync_dir(root, LocalStorage(str(there)), manifest)
    # "b" too may be named: without a manifest nobody knows that storage has it.
    assert {"c"} <= failed(report) <= {"a", "b", "c"}
    stored = tree(there)
    assert stored["a"] in (b"old", b"new" * 1000)
    assert stored == {"a": stored["a"], "b": b"b" * 1000}
    ballast.unlink()
    check_usable(manifest)
    assert sync_dir(root, LocalStorage(str(there)), manifest).complete
    assert tree(there) == tree(root)
