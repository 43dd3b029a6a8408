"""The manifest: opening it never fails, and it never claims more than storage holds."""

from __future__ import annotations

import os
import resource
import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.engine.fakes import Failing, Hanging, tree
from tests.engine.support import fill, sync_dir
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.scan import Fingerprint
from tune_sync_plugin.engine.storage import partial_path

HERE = "local:/results/trial"
RECORD = Record(Fingerprint(3, 2**62, 5, 7), "c" * 32, root="trial_dir")
RACY = Record(Fingerprint(0, 1, 1, 2**62), "d" * 32, racy=True)


def opened(path: Path, destination: str = HERE) -> Manifest:
    return Manifest(str(path), destination)


def filled(path: Path) -> None:
    manifest = opened(path)
    manifest.withdraw(["a", "odd\n ü", "c"])
    manifest.record({"a": RECORD, "odd\n ü": RACY})
    manifest.close()


def records_of(path: Path, storage: LocalStorage) -> dict[str, Record]:
    manifest = opened(path, storage.name)
    known = manifest.load()
    manifest.close()
    return known


def test_remembers_exactly(manifest: Path) -> None:
    filled(manifest)
    again = opened(manifest)
    assert again.warning is None
    known = again.load()
    assert (known["a"], known["odd\n ü"]) == (RECORD, RACY)
    assert isinstance(known["a"].fingerprint, Fingerprint)


def test_a_withdrawn_path_matches_no_file(manifest: Path) -> None:
    filled(manifest)
    again = opened(manifest)
    again.withdraw(["a"])
    for path in ("a", "c"):
        assert again.load()[path].fingerprint.size == -1


def test_forget(manifest: Path) -> None:
    filled(manifest)
    again = opened(manifest)
    again.forget(["a", "unknown"])
    assert set(again.load()) == {"odd\n ü", "c"}


def test_another_destination_starts_empty(manifest: Path) -> None:
    filled(manifest)
    other = opened(manifest, "local:/elsewhere")
    assert (other.load(), other.interrupted(), other.warning) == ({}, None, None)
    other.withdraw(["b"])
    other.close()
    assert opened(manifest).load() == {}


def test_interrupted_names_the_run_and_what_it_had_begun(manifest: Path) -> None:
    first = opened(manifest)
    assert first.interrupted() is None
    first.withdraw(["a", "b"])
    first.record({"a": RECORD})
    first.close()
    second = opened(manifest)
    assert second.interrupted() == (first.run_id, ["b"])
    assert second.run_id != first.run_id
    second.settle()
    second.close()
    assert opened(manifest).interrupted() is None


# -- files that are no manifest ------------------------------------------------------------------


def check_set_aside(first: Manifest, manifest: Path) -> list[Path]:
    """What was there is kept under a name that the warning tells."""
    aside = [
        path
        for path in manifest.parent.glob("*.corrupt-*")
        if not path.name.endswith(("-wal", "-shm"))
    ]
    assert [path for path in aside if f"set aside as {path} " in str(first.warning)] == aside != []
    assert first.damaged
    return aside


@pytest.mark.parametrize("content", [b"no database at all" * 99, b"SQLite format 3\0" + b"x" * 99])
def test_garbage_is_set_aside(manifest: Path, content: bytes) -> None:
    fill(manifest.parent, {manifest.name: content})
    first = opened(manifest)
    (aside,) = check_set_aside(first, manifest)
    assert aside.read_bytes() == content
    first.withdraw(["a"])
    first.record({"a": RECORD})
    first.close()
    second = opened(manifest)
    assert second.warning is None
    assert second.load() == {"a": RECORD}


def test_tables_of_another_shape_are_set_aside(manifest: Path) -> None:
    manifest.parent.mkdir()
    with sqlite3.connect(manifest) as database:
        database.execute("CREATE TABLE files (path TEXT PRIMARY KEY, something TEXT)")
        database.execute("CREATE TABLE meta (other TEXT)")
    database.close()
    first = opened(manifest)
    check_set_aside(first, manifest)
    assert first.load() == {}


def test_a_path_that_is_not_utf8_is_set_aside(manifest: Path) -> None:
    filled(manifest)
    with sqlite3.connect(manifest) as database:
        database.execute("UPDATE files SET path = CAST(x'ff00' AS TEXT) WHERE path = 'a'")
    database.close()
    first = opened(manifest)
    check_set_aside(first, manifest)
    assert first.load() == {}


@settings(max_examples=10, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
@given(
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=40),
    keep=st.floats(0.2, 1),
)
@example(damage=[(36328, 128)], keep=1.0)  # sqlite3 can't decode its own error message
def test_a_sync_survives_any_damage(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]], keep: float
) -> None:
    """Flipped bytes may cost uploads; they may not stop a sync now nor the ones after it."""
    base = tmp_path_factory.mktemp("damage")
    root = fill(base / "trial", {f"{n}": b"%d" % n for n in range(40)})
    storage, manifest = LocalStorage(str(base / "storage")), base / "m.sqlite"
    sync_dir(root, storage, manifest)
    content = bytearray(manifest.read_bytes()[: int(manifest.stat().st_size * keep)])
    for position, value in damage:
        content[position % len(content)] = value
    manifest.write_bytes(content)
    fill(root, {"new": b"new"})
    for _ in range(2):
        report = sync_dir(root, storage, manifest)
        assert report.complete, (report.failures, report.warnings)
    assert tree(base / "storage")["new"] == b"new"


