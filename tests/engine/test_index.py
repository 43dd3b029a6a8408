"""The index in storage: every damage is noticed; it is written when it must be, and no oftener."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.fakes import Failing, ObjectStorage, Watched
from tests.engine.support import Disk, fill, put, sync_dir
from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine import pool
from tune_sync_plugin.engine import sync as sync_module
from tune_sync_plugin.engine.index import INDEX, Entry, Index, IndexDamagedError, parse, serialize
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.sync import SyncOptions

sums = st.one_of(
    st.just(""),
    st.text("0123456789abcdef", min_size=32, max_size=32),
    st.text("0123456789abcdef", min_size=32, max_size=32).map(lambda text: f"{text}-3/10485760"),
)
texts = st.text(st.characters(codec="utf-8"), max_size=9)
entries = st.builds(Entry, st.none() | st.integers(0, 2**62), sums, texts)
SAMPLE = Index({"a b/ü\n": Entry(3, "0" * 32, "trial_dir"), "c": Entry()}, "node-1")


@pytest.fixture
def there(root: Path) -> LocalStorage:
    return LocalStorage(str(root.parent / "storage"))


# -- its bytes -----------------------------------------------------------------------------------


@given(st.dictionaries(texts, entries, max_size=5), texts)
def test_round_trip(found: dict[str, Entry], writer: str) -> None:
    assert parse(serialize(Index(found, writer))) == Index(found, writer)


def test_of_equal_content_has_equal_bytes() -> None:
    turned = Index(dict(reversed(SAMPLE.entries.items())), SAMPLE.writer)
    assert serialize(turned) == serialize(SAMPLE)


def test_truncated_anywhere() -> None:
    data = serialize(SAMPLE)
    for length in range(len(data)):
        with pytest.raises(IndexDamagedError):
            parse(data[:length])


@given(st.data())
def test_a_changed_byte_anywhere(data: st.DataObject) -> None:
    """Or else it says the same: some bytes in a JSON file are mere spaces."""
    content = bytearray(serialize(SAMPLE))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(IndexDamagedError):
        assert parse(bytes(content)) == SAMPLE


def resealed(change: Callable[[Any], Any], **facts: Any) -> bytes:
    """An index whose own checksum is right and whose content is not ours."""
    body = json.dumps(change({"a": [3, "0" * 32, ""]})).encode()
    head = {"version": 1, "writer": "w", "md5": indexes._digest("w", body)}
    return json.dumps(head | facts).encode() + b"\n" + body


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\0" * 99, id="zeros"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"null\n", id="no facts"),
        pytest.param(resealed(lambda body: body, version=2), id="version"),
        pytest.param(resealed(lambda body: body, version="1"), id="version, as text"),
        pytest.param(resealed(lambda body: body, writer=7), id="writer"),
        pytest.param(resealed(lambda body: body, md5=None), id="checksum"),
        pytest.param(resealed(lambda body: [body]), id="a list"),
        pytest.param(resealed(lambda body: None), id="nothing"),
        pytest.param(resealed(lambda body: {"a": 3}), id="entry"),
        pytest.param(resealed(lambda body: {"a": [3, ""]}), id="entry, too short"),
        pytest.param(resealed(lambda body: {"a": [3, "", "", ""]}), id="entry, too long"),
        pytest.param(resealed(lambda body: {"a": ["3", "", ""]}), id="size"),
        pytest.param(resealed(lambda body: {"a": [True, "", ""]}), id="size, boolean"),
        pytest.param(resealed(lambda body: {"a": [1.5, "", ""]}), id="size, fraction"),
        pytest.param(resealed(lambda body: {"a": [-1, "", ""]}), id="size, negative"),
        pytest.param(resealed(lambda body: {"a": [2**63, "", ""]}), id="size, beyond SQLite"),
        pytest.param(resealed(lambda body: {"a": [1, None, ""]}), id="sum"),
        pytest.param(resealed(lambda body: {"a": [1, "xyz", ""]}), id="sum, no MD5"),
        pytest.param(resealed(lambda body: {"a": [1, "0" * 32 + "-2/0", ""]}), id="sum, parts"),
        pytest.param(resealed(lambda body: {"a": [1, "", None]}), id="root"),
        pytest.param(resealed(lambda body: {"a": [1, "", []]}), id="root, a list"),
        pytest.param(resealed(lambda body: {"\ud800": [1, "", ""]}), id="path, no text"),
    ],
)
def test_what_makes_no_sense(data: bytes) -> None:
    with pytest.raises(IndexDamagedError):
        parse(data)
    assert parse(resealed(lambda body: body)).entries == {"a": Entry(3, "0" * 32)}


# -- in storage ----------------------------------------------------------------------------------


@pytest.fixture
def bench(root: Path, manifest: Path, there: LocalStorage) -> Disk:
    return Disk(root, manifest, there)


def test_names_what_was_sent(bench: Disk) -> None:
    fill(bench.root, {"a": b"1", "d/b": b"22"})
    assert bench.sync().complete
    found = bench.index()
    assert found.writer == "node-1"
    assert {path: entry.size for path, entry in found.entries.items()} == {"a": 1, "d/b": 2}
    assert found.entries["a"].checksum == "xxh3:df3ce784d856334d65cd25028f98f158"


def test_is_written_when_the_set_of_paths_has_changed(bench: Disk) -> None:
    fill(bench.root, {"a": b"1"})
    bench.sync()
    assert bench.storage.writes == ["a", INDEX]
    fill(bench.root, {"b": b"1"})
    bench.sync()
    assert bench.storage.writes == ["b", INDEX]


def test_is_not_written_when_only_contents_have(bench: Disk) -> None:
    fill(bench.root, {"a": b"1"})
    bench.sync()
    fill(bench.root, {"a": b"22"})
    bench.sync()
    assert bench.storage.writes == ["a"]
    assert bench.index().entries["a"].size == 1


def test_is_written_then_if_that_is_forced_but_once(bench: Disk) -> None:
    fill(bench.root, {"a": b"1"})
    bench.sync()
    fill(bench.root, {"a": b"22"})
    bench.settle()
    bench.sync(forced=True)
    assert bench.storage.writes == [INDEX]
    assert bench.index().entries["a"].size == 2
    bench.sync(forced=True)
    assert bench.storage.writes == []


def test_nothing_new_costs_no_request(bench: Disk) -> None:
    fill(bench.root, {"a": b"1", "b": b"2"})
    bench.settle()
    for forced in (False, True, False):
        bench.sync(forced=forced)
    bench.sync(forced=True)
    assert bench.storage.requests == 0


def test_one_percent_changed_costs_its_uploads_and_one(bench: Disk) -> None:
    fill(bench.root, {f"{n:03}": b"%d" % n for n in range(200)})
    bench.settle()
    fill(bench.root, {"007": b"changed", "070": b"changed"})
    bench.sync(forced=True)
    # What was written is looked at, too.
    assert bench.storage.kinds() == {"write": 3, "stat": 2}
    assert sorted(bench.storage.writes) == [INDEX, "007", "070"]
    fill(bench.root, {"007": b"changed again"})
    bench.sync(forced=False)
    assert bench.storage.kinds() == {"write": 1, "stat": 1}


def test_a_first_sync_asks_once_whether_there_is_one(bench: Disk) -> None:
    fill(bench.root, {f"{n:03}": b"%d" % n for n in range(20)})
    bench.sync()
    assert bench.storage.kinds() == {"write": 21, "stat": 20, "read": 1, "files": 1}


def test_a_long_sync_writes_it_every_ten_seconds(
    bench: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what a killed one has sent can be found."""
    now = [0.0]
    seen: list[int] = []
    taken = threading.Semaphore(1)
    take = sync_module._Sync._take

    def take_and_tell(self: Any, outcome: Any) -> None:
        take(self, outcome)
        now[0] += 3
        taken.release()

    def one_by_one(moment: str, path: str) -> None:
        if moment != "before":
            return
        if path == INDEX:
            seen.append(len(parsed.entries) if (parsed := indexes.read(bench.inner)) else 0)
        else:
            assert taken.acquire(timeout=20)

    monkeypatch.setattr(sync_module._Sync, "_take", take_and_tell)
    fill(bench.root, {f"{n:02}": b"%d" % n for n in range(10)})
    options = SyncOptions(concurrency=1, timeout_s=1000)
    report = bench.sync(Watched(bench.inner, one_by_one), options, clock=lambda: now[0])
    assert report.complete
    # After files 4 and 8 and at the end; each time what was there had been written before.
    assert seen == [0, 4, 8]
    assert len(bench.index().entries) == 10


