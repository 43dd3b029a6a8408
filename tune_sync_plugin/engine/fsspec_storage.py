"""Storage on an fsspec file system.

``put`` and ``put_file`` are avoided: the first nests directories on its second call, the second
loops for ever on a file that is truncated while it is sent (DESIGN.md 7). What is peculiar to an
object store's client is in the tables here, what is to a file server's in ``file_servers.py``.
"""

from __future__ import annotations

import base64
import contextlib
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fsspec import AbstractFileSystem

from tune_sync_plugin.engine import memory
from tune_sync_plugin.engine.checksum import part_bytes_for
from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, Storage, is_partial, partial_path, service

# Up to here one request sends the whole file; above it goes in parts.
_WHOLE_BYTES = 8 << 20
# Copies of a part that a client makes: its buffer, what it takes from there, what it sends.
_COPIES = 3

# Stores where a name points at a whole object or at none, by fsspec's protocol names.
_S3, _GCS, _AZURE = {"s3", "s3a"}, {"gs", "gcs"}, {"abfs", "abfss", "az"}
_OBJECT_STORES = _S3 | _GCS | _AZURE | {"oss", "oci", "hf"}

# Names that a client would cut short or change, and so store a file under another's.
_MISTAKEN = (
    (_S3, re.compile(r"\?versionId="), "s3fs would cut the name off at '?versionId='"),
    (
        _AZURE,
        # It takes them for URLs.
        re.compile(r"[\t\r\n]|\?versionid=|\?$"),
        "adlfs would drop line ends, tabs, a ? at the end, or what follows '?versionid='",
    ),
    (_GCS, re.compile(r"#\d+$"), "gcsfs would take the number after the # for a version"),
)


def _etag(info: Mapping[str, Any]) -> str | None:
    return (info.get("ETag") or "").strip('"') or None


def _gcs_md5(info: Mapping[str, Any]) -> str | None:
    digest = info.get("md5Hash")  # an object that was composed of others has none
    return base64.b64decode(digest).hex() if digest else None


def _azure_md5(info: Mapping[str, Any]) -> str | None:
    digest = (info.get("content_settings") or {}).get("content_md5")
    return bytes(digest).hex() if digest else info.get("etag")


# How a store tells a content's MD5; the others don't.
_MD5: tuple[tuple[set[str], Callable[[Mapping[str, Any]], str | None]], ...] = (
    (_S3, _etag),
    (_GCS, _gcs_md5),
    (_AZURE, _azure_md5),
)
# Have the client compare the MD5 that it gets for an answer, also of what goes in parts.
_SENDING = ((_GCS, {"consistency": "md5"}),)
# All that gcsfs says of a bucket that is not there is where it wanted to put the object.
_NO_BUCKET = re.compile(r"/storage/v1/b/([^/\s]+)/o(?:\?name=\S*)?$")
_NO_BUCKET_TEXT = "The specified bucket does not exist: {}"


def fsspec_storage(filesystem: Any, root: str) -> Storage:
    """The implementation for an fsspec file system."""
    from tune_sync_plugin.engine.file_servers import SftpStorage, WebDavStorage

    kinds = {"sshfs": SftpStorage, "webdav4": WebDavStorage}
    kind = kinds.get(type(filesystem).__module__.partition(".")[0], FsspecStorage)
    return kind(filesystem, root)


class FsspecStorage:
    """A prefix on an ``fsspec.AbstractFileSystem``."""

    append_from: int | None = None

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        protocol = filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.has_directories = not protocols & _OBJECT_STORES
        self._md5 = next((md5 for names, md5 in _MD5 if protocols & names), None)
        self.has_checksums = self._md5 is not None
        self._mistaken = [(name, why) for names, name, why in _MISTAKEN if protocols & names]
        self._sending = next((options for names, options in _SENDING if protocols & names), {})
        # Attributes too: an option may have been given by position.
        given = {name: getattr(filesystem, name, None) for name in ("host", "port", "account_name")}
        self.name = f"{min(protocols)}:{service(given | filesystem.storage_options)}{self._root}"

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        for name, why in self._mistaken:
            if name.search(path):
                raise ValueError(f"{why}; rename the file")
        final = self._at(path)
        if not self.has_directories:
            try:
                self._send(final, source)
            except FileNotFoundError as error:
                if gone := _NO_BUCKET.search(str(error)):
                    raise FileNotFoundError(_NO_BUCKET_TEXT.format(gone[1])) from None
                raise
            return None
        partial = self._at(partial_path(path, run_id))
        self._make_directory(posixpath.dirname(path))
        try:
            self._send(partial, source)
            self._rename(partial, final)
        except BaseException:
            self.discard_partial(path, run_id)
            raise
        return None

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        return False

    def _make_directory(self, path: str) -> None:
        self._fs.makedirs(self._at(path).rstrip("/"), exist_ok=True)

    def _send(self, target: str, source: Content) -> None:
        if source.size <= _WHOLE_BYTES:
            with memory.bound.take(source.size):
                self._fs.pipe_file(target, source.read(), **self._sending)
            return
        part_bytes = part_bytes_for(source.size)
        with memory.bound.take(_COPIES * part_bytes):
            self._stream(target, source, {"block_size": part_bytes, **self._sending})

    def _stream(self, target: str, source: Content, options: Mapping[str, Any]) -> None:
        out = self._fs.open(target, "wb", **options)
        try:
            for chunk in source.chunks():
                out.write(chunk)
        except BaseException:
            # Aborts the upload; without it the destructor would complete half a file.
            with contextlib.suppress(Exception):
                out.discard()
            with contextlib.suppress(AttributeError):
                out.closed = True
            raise
        out.close()

    def _rename(self, old: str, new: str) -> None:
        # Of the object, to which asynchronous file systems attach theirs.
        if getattr(self._fs.mv, "__func__", None) is AbstractFileSystem.mv:
            # It would take a name with a * or [ in it for a pattern.
            self._fs.cp_file(old, new)
            self._fs.rm_file(old)
        else:
            self._fs.mv(old, new)

    def stat(self, path: str) -> Stat | None:
        self._forget(path)
        try:
            info = self._fs.info(self._at(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        if info["type"] != "file":
            return None
        return Stat(info["size"], self._version(info))

    def _version(self, info: Mapping[str, Any]) -> str | None:
        return self._md5(info) if self._md5 else None

    def read(self, path: str) -> Iterator[bytes]:
        self._forget(path)
        with self._fs.open(self._at(path), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def files(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        root = self._fs._strip_protocol(self._root)
        return {
            posixpath.relpath(name, root): info["size"]
            for name, info in self._fs.find(self._root, detail=True).items()
            if info["type"] == "file" and not is_partial(name)
        }

    def copy(self, path: str, to: str) -> None:
        self._fs.cp_file(self._at(path), self._at(to))

    def _forget(self, path: str) -> None:
        # What somebody else has written since is not in the listings that fsspec keeps.
        self._fs.invalidate_cache(posixpath.dirname(self._at(path)))

    def remove(self, path: str) -> None:
        # Asked first, since some file systems' rm_file takes a directory with all that is in it.
        if self.stat(path):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))
        # Listed first, likewise.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            while (path := posixpath.dirname(path)) and not self._fs.ls(self._at(path)):
                self._remove_directory(path)

    def _remove_directory(self, path: str) -> None:
        self._fs.rmdir(self._at(path))

    def discard_partial(self, path: str, run_id: str) -> None:
        if self.has_directories:
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._at(partial_path(path, run_id)))