def test_where_a_directory_should_be_is_a_file(root: Path, tmp_path: Path) -> None:
    fill(tmp_path, {"manifests": b"a file"})
    fill(root, {"a": b"1"})
    storage = LocalStorage(str(tmp_path / "storage"))
    for uploaded in (1, 0):
        report = sync_dir(root, storage, tmp_path / "manifests" / "m.sqlite")
        assert (report.files_uploaded, report.complete) == (uploaded, True)
        assert "every sync compares or uploads everything again" in report.warnings[0]
    assert tree(tmp_path / "storage") == {"a": b"1"}
    assert (tmp_path / "manifests").read_bytes() == b"a file"


def test_where_the_file_should_be_is_a_directory(manifest: Path) -> None:
    fill(manifest, {"kept": b"1"})
    first = opened(manifest)
    (aside,) = check_set_aside(first, manifest)
    assert tree(aside) == {"kept": b"1"}
    first.withdraw(["a"])
    first.record({"a": RECORD})
    first.close()
    assert opened(manifest).load() == {"a": RECORD}


def test_a_full_disk_costs_the_manifest_and_not_the_sync(root: Path, tmp_path: Path) -> None:
    """The disk that is full is the node's; storage is another one."""
    storage, manifest = LocalStorage(str(tmp_path / "storage")), tmp_path / "m.sqlite"
    names = [f"{n:03}".ljust(240, "n") for n in range(200)]
    fill(root, dict.fromkeys(names, b"old"))
    assert sync_dir(root, storage, manifest).complete
    fill(root, dict.fromkeys(names, b"newer"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # Opening still works; the first large change does not.
            limit = 40_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            report = sync_dir(root, storage, manifest)
            status = 0 if report.complete and "can't be used" in report.warnings[0] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tree(tmp_path / "storage") == tree(root)
    # What it had claimed is gone with it.
    assert sync_dir(root, storage, manifest).files_uploaded == 200


# -- in a sync -----------------------------------------------------------------------------------


def test_a_failed_upload_withdraws_what_was_claimed(root: Path, manifest: Path) -> None:
    storage = LocalStorage(str(root.parent / "storage"))
    fill(root, {"a": b"1", "b": b"1"})
    sync_dir(root, storage, manifest)
    fill(root, {"a": b"22", "b": b"22"})
    refused = Failing(storage, lambda path: PermissionError(13, "no"), affects={"a"}.__contains__)
    assert [f.path for f in sync_dir(root, refused, manifest).failures] == ["a"]
    known = opened(manifest, storage.name).load()
    assert (known["a"].fingerprint.size, known["b"].fingerprint.size) == (-1, 2)


def test_a_sync_that_runs_out_of_time_keeps_what_it_did(root: Path, manifest: Path) -> None:
    storage = LocalStorage(str(root.parent / "storage"))
    fill(root, {"a": b"1", "hung": b"22"})
    hanging = Hanging(storage, {"hung"})
    try:
        assert sync_dir(root, hanging, manifest, timeout_s=1.5).timed_out
    finally:
        hanging.release()
    report = sync_dir(root, storage, manifest)
    assert (report.files_uploaded, report.files_unchanged, report.complete) == (1, 1, True)


def test_what_a_killed_sync_left_is_removed_though_its_file_is_gone(
    root: Path, manifest: Path
) -> None:
    storage = LocalStorage(str(root.parent / "storage"))
    fill(root, {"a": b"1", "b": b"1"})
    # Until there is nothing left to compare, so that the sync below has nothing else to do.
    while not (known := records_of(manifest, storage)) or any(r.racy for r in known.values()):
        sync_dir(root, storage, manifest)
    killed = opened(manifest, storage.name)
    killed.withdraw(["b"])
    killed.close()
    half = root.parent / "storage" / partial_path("b", killed.run_id)
    half.write_bytes(b"h")
    (root / "b").unlink()
    assert sync_dir(root, storage, manifest).complete
    assert not half.exists()
    assert sorted(tree(root.parent / "storage")) == ["a", "b"]


def test_a_directory_moved_away_and_back_around_a_kill_is_uploaded_again(
    root: Path, manifest: Path
) -> None:
    """Its files come back with the very fingerprints that were recorded."""
    there = str(root.parent / "storage")
    fill(root, {"d/a": b"1"})
    os.utime(root / "d" / "a", (1, 1))
    sync_dir(root, LocalStorage(there), manifest)
    (root / "d").rename(root.parent / "aside")
    fill(root, {"d": b"a file"})

    class KilledAfterRemoval(LocalStorage):
        def remove(self, path: str) -> None:
            super().remove(path)
            raise SystemExit("as a kill would, this ends the sync here")

    with pytest.raises(SystemExit):
        sync_dir(root, KilledAfterRemoval(there), manifest)
    (root / "d").unlink()
    (root.parent / "aside").rename(root / "d")
    assert sync_dir(root, LocalStorage(there), manifest).complete
    assert tree(there) == {"d/a": b"1"}


@pytest.mark.parametrize("error", [PermissionError(13, "no"), ConnectionError("gone")])
def test_what_can_not_be_removed_is_reported_and_the_rest_goes(
    root: Path, manifest: Path, error: OSError
) -> None:
    storage = LocalStorage(str(root.parent / "storage"))
    fill(root, {"a": b"1"})
    sync_dir(root, storage, manifest)
    (root / "a").unlink()
    fill(root, {"a/b": b"2", "c": b"3"})

    class Unremovable(LocalStorage):
        def remove(self, path: str) -> None:
            raise error

    report = sync_dir(root, Unremovable(str(root.parent / "storage")), manifest)
    assert {failure.path for failure in report.failures} == {"a", "a/b"}
    assert tree(root.parent / "storage") == {"a": b"1", "c": b"3"}
    assert sync_dir(root, storage, manifest).complete
    assert tree(root.parent / "storage") == {"a/b": b"2", "c": b"3"}