def test_that_can_not_be_written_is_a_failure_that_ends(bench: Disk) -> None:
    fill(bench.root, {"a": b"1"})
    refused = Failing(
        bench.inner, lambda path: PermissionError(13, "no"), affects=lambda path: path == INDEX
    )
    report = bench.sync(refused)
    assert [(f.path, f.error) for f in report.failures] == [(INDEX, "PermissionError")]
    assert report.files_uploaded == 1
    assert bench.sync().complete
    assert bench.storage.writes == [INDEX]


def test_that_can_not_be_read_is_left_alone(bench: Disk) -> None:
    """One that was made without knowing it would take files away from it."""
    indexes.write(bench.inner, SAMPLE, "run")
    fill(bench.root, {"a": b"1"})

    class Unreadable(LocalStorage):
        def read(self, path: str) -> Any:
            raise PermissionError(13, "no")

    report = bench.sync(Unreadable(str(bench.root.parent / "storage")))
    assert report.files_uploaded == 1
    assert "can't be read, so it is not kept up to date" in report.warnings[0]
    assert bench.index() == SAMPLE
    assert bench.sync().complete
    assert set(bench.index().entries) == {*SAMPLE.entries, "a"}


def test_a_name_of_our_own_book_keeping_is_refused(bench: Disk) -> None:
    fill(bench.root, {INDEX: b"mine", ".tune_sync/other": b"mine", "a": b"1"})
    report = bench.sync()
    assert {failure.path for failure in report.failures} == {INDEX, ".tune_sync/other"}
    assert "rename yours" in report.failures[0].message
    fill(bench.root, {"b": b"1"})
    bench.sync()
    assert set(bench.index().entries) == {"a", "b"}


