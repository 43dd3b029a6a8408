"""One contract, every storage: what Ray or a user may hand us as a file system."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs as arrow

from tests.engine.fakes import Counting, tree
from tests.engine.places import KINDS, URL_KINDS, Place, at_url, place_of
from tests.engine.support import Disk, entry_of, fill, put, sync_dir
from tests.support import s3_server
from tests.support.proxy import Proxy
from tests.support.s3_server import S3Server
from tests.support.servers import Azurite, FakeGcs, WebDav
from tune_sync_plugin.engine.arrow_storage import ArrowStorage
from tune_sync_plugin.engine.checksum import checksum_of, etag_matches
from tune_sync_plugin.engine.object_storage import ObjectStorage
from tune_sync_plugin.engine.source import Memory, Source
from tune_sync_plugin.engine.storage import partial_path, storage_at
from tune_sync_plugin.errors import SourceChangedError

MB = 1 << 20
ODD_NAMES = [
    *("two words", " lead", "trail ", ".hidden", "...", "#x", "q?", "%41", "100%", "a+b&c=d"),
    *("new\nline", "tab\there", "back\\slash", "quo\"t'e", "*[x]", "a::b", "~", "x;y", "<&>"),
    *("ü✓", "u\u0308", "n" * 250, "v?versionId=1", "s3:", "$HOME", "{a}", "-"),
]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield place_of(request.param, tmp_path, request.getfixturevalue)
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


# -- the contract --------------------------------------------------------------------------------


def test_unwraps_to_what_does_it_best(place: Place) -> None:
    assert type(place.storage) is place.kind


@pytest.mark.parametrize("size", [0, 1, 20 * MB], ids=["empty", "one byte", "20 MB"])
def test_round_trip(place: Place, root: Path, size: int) -> None:
    content = os.urandom(size)
    put(place.storage, fill(root, {"a": content}) / "a", "deep/down/a")
    assert place.contents() == {"deep/down/a": content}


@pytest.mark.parametrize("size", [3, 9 * MB], ids=["small", "9 MB"])
def test_overwrites_longer_with_shorter_and_back(place: Place, root: Path, size: int) -> None:
    for content in (b"x" * size, b"y", b"", b"z" * size):
        put(place.storage, fill(root, {"a": content}) / "a")
        assert place.contents() == {"a": content}


def test_compressed_files_stay_as_they_are(place: Place, root: Path) -> None:
    for name in ("a.gz", "b.bz2", "c.zst", "d.lz4"):
        content = gzip.compress(b"content" * 99)
        put(place.storage, fill(root, {name: content}) / name)
        assert place.contents()[name] == content


def test_odd_names_arrive_or_are_reported(place: Place, root: Path, manifest: Path) -> None:
    files = {name: b"%d" % number for number, name in enumerate(ODD_NAMES)}
    files |= {f"odd*[d]ir {n}/{name}": b"x" for n, name in enumerate(ODD_NAMES[:9])}
    if not place.storage.has_directories:
        del files["back\\slash"]  # SeaweedFS, not the client, makes a slash of it.
    fill(root, files)
    report = sync_dir(root, place.storage, manifest)
    reported = {failure.path for failure in report.failures}
    stored = place.contents()
    assert {path: stored.get(path) for path in files if path not in reported} == {
        path: content for path, content in files.items() if path not in reported
    }
    # Nothing lands under a name that no file has.
    assert set(stored) <= set(files)
    assert {os.path.basename(path) for path in reported} == place.refuses & set(ODD_NAMES)
    assert sync_dir(root, place.storage, manifest).files_uploaded == 0


def test_file_and_directory_change_places(place: Place, root: Path, manifest: Path) -> None:
    if (place.kind, place.storage.has_directories) == (ArrowStorage, False):
        pytest.skip("SeaweedFS refuses a multipart upload to a where a/b exists; S3 does not")
    fill(root, {"a": b"1", "d/e/f": b"2", "keep/x": b"3"})
    assert sync_dir(root, place.storage, manifest).complete
    (root / "a").unlink()
    (root / "d" / "e" / "f").unlink()
    (root / "d" / "e").rmdir()
    (root / "d").rmdir()
    fill(root, {"a/b/c": b"4", "d": b"5"})
    report = sync_dir(root, place.storage, manifest)
    assert report.complete, report.failures
    wanted = {"a/b/c": b"4", "d": b"5", "keep/x": b"3"}
    if not place.storage.has_directories:
        wanted |= {"a": b"1", "d/e/f": b"2"}
    assert place.contents() == wanted


def test_removes_one_file_and_no_more(place: Place, root: Path) -> None:
    if not place.storage.has_directories:
        pytest.skip("nothing is ever removed from an object store")
    for path in ("d/a", "d/b", "d/e/f", "g"):
        put(place.storage, fill(root, {"a": b"1"}) / "a", path)
    for path, left in [("d/e/f", {"d/a", "d/b", "g"}), ("d/a", {"d/b", "g"}), ("g", {"d/b"})]:
        place.storage.remove(path)
        assert set(place.contents()) == left


def test_removing_what_is_not_there_is_fine(place: Place, root: Path) -> None:
    put(place.storage, fill(root, {"a": b"1"}) / "a", "d/a")
    if place.storage.has_directories:
        for path in ("never", "d/never", "d", "d/a/x"):
            place.storage.remove(path)
        place.storage.discard_partial("never", "run")
    assert place.contents() == {"d/a": b"1"}


@pytest.mark.parametrize("size", [2 * MB, 40 * MB], ids=["2 MB", "40 MB"])
def test_a_source_that_shrinks_leaves_the_old_object_whole(
    place: Place, root: Path, size: int
) -> None:
    put(place.storage, fill(root, {"a": b"old"}) / "a")
    file = fill(root, {"a": b"n" * size}) / "a"
    entry = entry_of(file)
    with Source(entry) as source:
        os.truncate(file, size - 1)
        with pytest.raises(SourceChangedError):
            place.storage.write("a", source, "run")
    assert place.contents() == {"a": b"old"}
    # And nothing that was held back comes after it.
    put(place.storage, fill(root, {"a": b"newest"}) / "a")
    assert place.contents() == {"a": b"newest"}


def test_a_new_file_that_shrinks_leaves_nothing(place: Place, root: Path) -> None:
    file = fill(root, {"a": b"n" * (12 * MB)}) / "a"
    with Source(entry_of(file)) as source:
        os.truncate(file, 11 * MB)
        with pytest.raises(SourceChangedError):
            place.storage.write("a", source, "run")
    assert place.contents() == {}


def test_syncs_only_what_changed(place: Place, root: Path, manifest: Path) -> None:
    files = {"a": b"1", "d/b": b"22", "d/e/c": b""}
    fill(root, files)
    assert sync_dir(root, place.storage, manifest).files_uploaded == 3
    fill(root, {"a": b"2"})
    report = sync_dir(root, place.storage, manifest)
    assert (report.files_uploaded, report.files_unchanged) == (1, 2)
    assert place.contents() == files | {"a": b"2"}


def test_name_is_stable(place: Place) -> None:
    assert place.storage.name
    assert place.storage.name == str(place.storage.name)
    assert "storage" in place.storage.name


# -- what storage is asked, and gives back -------------------------------------------------------

ASKED = ["a", "two words", "#x", "q?", "100%", "%41", "a+b&c=d", "new\nline", "*[x]", "🎉ü"]


def test_stat_read_files_and_copy(place: Place, root: Path) -> None:
    storage = place.storage
    files = {f"d/e f/{name}": b"%d" % n for n, name in enumerate(ASKED)} | {ASKED[7]: b"nl"}
    files = {p: c for p, c in files.items() if os.path.basename(p) not in place.refuses}
    files |= {"empty": b"", "zipped.gz": gzip.compress(b"content" * 99), "notes.bz2": b"no bzip2"}
    assert (storage.files(), storage.stat("a"), storage.stat("d/e f/a")) == ({}, None, None)
    with pytest.raises(FileNotFoundError):
        list(storage.read("a"))
    for path, content in files.items():
        storage.write(path, Memory(content), "run")
    assert storage.files() == {path: len(content) for path, content in files.items()}
    for path, content in files.items():
        found = storage.stat(path)
        assert found
        assert found.size == len(content)
        assert etag_matches(hashlib.md5(content).hexdigest(), found.etag) is (
            None if storage.has_directories else True
        )
        assert b"".join(storage.read(path)) == content
    for path in ("d", "d/e f", "empty/x", "gone", "d/gone"):
        assert storage.stat(path) is None
    for path in ("d/e f/*[x]", "d/e f/#x", "empty", "zipped.gz"):
        storage.copy(path, f"{path}.before-1")
        # Two files, and not two names for one.
        storage.write(path, Memory(b"new"), "run")
        assert b"".join(storage.read(f"{path}.before-1")) == files[path]
        found = storage.stat(path)
        assert found
        assert (found.size, b"".join(storage.read(path))) == (3, b"new")


def test_what_somebody_else_writes_is_seen(place: Place, root: Path) -> None:
    """Some clients remember listings and sizes."""
    storage = place.storage
    storage.write("d/a", Memory(b"1"), "run")
    assert (storage.files(), storage.stat("d/b")) == ({"d/a": 1}, None)
    other = place.another()
    other.write("d/a", Memory(b"longer"), "run")
    other.write("d/b", Memory(b"2"), "run")
    found = storage.stat("d/a")
    assert found
    assert found.size == 6
    assert b"".join(storage.read("d/a")) == b"longer"
    assert storage.stat("d/b")
    assert storage.files() == {"d/a": 6, "d/b": 1}


def test_half_written_files_are_not_listed(place: Place) -> None:
    if not place.storage.has_directories:
        pytest.skip("there are none")
    place.storage.write(partial_path("d/a", "run"), Memory(b"half"), "run")
    place.storage.write("d/a", Memory(b"1"), "run")
    assert place.storage.files() == {"d/a": 1}


def test_twenty_five_megabytes_are_checked(place: Place, root: Path, manifest: Path) -> None:
    content = os.urandom(25 * MB)
    fill(root, {"big": content})
    counting = Counting(place.storage)
    assert sync_dir(root, counting, manifest).complete
    asked = {"write": 1} if place.kind is ObjectStorage else {"write": 1, "stat": 1}
    assert counting.kinds() == asked, "S3 answers an upload with the ETag"
    found = place.storage.stat("big")
    assert found
    if place.kind in (ArrowStorage, ObjectStorage) and not place.storage.has_directories:
        assert str(found.etag).endswith("-3")
        assert etag_matches(checksum_of([content]), found.etag)
        assert etag_matches(checksum_of([content[:-1] + b"?"]), found.etag) is False


def test_restored_elsewhere_every_file_is_the_same(
    place: Place, root: Path, manifest: Path
) -> None:
    names = ODD_NAMES if place.storage.has_directories else set(ODD_NAMES) - {"back\\slash"}
    files = {name: b"%d" % n for n, name in enumerate(names)}
    files |= {f"odd*[d]ir/{name}": b"x" for name in ASKED}
    files |= {"empty": b"", "zipped.gz": gzip.compress(b"c" * 999), "big": os.urandom(25 * MB)}
    one = Disk(root, manifest, place.storage)
    fill(root, files)
    unsent = {failure.path for failure in one.sync().failures}
    assert {os.path.basename(path) for path in unsent} == place.refuses & set(names)
    two = one.beside("node-2")
    two.inner = place.another()
    report = two.restore()
    assert (report.failures, report.warnings, report.from_index) == ((), (), True)
    assert tree(two.root) == {path: c for path, c in files.items() if path not in unsent}
    assert two.storage.kinds() == {"files": 1, "read": 1 + report.files_restored}
    assert two.sync().files_uploaded == 0
    # And back, after one of them went on.
    fill(two.root, {"d/new": b"new", "empty": b"no more"})
    assert two.sync().complete
    back = one.restore()
    assert (back.files_restored, back.failures) == (2, ())
    assert tree(root).items() >= tree(two.root).items()


def test_of_somebody_else_s_file_both_are_kept(place: Place, root: Path, manifest: Path) -> None:
    one = Disk(root, manifest, place.storage)
    fill(root, {"d/log #1?.txt": b"theirs"})
    one.sync()
    two = one.beside("node-2")
    fill(two.root, {"d/log #1?.txt": b"mine"})
    assert two.sync().complete
    stored = place.contents()
    assert stored["d/log #1?.txt"] == b"mine"
    assert stored["d/log #1?.txt.before-1"] == b"theirs"


# -- unwrapping ----------------------------------------------------------------------------------


def test_unwrapped_prefixes_are_joined(tmp_path: Path) -> None:
    base = str(tmp_path)
    local, nested = arrow.LocalFileSystem(), DirFileSystem(base, LocalFileSystem())
    around = arrow.PyFileSystem(arrow.FSSpecHandler(DirFileSystem("b", nested)))
    subtree = arrow.SubTreeFileSystem(f"{base}/b", local)
    for filesystem in (around, subtree, arrow.SubTreeFileSystem("b", subtree_of(base))):
        # A leading slash does not lead out of the subtree, nor does it in those file systems.
        for path in ("x/y", "/x/y"):
            assert storage_at(filesystem, path).name == f"local:{base}/b/x/y"


def subtree_of(base: str) -> arrow.FileSystem:
    return arrow.SubTreeFileSystem(base, arrow.LocalFileSystem())


def test_a_local_file_system_with_ways_of_its_own_keeps_them(tmp_path: Path, root: Path) -> None:
    class Shouting(LocalFileSystem):
        def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
            super().pipe_file(path, value.upper(), **kwargs)

    storage = storage_at(Shouting(), f"{tmp_path}/there")
    put(storage, fill(root, {"a": b"quiet"}) / "a")
    assert tree(tmp_path / "there") == {"a": b"QUIET"}


def test_anything_else_is_refused() -> None:
    with pytest.raises(TypeError, match="storage_filesystem must be"):
        storage_at("s3://bucket", "x")


# -- names ---------------------------------------------------------------------------------------


def _s3(**options: Any) -> Any:
    import s3fs

    return s3fs.S3FileSystem(**{"anon": False, "skip_instance_cache": True, **options})


def _arrow_s3(**options: Any) -> Any:
    return arrow.S3FileSystem(**{"region": "us-east-1", **options})


SECRETS: dict[str, Any] = {"key": "AKIAKEY", "secret": "hush", "token": "tok"}
ARROW_SECRETS = {"access_key": "AKIAKEY", "secret_key": "hush", "session_token": "tok"}
ELSEWHERE = "http://elsewhere:9000"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(_arrow_s3, lambda: _arrow_s3(endpoint_override="here:1"), id="arrow"),
        pytest.param(
            lambda: _arrow_s3(endpoint_override="here:1"),
            lambda: _arrow_s3(endpoint_override="here:2"),
            id="arrow, two endpoints",
        ),
        pytest.param(_s3, lambda: _s3(endpoint_url=ELSEWHERE), id="s3fs"),
        pytest.param(
            _s3,
            lambda: _s3(client_kwargs={"endpoint_url": ELSEWHERE}),
            id="s3fs, by client_kwargs",
        ),
        pytest.param(
            lambda: arrow.AzureFileSystem(account_name="one", account_key="aGk="),
            lambda: arrow.AzureFileSystem(account_name="two", account_key="aGk="),
            id="arrow azure",
        ),
        pytest.param(
            lambda: _Remote(host="one"), lambda: _Remote(host="two"), id="fsspec, by host"
        ),
        pytest.param(arrow.LocalFileSystem, _arrow_s3, id="kinds"),
    ],
)
def test_two_services_have_two_names(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Or else what one of them holds would be taken for what the other one holds."""
    assert storage_at(one(), "b/p").name == storage_at(one(), "b/p").name
    assert storage_at(one(), "b/p").name != storage_at(one(), "b/q").name
    assert storage_at(one(), "b/p").name != storage_at(other(), "b/p").name


