"""A file that grew sends only its end, wherever that is certain to give the same file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.engine.fakes import Around, Counting, ObjectStorage, tree
from tests.engine.support import Disk, fill, sync_dir
from tests.support.proxy import Proxy, Stats
from tests.support.scenarios import Link
from tests.support.sftp_server import SftpServer
from tune_sync_plugin.engine import s3_append
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.source import Tail
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.report import SyncReport

MB = 1 << 20
LOG = b"0123456789"


@pytest.fixture(params=["directory", "objects", "sftp"])
def inner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "objects":
        yield ObjectStorage(tmp_path / "objects")
    elif request.param == "directory":
        storage = LocalStorage(str(tmp_path / "storage"))
        storage.append_from = 3
        yield storage
    else:
        (tmp_path / "served").mkdir()
        with SftpServer(tmp_path / "served") as server:
            remote = storage_at(server.client(), "/storage")
            remote.append_from = 3  # type: ignore[misc]
            yield remote


def grow(root: Path, more: bytes, path: str = "log") -> None:
    with (root / path).open("ab") as file:
        file.write(more)


def stored(storage: Storage, path: str = "log") -> bytes:
    return b"".join(storage.read(path))


class Bench:
    """One log, synced once."""

    def __init__(self, root: Path, manifest: Path, inner: Storage, content: bytes = LOG) -> None:
        self.root, self.manifest, self.inner = root, manifest, inner
        fill(root, {"log": content})
        assert self.sync().files_uploaded == 1

    def sync(self, storage: Storage | None = None) -> SyncReport:
        self.storage = Counting(storage or self.inner)
        report = sync_dir(self.root, self.storage, self.manifest)
        assert report.complete
        assert stored(self.inner) == (self.root / "log").read_bytes()
        return report

    def asked(self) -> dict[str, int]:
        return {what: n for what, n in self.storage.kinds().items() if what in ("write", "append")}


@pytest.fixture
def bench(root: Path, manifest: Path, inner: Storage) -> Bench:
    return Bench(root, manifest, inner)


def test_only_the_end_is_sent_each_time(bench: Bench) -> None:
    for more in (b"a", b"bc", b"d" * 13):
        grow(bench.root, more)
        report = bench.sync()
        assert (report.files_uploaded, report.bytes_uploaded) == (1, len(more))
        assert bench.asked() == {"append": 1}
    assert bench.sync().files_uploaded == 0


def test_the_beginning_is_compared_and_not_trusted(bench: Bench) -> None:
    with (bench.root / "log").open("r+b") as file:
        file.write(b"?")
    grow(bench.root, b"more")
    assert bench.sync().bytes_uploaded == len(LOG) + 4
    assert bench.asked() == {"write": 1}


def test_another_file_in_its_place_is_sent_whole(bench: Bench) -> None:
    fill(bench.root, {"new": LOG + b"more"})
    (bench.root / "new").replace(bench.root / "log")
    bench.sync()
    assert bench.asked() == {"write": 1}


def test_small_ones_are_sent_whole(root: Path, manifest: Path, inner: Storage) -> None:
    bench = Bench(root, manifest, inner, b"12")
    grow(root, b"3")
    bench.sync()
    assert bench.asked() == {"write": 1}


def test_not_onto_what_somebody_else_has_put_there(bench: Bench) -> None:
    fill(bench.root.parent / "theirs", {"log": b"?" * len(LOG)})
    other = bench.root.parent / "other.sqlite"
    assert sync_dir(bench.root.parent / "theirs", bench.inner, other).complete
    grow(bench.root, b"more")
    bench.sync()
    assert bench.asked() == {"append": 1, "write": 1}, "tried, refused, and sent whole"


def test_not_onto_a_file_that_has_a_second_name(root: Path, manifest: Path, tmp_path: Path) -> None:
    """What is kept as ``log.before-1`` may be the very same file."""
    storage = LocalStorage(str(tmp_path / "storage"))
    storage.append_from = 3
    bench = Bench(root, manifest, storage)
    storage.copy("log", "log.before-1")
    grow(root, b"more")
    bench.sync()
    assert stored(storage, "log.before-1") == LOG


def test_an_end_that_is_longer_than_all_before(bench: Bench) -> None:
    grow(bench.root, b"x" * 99)
    assert bench.sync().files_uploaded == 1
    grow(bench.root, b"y")
    bench.sync()
    assert bench.asked() == {"append": 1}


def test_after_an_upload_that_never_ended_it_is_sent_whole(bench: Bench) -> None:
    class Breaking(Around):
        def append(self, path: str, tail: Tail, etag: str) -> bool:
            raise PermissionError("no")

    grow(bench.root, b"more")
    assert sync_dir(bench.root, Breaking(bench.inner), bench.manifest).failures
    assert stored(bench.inner) == LOG
    bench.sync()
    assert bench.asked() == {"write": 1}


def test_a_disk_that_is_full_leaves_the_old_file(
    root: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path / "storage"))
    storage.append_from = 3
    Bench(root, manifest, storage)
    grow(root, b"more")
    write = os.write
    written = []

    def full(out: int, data: memoryview) -> int:
        if written:
            raise OSError(28, "No space left on device")
        written.append(write(out, bytes(data[:2])))
        return 2

    monkeypatch.setattr(os, "write", full)
    (failure,) = sync_dir(root, storage, manifest).failures
    monkeypatch.undo()
    assert "No space left" in failure.message
    assert written == [2]
    assert stored(storage) == LOG


def test_a_restore_elsewhere_takes_it_for_what_it_is(
    root: Path, manifest: Path, inner: Storage
) -> None:
    one = Disk(root, manifest, inner)
    fill(root, {"log": LOG})
    one.sync()
    grow(root, b"more")
    assert one.sync(forced=True).bytes_uploaded == 4
    two = one.beside("node-2")
    report = two.restore()
    assert (report.files_restored, report.failures) == (1, ())
    assert tree(two.root) == {"log": LOG + b"more"}
    assert two.storage.kinds() == {"files": 1, "read": 2}, "vouched for by its checksum, at once"
    grow(two.root, b", and more")
    assert two.sync(shared=True).complete
    assert stored(inner) == LOG + b"more, and more"


# -- a real S3 server ----------------------------------------------------------------------------

Start = Callable[[int], "OnS3"]


class OnS3:
    """A log of some megabytes on S3, behind the proxy that counts."""

    def __init__(self, root: Path, manifest: Path, link: Link, size: int) -> None:
        self.root, self.manifest, self.server, self.proxy = root, manifest, link.s3, link.proxy
        self.prefix = f"append-{os.urandom(4).hex()}"
        self.storage = storage_at(
            self.server.arrow_fs(self.proxy.port), f"{self.server.bucket}/{self.prefix}"
        )
        fill(root, {"log": os.urandom(size)})
        self.sync()

    def sync(self) -> Stats:
        self.proxy.reset_stats()
        assert sync_dir(self.root, self.storage, self.manifest).complete
        assert self.server.get(f"{self.prefix}/log") == (self.root / "log").read_bytes()
        return self.proxy.stats()

    def etag(self) -> str:
        found = self.storage.stat("log")
        assert found
        return str(found.etag)


@pytest.fixture
def on_s3(root: Path, manifest: Path, link: Link) -> Start:
    s3_append.part_copier.cache_clear()  # it remembers what failed
    return lambda size: OnS3(root, manifest, link, size)


@pytest.mark.parametrize("size", [9 * MB, 25 * MB], ids=["9 MB", "25 MB"])
def test_on_s3_five_requests_send_the_end(on_s3: Start, size: int) -> None:
    log = on_s3(size)
    for _ in range(3):
        grow(log.root, b"a line\n")
        stats = log.sync()
        methods = [record.method for record in stats.records]
        assert methods == ["POST", "PUT", "PUT", "POST", "HEAD"]
        assert stats.body_bytes < 1000
    assert log.sync().requests == 0


def test_on_s3_a_replaced_object_is_not_appended_to(on_s3: Start) -> None:
    log = on_s3(9 * MB)
    log.server.client().put_object(
        Bucket=log.server.bucket, Key=f"{log.prefix}/log", Body=os.urandom(9 * MB)
    )
    grow(log.root, b"a line\n")
    stats = log.sync()
    assert stats.select("DELETE").requests == 1, "nothing is left of the attempt"
    assert stats.body_bytes > 9 * MB


@pytest.mark.parametrize(
    ("method", "query"),
    [
        ("POST", r"\?uploads"),
        ("PUT", "partNumber=1"),
        ("PUT", "partNumber=2"),
        ("POST", "uploadId"),
    ],
    ids=["begin", "copy", "end", "complete"],
)
def test_on_s3_one_that_is_refused_is_sent_whole(
    on_s3: Start, proxy: Proxy, method: str, query: str
) -> None:
    log = on_s3(9 * MB)
    grow(log.root, b"a line\n")
    proxy.add_rule(query, "status:403", method=method, times=1)
    stats = log.sync()
    assert stats.body_bytes > 9 * MB
    assert stats.select("DELETE").requests == (0 if query == r"\?uploads" else 1)


def test_on_s3_a_store_that_can_not_is_not_asked_for_ever(on_s3: Start, proxy: Proxy) -> None:
    log = on_s3(12 * MB)
    tried = []
    for refused in (True, True, True, False):
        if refused:
            proxy.add_rule(r"\?uploads", "status:403", method="POST", times=1)
        grow(log.root, b"a line\n")
        tried.append(log.sync().select("POST", r"\?uploads").requests - 1)
    assert tried == [1, 1, 1, 0]


def test_on_s3_an_end_that_is_damaged_on_its_way_is_refused(
    on_s3: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = on_s3(9 * MB)
    grow(log.root, b"a line\n")
    others = SimpleNamespace(md5=lambda content, **options: hashlib.md5(content + b"?"))
    monkeypatch.setattr(s3_append, "hashlib", others)
    stats = log.sync()
    assert stats.select("PUT", "partNumber=2").records[0].status == 400
    assert stats.body_bytes > 9 * MB, "and sent whole instead"