# -- of several writers --------------------------------------------------------------------------


def test_a_shared_one_is_merged(bench: Disk) -> None:
    other = bench.beside("node-2")
    for number, (one, path) in enumerate([(bench, "a"), (other, "b"), (bench, "c"), (other, "d")]):
        fill(one.root, {path: b"1"})
        one.sync(shared=True)
        assert set(bench.index().entries) == set("abcd"[: number + 1])
    fill(bench.root, {"a": b"22"})
    bench.sync(shared=True, forced=True)
    fill(other.root, {"b": b"333"})
    other.sync(shared=True, forced=True)
    assert {path: e.size for path, e in bench.index().entries.items()} == {
        **{"a": 2, "b": 3, "c": 1, "d": 1}
    }
    assert bench.index().writer == "", "nobody knows best"


def test_one_of_another_disk_is_claimed_before_anything_is_sent(bench: Disk) -> None:
    """Else that disk would believe its own records, were the trial to come back there."""
    fill(bench.root, {"a": b"1"})
    bench.sync()
    other = bench.beside("node-2")
    fill(other.root, {"b": b"1"})
    other.sync()
    assert other.storage.writes == [INDEX, "b", INDEX]
    assert (other.index().writer, set(other.index().entries)) == ("node-2", {"a", "b"})
    fill(other.root, {"b": b"22"})
    other.sync()
    assert other.storage.writes == ["b"], "once is enough"


def test_files_of_another_sync_do_not_stand_for_the_index_having_been_read(bench: Disk) -> None:
    indexes.write(bench.inner, SAMPLE, "run")
    bench.sync(also={"log": Entry(root="trial_dir")})
    assert set(bench.index().entries) == {*SAMPLE.entries, "log"}


# -- damaged -------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda data: data[:-1],
    "empty": lambda data: b"",
    "flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "another version": lambda data: data.replace(b'"version": 1', b'"version": 9'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_set_aside_and_rebuilt_and_that_is_said_once(
    bench: Disk, damage: Callable[[bytes], bytes]
) -> None:
    storage = bench.root.parent / "storage"
    fill(bench.root, {"a": b"1", "d/b": b"22"})
    bench.sync()
    fill(storage, {"checkpoint_1/x": b"c", "result.json": b"{}"})
    broken = damage((storage / INDEX).read_bytes())
    (storage / INDEX).write_bytes(broken)
    other = bench.beside("node-2")
    fill(other.root, {"e": b"1"})
    drivers = {"drivers": lambda path: path.startswith(("checkpoint_", "result.json"))}
    report = other.sync(**drivers)
    assert report.complete
    (warning,) = report.warnings
    (aside,) = set((storage / ".tune_sync").iterdir()) - {storage / INDEX}
    assert f".tune_sync/{aside.name}" in warning
    assert aside.read_bytes() == broken
    assert {path: entry.size for path, entry in bench.index().entries.items()} == {
        **{"a": 1, "d/b": 2, "e": 1}
    }
    fill(other.root, {"f": b"1"})
    assert other.sync(**drivers).warnings == ()


def test_setting_it_aside_survives_an_error_in_between(
    bench: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool.time, "sleep", lambda pause: None)
    fill(bench.root.parent / "storage", {INDEX: b"broken", "x": b"1"})
    fill(bench.root, {"a": b"1"})
    once = Failing(
        bench.inner,
        lambda path: ConnectionError("reset"),
        times=1,
        affects=lambda path: path == INDEX,
    )
    assert bench.sync(once).complete
    assert set(bench.index().entries) == {"a", "x"}


def test_a_listing_names_no_drivers_files_nor_our_own_nor_what_is_no_text(
    there: LocalStorage, root: Path
) -> None:
    for path in ("a", "d/b", "result.json", INDEX, ".tune_sync/index-1.corrupt.json"):
        put(there, fill(root, {"x": b"12"}) / "x", path)
    with open(f"{root.parent}/storage/".encode() + b"latin-\xff", "wb"):
        pass
    found = indexes.from_listing(there.files(), lambda path: path == "result.json")
    assert found == {"a": Entry(2), "d/b": Entry(2)}


def test_a_store_of_objects_needs_no_more(root: Path, manifest: Path) -> None:
    bench = Disk(root, manifest, ObjectStorage(root.parent / "objects"))
    fill(root, {"a": b"1"})
    bench.sync()
    assert bench.storage.kinds() == {"write": 2, "read": 1, "files": 1}
    assert sync_dir(root, bench.inner, manifest).files_uploaded == 0