class _Remote(fsspec.AbstractFileSystem):
    """As SFTP and its like are told where to go."""

    protocol = ("sftp", "ssh")


def test_credentials_do_not_change_a_name() -> None:
    """Or else a rotated key would upload everything again."""
    assert storage_at(_s3(**SECRETS), "b").name == storage_at(_s3(), "b").name
    assert storage_at(_arrow_s3(**ARROW_SECRETS), "b").name == storage_at(_arrow_s3(), "b").name


@pytest.mark.parametrize(
    "make",
    [
        lambda: _arrow_s3(**ARROW_SECRETS, endpoint_override="here:1"),
        lambda: _s3(**SECRETS, endpoint_url=ELSEWHERE),
        lambda: _s3(**SECRETS, endpoint_url="http://AKIAKEY:hush@elsewhere:9000"),
        lambda: arrow.AzureFileSystem(account_name="acc", account_key="aHVzaA=="),
        lambda: _Remote(host="h", username="AKIAKEY", password="hush"),
    ],
    ids=["arrow s3", "s3fs", "s3fs, in the URL", "arrow azure", "sftp"],
)
def test_no_secret_in_a_name(make: Callable[[], Any]) -> None:
    name = storage_at(make(), "bucket/prefix").name
    for secret in ("AKIAKEY", "hush", "aHVzaA", "tok"):
        assert secret not in name
    assert "bucket/prefix" in name


