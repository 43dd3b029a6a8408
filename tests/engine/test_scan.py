"""A directory tree -> fingerprints: what counts as a file, and what its fingerprint notices."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tests.engine.support import fill
from tune_sync_plugin.engine import scan as scan_module
from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.scan import Fingerprint, Scan, State, scan

EVERYTHING = Filter()
S = 10**9
NOW = 1_700_000_000 * S + 123_456_789


def scan_one(root: Path, **options: bool) -> Scan:
    return scan([str(root)], EVERYTHING, **options)


def test_finds_every_file_at_any_depth(root: Path) -> None:
    files = {"a": b"1", "d/b": b"22", "d/e/f/.c": b"", " odd\n#?%*[x]\\ü": b"4444"}
    fill(root, files)
    found = scan_one(root)
    assert {path: entry.fingerprint.size for path, entry in found.files.items()} == {
        path: len(content) for path, content in files.items()
    }
    assert (found.skipped, found.failures, found.conflicts) == ([], [], [])


def test_never_opens_a_file(root: Path) -> None:
    # Opening this one for reading would block for ever; even stat'ing it costs nothing.
    os.mkfifo(root / "pipe")
    fill(root, {"a": b"1"})
    before = (root / "a").stat().st_atime_ns
    assert list(scan_one(root).files) == ["a"]
    assert (root / "a").stat().st_atime_ns == before


def test_missing_and_empty_roots_are_empty(root: Path, tmp_path: Path) -> None:
    assert scan([str(root), str(tmp_path / "never made")], EVERYTHING) == Scan(
        started_ns=pytest.approx(time.time_ns(), abs=60 * S)
    )


def test_root_that_is_a_file_is_a_failure(root: Path) -> None:
    fill(root, {"a": b""})
    assert [path for path, _ in scan_one(root / "a").failures] == [""]


def test_first_root_wins_and_the_conflict_is_named(root: Path, tmp_path: Path) -> None:
    fill(root, {"same": b"1", "mine": b""})
    other = fill(tmp_path / "other", {"same": b"22", "theirs": b""})
    found = scan([str(root), str(other)], EVERYTHING)
    assert set(found.files) == {"same", "mine", "theirs"}
    assert found.files["same"].fingerprint.size == 1
    assert found.conflicts == ["same"]


@pytest.mark.parametrize("follow_symlinks", [False, True])
def test_what_is_no_file_is_skipped_by_name(root: Path, follow_symlinks: bool) -> None:
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    (root / "null").symlink_to("/dev/null")
    (root / "dangling").symlink_to("nowhere")
    (root / "itself").symlink_to("itself")
    found = scan_one(root, follow_symlinks=follow_symlinks)
    assert sorted(found.skipped) == [
        "dangling (dangling link)",
        "fifo (not a regular file)",
        "itself (link loop)",
        "null (not a regular file)",
        "socket (not a regular file)",
    ]
    assert (found.files, found.failures) == ({}, [])


def test_links_to_files_are_files(root: Path, tmp_path: Path) -> None:
    target = fill(tmp_path, {"elsewhere": b"12345"}) / "elsewhere"
    (root / "link").symlink_to(target)
    entry = scan_one(root).files["link"]
    assert entry.fingerprint == Fingerprint.of(target.stat())


def test_links_to_directories_only_if_asked(root: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", {"a": b"1"})
    (root / "link").symlink_to(tmp_path / "elsewhere")
    found = scan_one(root)
    assert (found.files, found.skipped) == ({}, ["link (link to a directory)"])
    assert list(scan_one(root, follow_symlinks=True).files) == ["link/a"]


def test_link_loops_end(root: Path) -> None:
    fill(root, {"d/a": b"1"})
    (root / "d" / "up").symlink_to(root)
    (root / "d" / "here").symlink_to(".")
    found = scan_one(root, follow_symlinks=True)
    assert list(found.files) == ["d/a"]
    assert sorted(found.skipped) == ["d/here (link loop)", "d/up (link loop)"]
    assert found.failures == []


def test_the_same_directory_by_two_links_is_no_loop(root: Path) -> None:
    fill(root, {"d/a": b"1"})
    (root / "one").symlink_to("d")
    (root / "two").symlink_to("d")
    found = scan_one(root, follow_symlinks=True)
    assert sorted(found.files) == ["d/a", "one/a", "two/a"]


def test_names_that_are_not_utf8_are_reported_and_the_rest_goes(root: Path) -> None:
    fill(root, {"good": b"1", "sub/good": b"2"})
    os.mkdir(os.fsencode(root) + b"/d\xff")
    for name in (b"/bad\xff", b"/d\xff/x"):
        os.close(os.open(os.fsencode(root) + name, os.O_CREAT))
    os.symlink("itself\udcff", root / "itself\udcff")
    found = scan_one(root)
    assert sorted(found.files) == ["good", "sub/good"]
    # What is reported can be printed.
    assert sorted(path.encode() for path, _ in found.failures) == [
        *(b"bad\\xff", b"d\\xff/x", b"itself\\xff")
    ]


def test_unreadable_directory_is_reported_and_the_rest_goes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, {"closed/a": b"", "open/b": b""})
    listing = os.scandir

    # Root may read everything, and tests run as root.
    def refuse(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listing(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = scan_one(root)
    assert list(found.files) == ["open/b"]
    assert [(path, type(error)) for path, error in found.failures] == [("closed", PermissionError)]


def test_excluded_directories_are_not_walked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, {"keep/a": b"", "big/1/x": b"", "big/2/x": b""})
    walked: list[str] = []
    listing = os.scandir

    def note(path: str) -> object:
        walked.append(os.path.relpath(path, root))
        return listing(path)

    monkeypatch.setattr(os, "scandir", note)
    assert list(scan([str(root)], Filter(exclude=("big",))).files) == ["keep/a"]
    assert sorted(walked) == [".", "keep"]


# -- the fingerprint -----------------------------------------------------------------------------


def test_rewrite_with_restored_mtime_changes_the_fingerprint(root: Path) -> None:
    file = fill(root, {"a": b"one"}) / "a"
    os.utime(file, ns=(NOW, NOW))
    before = Fingerprint.of(file.stat())
    deadline = time.monotonic() + 5
    # Until the kernel's clock has ticked; is_racy covers what happens before.
    while Fingerprint.of(file.stat()) == before:
        assert time.monotonic() < deadline
        file.write_bytes(b"two")
        os.utime(file, ns=(NOW, NOW))
    after = Fingerprint.of(file.stat())
    assert (after.size, after.mtime_ns) == (before.size, before.mtime_ns)


def test_swapped_directories_change_the_fingerprint(root: Path) -> None:
    fill(root, {"one/a": b"1", "two/a": b"2"})
    for name in ("one/a", "two/a"):
        os.utime(root / name, ns=(NOW, NOW))
    before = scan_one(root).files["one/a"].fingerprint
    (root / "one").rename(root / "aside")
    (root / "two").rename(root / "one")
    assert scan_one(root).files["one/a"].fingerprint.inode != before.inode


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "racy"),
    [
        pytest.param(NOW, NOW, True, id="this moment"),
        pytest.param(NOW + S, NOW, True, id="in the future"),
        pytest.param(NOW - S // 100, NOW - S, True, id="one tick ago"),
        pytest.param(NOW - S, NOW - S // 100, True, id="one tick ago, mtime restored"),
        pytest.param(NOW - S // 10, NOW - S // 10, False, id="a tenth ago"),
        pytest.param(NOW // S * S, NOW // S * S, True, id="this second, times in seconds"),
        pytest.param(NOW // S * S - S, NOW // S * S - S, True, id="last second, in seconds"),
        pytest.param(NOW // S * S - 3 * S, NOW // S * S - 3 * S, False, id="older, in seconds"),
        pytest.param(NOW // S * S, NOW - S // 2, False, id="only mtime in seconds: utime"),
    ],
)
def test_racy(mtime_ns: int, ctime_ns: int, racy: bool) -> None:
    assert Fingerprint(1, mtime_ns, ctime_ns, 1).is_racy(NOW) is racy


def test_a_file_written_before_the_scan_is_racy_for_as_long_as_a_rewrite_could_hide(
    root: Path,
) -> None:
    """The kernel's own clock: whatever leaves the fingerprint as it was must have been racy."""
    file = fill(root, {"a": b"0"}) / "a"
    hidden = 0
    for number in range(300):
        file.write_bytes(b"%d" % (number % 10))
        found = scan_one(root)
        before = found.files["a"].fingerprint
        with file.open("r+b") as out:
            out.write(b"x")
        if Fingerprint.of(file.stat()) == before:
            hidden += 1
            assert before.is_racy(found.started_ns)
    # Otherwise this machine's clock is so fine that the test has shown nothing.
    if not hidden:
        pytest.skip("no rewrite fell into the tick of the scan")


