"""The truth table in ``make_plan``'s docstring, row by row."""

from __future__ import annotations

import pytest

from tune_sync_plugin.engine.plan import Plan, Reason, Record, Upload, make_plan
from tune_sync_plugin.engine.scan import FileEntry, Fingerprint

OLD = Fingerprint(10, 1, 1, 7)
SCANNED_NS = 10**12
FUTURE = OLD._replace(ctime_ns=SCANNED_NS + 1)
UNFINISHED = Record(Fingerprint(-1, -1, -1, -1))


def plan(
    local: dict[str, Fingerprint], known: dict[str, Record], *, has_directories: bool = True
) -> Plan:
    files = {path: FileEntry(path, f"/root/{path}", facts) for path, facts in local.items()}
    gone = known.keys() - files.keys() if has_directories else ()
    return make_plan(files, known, gone=gone, scanned_ns=SCANNED_NS)


def decisions(result: Plan) -> list[tuple[str, Reason]]:
    return [(upload.entry.path, upload.reason) for upload in result.uploads]


@pytest.mark.parametrize(
    ("local", "known", "reason"),
    [
        pytest.param(OLD, None, Reason.NEW, id="nothing known"),
        pytest.param(OLD._replace(size=0), None, Reason.NEW, id="nothing known, empty"),
        pytest.param(OLD._replace(size=11), Record(OLD), Reason.APPENDED, id="larger"),
        pytest.param(OLD._replace(size=11, inode=8), Record(OLD), Reason.CHANGED, id="replaced"),
        pytest.param(OLD._replace(size=9), Record(OLD), Reason.CHANGED, id="smaller"),
        pytest.param(OLD._replace(mtime_ns=2), Record(OLD), Reason.CHANGED, id="mtime"),
        pytest.param(OLD._replace(mtime_ns=0), Record(OLD), Reason.CHANGED, id="mtime, older"),
        pytest.param(OLD._replace(ctime_ns=2), Record(OLD), Reason.CHANGED, id="ctime"),
        pytest.param(OLD._replace(inode=8), Record(OLD), Reason.CHANGED, id="inode"),
        pytest.param(OLD, UNFINISHED, Reason.CHANGED, id="upload never ended"),
        pytest.param(OLD._replace(size=0), UNFINISHED, Reason.CHANGED, id="empty, never ended"),
        pytest.param(
            OLD._replace(mtime_ns=2), Record(OLD, "d", True), Reason.CHANGED, id="racy, old"
        ),
        pytest.param(OLD, Record(OLD, "d", True), Reason.UNPROVEN, id="racy"),
        pytest.param(FUTURE, Record(FUTURE), Reason.UNPROVEN, id="the clock was put back"),
        pytest.param(FUTURE, Record(FUTURE, "d", True), Reason.UNPROVEN, id="racy before and now"),
        pytest.param(OLD, Record(OLD), None, id="the same"),
        pytest.param(OLD, Record(OLD, "d"), None, id="the same, with a checksum"),
    ],
)
def test_one_file(local: Fingerprint, known: Record | None, reason: Reason | None) -> None:
    result = plan({"a": local}, {"a": known} if known else {})
    assert decisions(result) == ([("a", reason)] if reason else [])
    assert result.files_unchanged == (0 if reason else 1)
    assert result.bytes_unchanged == (0 if reason else local.size)
    assert result.removals == []


def test_what_was_sent_is_known_to_whoever_compares() -> None:
    known = {"racy": Record(OLD, "r", racy=True), "changed": Record(UNFINISHED.fingerprint, "c")}
    result = plan({"racy": OLD, "changed": OLD}, known)
    assert {upload.entry.path: upload.sent.checksum for upload in result.uploads} == {
        "racy": "r",
        "changed": "c",
    }


def test_local_deletions_are_not_propagated() -> None:
    assert plan({"b": OLD}, {"a": Record(OLD), "c/d": Record(OLD)}).removals == []


@pytest.mark.parametrize(
    ("local", "known", "removals"),
    [
        pytest.param(["a/b"], ["a"], ["a"], id="file became a directory"),
        pytest.param(["a/b/c"], ["a"], ["a"], id="deeper"),
        pytest.param(["a"], ["a/b", "a/c/d", "ab"], ["a/b", "a/c/d"], id="directory became a file"),
        pytest.param(["a"], ["a", "ab/c", "b"], [], id="nothing in the way"),
        pytest.param(["d/a"], ["d/b", "d/ab"], [], id="siblings"),
    ],
)
def test_only_what_is_in_the_way_is_removed(
    local: list[str], known: list[str], removals: list[str]
) -> None:
    files, records = dict.fromkeys(local, OLD), dict.fromkeys(known, UNFINISHED)
    assert sorted(plan(files, records).removals) == removals
    assert plan(files, records, has_directories=False).removals == []


def test_nothing_is_removed_for_nothing() -> None:
    """Without an upload there is no file to make room for."""
    assert plan({"a": OLD}, {"a": Record(OLD), "a/b": Record(OLD)}) == Plan(
        files_unchanged=1, bytes_unchanged=10
    )


def test_small_files_go_first_and_the_order_is_fixed() -> None:
    sizes = {"z": 5, "big": 10**9, "a": 5, "empty": 0}
    result = plan({path: OLD._replace(size=size) for path, size in sizes.items()}, {})
    assert [upload.entry.path for upload in result.uploads] == ["empty", "a", "z", "big"]
    assert isinstance(result.uploads[0], Upload)