# -- S3 ------------------------------------------------------------------------------------------


class _NoSuchBucket(http.server.BaseHTTPRequestHandler):
    """SeaweedFS makes a bucket that is missing; others answer as this does."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = (
            b"<?xml version='1.0'?><Error><Code>NoSuchBucket</Code>"
            b"<Message>The specified bucket does not exist</Message></Error>"
        )
        self.send_response(404)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("client", ["arrow", "s3fs"])
def test_a_missing_bucket_fails_at_once_by_name(root: Path, manifest: Path, client: str) -> None:
    fill(root, {"a": b"1", "big": b"2" * (9 * MB)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchBucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        filesystem = (
            _arrow_s3(endpoint_override=where, scheme="http", **ARROW_SECRETS)
            if client == "arrow"
            else _s3(endpoint_url=f"http://{where}", **SECRETS)
        )
        report = sync_dir(root, storage_at(filesystem, "no-such-bucket/p"), manifest, timeout_s=60)
        server.shutdown()
    assert {failure.path for failure in report.failures} == {"a", "big"}
    assert report.duration_s < 30
    assert all("no-such-bucket/p" in failure.message for failure in report.failures)


@pytest.mark.parametrize("client", ["arrow_fs", "s3fs_fs"])
def test_wrong_credentials_fail_at_once_without_showing_them(
    s3: S3Server, root: Path, manifest: Path, client: str
) -> None:
    fill(root, {"a": b"1"})
    server = S3Server.__new__(S3Server)
    server.__dict__.update(s3.__dict__)
    server.secret_key = "wrong-and-secret"
    storage = storage_at(getattr(server, client)(), f"{s3.bucket}/refused")
    report = sync_dir(root, storage, manifest, timeout_s=60)
    assert [failure.path for failure in report.failures] == ["a"]
    assert report.duration_s < 30
    assert "wrong-and-secret" not in pickle.dumps(report).decode("latin-1")


def test_s3_server_is_there_in_ci() -> None:
    if os.environ.get("CI") and (reason := s3_server.available()):
        pytest.fail(reason)


# -- by their URLs: what SyncConfig(upload_dir=...) opens ----------------------------------------


@pytest.fixture(params=URL_KINDS)
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request.param, tmp_path, request.getfixturevalue)


@pytest.mark.parametrize("size", [1000, 2 * MB], ids=["small", "2 MB"])
def test_a_log_that_grows_is_there_after_each_sync(
    remote: Place, root: Path, manifest: Path, size: int
) -> None:
    log = os.urandom(size)
    for more in (b"", b"one\n", b"two\n" * 9, b"three\n"):
        log += more
        with (root / "log").open("ab") as file:
            file.write(more or log)
        counting = Counting(remote.storage)
        assert sync_dir(root, counting, manifest).complete
        assert remote.contents() == {"log": log}
        appends = more and size >= (remote.storage.append_from or size + 1)
        assert ("append" in counting.kinds()) == bool(appends)
        assert ("write" in counting.kinds()) != bool(appends)


@pytest.mark.parametrize("kind", URL_KINDS)
def test_ten_thousand_files_are_listed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    remote = place_of(kind, tmp_path, request.getfixturevalue)
    assert remote.holding
    # These two would take minutes; of so many they make several pages.
    count = {"url gcs": 2_500, "url azure": 6_000}.get(kind, 10_000)
    files = {f"d{number % 7}/e/{number:05}": b"%d" % number for number in range(count)}
    storage = remote.holding(files)
    assert storage.files() == {path: len(content) for path, content in files.items()}


_SENDER = """
import json, resource, sys
from pathlib import Path
from tests.engine.places import at_url
from tests.engine.support import put
from tune_sync_plugin.engine.source import Memory
url, options, big = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
storage = at_url(url, options)
storage.write("small", Memory(b"1"), "run")  # what is imported and connected for any file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
put(storage, big)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_big_file_takes_little_memory(remote: Place, root: Path) -> None:
    big = root / "big"
    with big.open("wb") as file:
        file.truncate(128 * MB)
    command = [sys.executable, "-c", _SENDER, remote.url, json.dumps(remote.options), str(big)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = remote.storage.stat("big")
    assert found
    assert found.size == 128 * MB
    assert int(done.stdout) < 90, f"{done.stdout} MB"
    remote.storage.remove("big")


# -- a server that fails, which a proxy in front of it makes it do -------------------------------


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) for name in ("azure", "gcs", "webdav")]
)
def failing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Place, Proxy]]:
    """A place behind a proxy; ``contents`` goes around that."""
    place = place_of(f"url {request.param}", tmp_path, request.getfixturevalue)
    names = {"azure": "azurite", "gcs": "fake_gcs", "webdav": "webdav"}
    server = request.getfixturevalue(names[request.param])
    with Proxy.start(server.host, server.port) as proxy:
        place.storage = at_url(place.url, server.options(proxy.port))
        yield place, proxy