# -- what is known -------------------------------------------------------------------------------


def known(root: Path) -> set[State]:
    found = scan([str(root)], Filter()).files
    return {(path, *entry.fingerprint) for path, entry in found.items()}


@pytest.fixture
def aged(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose files have been as they are for some seconds."""
    fill(root, {"a": b"1", "d/b": b"22", "d/c": b"333"})
    monkeypatch.setattr(scan_module, "_SETTLED_NS", -3_600_000_000_000)
    return root


def test_what_is_as_it_is_known_to_be_is_only_counted(aged: Path) -> None:
    before = known(aged)
    (aged / "d" / "b").write_bytes(b"new")
    result = scan([str(aged)], Filter(), known=before)
    assert set(result.files) == {"d/b"}
    assert (result.unchanged, result.bytes_unchanged) == ({"a", "d/c"}, 4)
    assert not result.is_empty


@pytest.mark.parametrize("field", range(1, 5), ids=["size", "mtime", "ctime", "inode"])
def test_every_fact_counts(aged: Path, field: int) -> None:
    before = {(*state[:field], state[field] + 1, *state[field + 1 :]) for state in known(aged)}
    assert set(scan([str(aged)], Filter(), known=before).files) == {"a", "d/b", "d/c"}


def test_what_changed_a_moment_ago_may_be_changing_still(root: Path) -> None:
    """The plan decides about it, by looking more closely."""
    fill(root, {"a": b"1"})
    os.utime(root / "a", (0, 0))  # its ctime is now
    assert set(scan([str(root)], Filter(), known=known(root)).files) == {"a"}


@pytest.mark.parametrize("known_one", ["first", "second", "both"])
def test_of_two_with_one_path_the_first_counts_whichever_is_known(
    aged: Path, tmp_path: Path, known_one: str
) -> None:
    other = fill(tmp_path / "other", {"a": b"4444", "e": b"5"})
    before = {"first": known(aged), "second": known(other), "both": known(aged) | known(other)}
    result = scan([str(aged), str(other)], Filter(), known=before[known_one])
    assert result.conflicts == ["a"]
    assert ("a" in result.unchanged) == (known_one != "second")
    if "a" in result.files:
        assert result.files["a"].location == str(aged / "a")
    assert result.unchanged | result.files.keys() == {"a", "d/b", "d/c", "e"}


def test_what_is_known_may_still_be_filtered(aged: Path) -> None:
    result = scan([str(aged)], Filter(exclude=("d",)), known=known(aged))
    assert (result.unchanged, result.files) == ({"a"}, {})
