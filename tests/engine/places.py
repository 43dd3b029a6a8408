"""Places to store files in, of every kind that Ray or a user may hand us, and looks into them.

What belongs here: how each kind is made, and how its content is read without our own code. What it
has to do is in ``test_storages.py``.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import _fs as arrow_internals
from pyarrow import fs as arrow

from tests.engine.fakes import tree
from tests.engine.support import fill
from tests.support.s3_server import S3Server
from tests.support.servers import Azurite, FakeGcs, WebDav
from tests.support.sftp_server import SftpServer
from tune_sync_plugin.engine.arrow_storage import ArrowStorage
from tune_sync_plugin.engine.file_servers import SftpStorage, WebDavStorage
from tune_sync_plugin.engine.fsspec_storage import FsspecStorage
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.object_storage import ObjectStorage
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.engine.urls import filesystem_at

# A fixture's value by its name: a server is only started for the kinds that need it.
Fixture = Callable[[str], Any]


@dataclass
class Place:
    """A storage, the class it should be, and a way to look into it that bypasses it."""

    storage: Storage
    kind: type
    contents: Callable[[], dict[str, bytes]]
    client: Callable[[], Storage] | None = None
    # Names that it does not take: files of these are reported, and nothing else of them is stored.
    refuses: frozenset[str] = frozenset()
    # What a user gives as upload_dir, and as storage_options.
    url: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    # A place with these files, which did not come there by the storage.
    holding: Callable[[Mapping[str, bytes]], Storage] | None = None

    def another(self) -> Storage:
        """The same place through another client, where there can be two."""
        return self.client() if self.client else self.storage


def _memory_contents(root: str) -> dict[str, bytes]:
    store = MemoryFileSystem.store
    return {p[len(root) + 1 :]: f.getvalue() for p, f in store.items() if p.startswith(root + "/")}


def _mock_contents(filesystem: Any, root: str) -> dict[str, bytes]:
    found = filesystem.get_file_info(arrow.FileSelector(root, recursive=True, allow_not_found=True))
    return {
        info.path[len(root) + 1 :]: filesystem.open_input_file(info.path).read()
        for info in found
        if info.type == arrow.FileType.File
    }


class _OnlyHandler(arrow.FSSpecHandler):
    """A handler we don't know, so that the file system around it can't be unwrapped."""


class _OnlyLocal(LocalFileSystem):
    """Likewise; a stand-in for SFTP and its like, with real directories."""


def _local(tmp_path: Path, filesystem: Any, path: str) -> Place:
    there = tmp_path / "base" / "storage"
    return Place(storage_at(filesystem, path), LocalStorage, lambda: tree(there))


def place_of(kind: str, tmp_path: Path, fixture: Fixture) -> Place:
    """A new, empty place of a kind."""
    base = str(tmp_path / "base")
    os.makedirs(base)
    unique = f"run-{uuid.uuid4().hex}"
    if kind == "arrow local":
        return _local(tmp_path, arrow.LocalFileSystem(), f"{base}/storage")
    if kind == "arrow subtree":
        return _local(tmp_path, arrow.SubTreeFileSystem(base, arrow.LocalFileSystem()), "storage")
    if kind == "arrow around fsspec local":
        wrapped = arrow.PyFileSystem(arrow.FSSpecHandler(LocalFileSystem()))
        return _local(tmp_path, wrapped, f"{base}/storage")
    if kind == "fsspec dir":
        return _local(tmp_path, DirFileSystem(base, LocalFileSystem()), "storage")
    if kind == "fsspec memory":
        root = f"/{unique}/storage"
        return Place(
            storage_at(fsspec.filesystem("memory"), root),
            FsspecStorage,
            lambda: _memory_contents(root),
        )
    if kind == "arrow mock":
        mock = arrow_internals._MockFileSystem()
        return Place(
            storage_at(mock, "storage"), ArrowStorage, lambda: _mock_contents(mock, "storage")
        )
    if kind == "arrow unknown handler":
        unknown = arrow.PyFileSystem(_OnlyHandler(LocalFileSystem()))
        there = f"{base}/storage"
        return Place(storage_at(unknown, there), ArrowStorage, lambda: tree(there))
    if kind == "fsspec unknown":
        there = f"{base}/storage"
        return Place(storage_at(_OnlyLocal(), there), FsspecStorage, lambda: tree(there))
    prefix = f"{unique}/storage"
    if kind.startswith("url "):
        return _URLS[kind](tmp_path, prefix, fixture)
    server: S3Server = fixture("s3")

    def contents() -> dict[str, bytes]:
        return {key[len(prefix) + 1 :]: server.get(key) for key in server.keys(prefix + "/")}

    if kind == "arrow s3":

        def arrow_client() -> Storage:
            return storage_at(server.arrow_fs(), f"{server.bucket}/{prefix}")

        return Place(arrow_client(), ObjectStorage, contents, arrow_client)

    if kind == "arrow s3 with metadata":
        # An option that can't be carried over.
        metadata = {"Content-Type": "text/plain"}

        def plain_client() -> Storage:
            filesystem = server.arrow_fs(default_metadata=metadata)
            return storage_at(filesystem, f"{server.bucket}/{prefix}")

        return Place(plain_client(), ArrowStorage, contents, plain_client)

    def s3fs_client() -> Storage:
        return storage_at(server.s3fs_fs(), f"{server.bucket}/{prefix}")

    refuses = frozenset({"v?versionId=1"})
    return Place(s3fs_client(), FsspecStorage, contents, s3fs_client, refuses)


# -- by their URLs, as SyncConfig(upload_dir=...) opens them -------------------------------------


def _by_url(
    kind: type,
    url: str,
    options: Mapping[str, Any],
    contents: Callable[[], dict[str, bytes]],
    holding: Callable[[Mapping[str, bytes]], Storage],
    refuses: frozenset[str] = frozenset(),
) -> Place:
    def client() -> Storage:
        # Not the one that fsspec keeps for the next who asks; S3's options name no such thing.
        fresh = {} if kind in (ObjectStorage, LocalStorage) else {"skip_instance_cache": True}
        return at_url(url, {**options, **fresh})

    return Place(client(), kind, contents, client, refuses, url, options, holding)


def at_url(url: str, options: Mapping[str, Any]) -> Storage:
    """Opened as in a task of ours."""
    return storage_at(*filesystem_at(url, options))


def _in_directory(served: Path, prefix: str, client: Callable[[], Storage]) -> Any:
    def holding(files: Mapping[str, bytes]) -> Storage:
        fill(served / prefix, dict(files))
        storage = client()
        deadline = time.monotonic() + 10
        while not storage.stat(next(iter(files))):  # rclone looks once a second
            assert time.monotonic() < deadline
        return storage

    return holding


def _url_file(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    url, there = f"file://{tmp_path}/base/{prefix}", tmp_path / "base" / prefix
    holding = _in_directory(tmp_path / "base", prefix, lambda: at_url(url, {}))
    return _by_url(LocalStorage, url, {}, lambda: tree(there), holding)


def _url_s3(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    server: S3Server = fixture("s3")
    url, options = f"s3://{server.bucket}/{prefix}", server.options()

    def holding(files: Mapping[str, bytes]) -> Storage:
        server.add(prefix, files)
        return at_url(url, options)

    return _by_url(ObjectStorage, url, options, lambda: server.contents(prefix), holding)


def _url_azure(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    server: Azurite = fixture("azurite")
    url, options = server.url(prefix), server.options()

    def holding(files: Mapping[str, bytes]) -> Storage:
        server.add(prefix, files)
        return at_url(url, options)

    refuses = frozenset({"new\nline", "tab\there", "q?"})
    return _by_url(FsspecStorage, url, options, lambda: server.contents(prefix), holding, refuses)


def _url_gcs(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    server: FakeGcs = fixture("fake_gcs")
    url, options = server.url(prefix), server.options()

    def holding(files: Mapping[str, bytes]) -> Storage:
        server.add(prefix, files)
        return at_url(url, options)

    return _by_url(FsspecStorage, url, options, lambda: server.contents(prefix), holding)


def _url_sftp(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    server: SftpServer = fixture("sftp")
    return _of_directory(SftpStorage, server, prefix)


def _url_webdav(tmp_path: Path, prefix: str, fixture: Fixture) -> Place:
    server: WebDav = fixture("webdav")
    return _of_directory(WebDavStorage, server, prefix)


def _of_directory(kind: type, server: SftpServer | WebDav, prefix: str) -> Place:
    url, options = server.url(prefix), server.options()
    holding = _in_directory(server.served, prefix, lambda: at_url(url, options))
    there = server.served / prefix
    refuses = frozenset({"new\nline", "tab\there"} if kind is WebDavStorage else ())
    return _by_url(kind, url, options, lambda: tree(there), holding, refuses)


_URLS = {
    "url file": _url_file,
    "url s3": _url_s3,
    "url azure": _url_azure,
    "url gcs": _url_gcs,
    "url sftp": _url_sftp,
    "url webdav": _url_webdav,
}
# Those that take minutes for the whole contract, and those that are by another way what another
# one is.
_MARKS = {
    **dict.fromkeys(("url azure", "url gcs", "url s3", "url sftp", "url webdav"), "slow"),
    **dict.fromkeys(("arrow s3 with metadata", "s3fs s3"), "exhaustive"),
}


def _marked(kinds: Iterable[str]) -> list[Any]:
    marks = {kind: [getattr(pytest.mark, name)] for kind, name in _MARKS.items()}
    return [pytest.param(kind, marks=marks.get(kind, [])) for kind in kinds]


URL_KINDS = _marked(_URLS)

KINDS = _marked(
    [
        *("arrow local", "arrow subtree", "arrow around fsspec local", "fsspec dir"),
        *("fsspec memory", "fsspec unknown", "arrow mock", "arrow unknown handler"),
        *("arrow s3", "arrow s3 with metadata", "s3fs s3"),
        *_URLS,
    ]
)