SOME = {f"d{number % 3}/f{number}": b"%d" % number for number in range(12)} | {"big": b"b" * 9 * MB}


def test_an_outage_of_a_second_costs_no_file(
    failing: tuple[Place, Proxy], root: Path, manifest: Path
) -> None:
    place, proxy = failing
    fill(root, SOME)
    proxy.add_rule("", "status:500", times=9)
    report = sync_dir(root, place.storage, manifest, timeout_s=90)
    assert report.failures == ()
    assert place.contents() == SOME
    assert len([record for record in proxy.stats().records if record.action]) == 9


def test_a_file_that_is_refused_is_named_and_the_others_arrive(
    failing: tuple[Place, Proxy], root: Path, manifest: Path
) -> None:
    place, proxy = failing
    fill(root, SOME)
    # WebDAV's is first put under another name; Google's, which is small, would have it in its body.
    proxy.add_rule(r"/storage/(big|\.tune_sync-\w+\.part)(\?|$)|name=\S*/big", "status:403")
    report = sync_dir(root, place.storage, manifest, timeout_s=60)
    assert [failure.path for failure in report.failures] == ["big"]
    assert "/big failed" in report.failures[0].message
    assert place.contents() == {path: SOME[path] for path in SOME if path != "big"}
    assert report.duration_s < 45, "nothing is tried for long that is refused for good"


def test_the_servers_are_there_in_ci() -> None:
    if os.environ.get("CI"):
        for server in (Azurite, FakeGcs, WebDav):
            assert server.available() is None
