"""Storage on SFTP and WebDAV: what sshfs and webdav4 do otherwise than fsspec's file systems do.

Both have real directories, a rename that replaces, and errors of their own, which become Python's
here. Nothing is asked of a server beyond its protocol: SFTP alone allows no shell commands.
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from fsspec.asyn import sync

from tune_sync_plugin.engine.fsspec_storage import FsspecStorage
from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, is_partial, partial_path

# Below it a file is replaced as a whole, which costs no more.
_APPEND_FROM_BYTES = 1 << 20
_COMPARED_BYTES = 16 << 10

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class SftpStorage(FsspecStorage):
    """A directory on an SFTP server, by ``sshfs.SSHFileSystem``."""

    append_from = _APPEND_FROM_BYTES

    def __init__(self, filesystem: Any, root: str) -> None:
        self._client, self._lock = filesystem, threading.Lock()
        super().__init__(filesystem, root)

    @property
    def _fs(self) -> Any:
        """The client; a new one if its connection is gone, which it does not see to itself."""
        with self._lock:
            if self._client.client.is_closed():
                old = self._client
                options = {**old.storage_options, "skip_instance_cache": True}
                self._client = type(old)(*old.storage_args, **options)
            return self._client

    @_fs.setter
    def _fs(self, filesystem: Any) -> None:
        self._client = filesystem

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        """In place, so that a reader may see any length from the old to the new one."""
        if self.append_from is None or self.stat(path) != Stat(tail.start, etag):
            return False
        # Its time is known to the second, within which somebody else may have replaced it.
        before = tail.what_comes_before(_COMPARED_BYTES)
        with self._fs.open(self._at(path), "rb") as file:  # cat_file knows no start and no end
            file.seek(tail.start - len(before))
            if file.read(len(before)) != before:
                return False
        with self._fs.open(self._at(path), "ab") as out:
            for chunk in tail.chunks():
                out.write(chunk)
        return True

    def _stream(self, target: str, source: Content, options: Mapping[str, Any]) -> None:
        # Without a block size: that is the size of a packet here.
        super()._stream(target, source, {})

    def _version(self, info: Mapping[str, Any]) -> str | None:
        return str(info["mtime"]) if info.get("mtime") else None

    def _rename(self, old: str, new: str) -> None:
        self._fs.mv(old, new)  # posix-rename@openssh.com, which replaces in one step

    def _remove_directory(self, path: str) -> None:
        sync(self._fs.loop, self._fs._rmdir, self._at(path))  # its rmdir does nothing

    def copy(self, path: str, to: str) -> None:
        """By way of here; its cp_file runs a shell command."""
        partial = partial_path(to, "copy")
        self._make_directory(posixpath.dirname(to))
        try:
            with self._fs.open(self._at(partial), "wb") as out:
                for chunk in self.read(path):
                    out.write(chunk)
            self._rename(self._at(partial), self._at(to))
        except BaseException:
            self.discard_partial(to, "copy")
            raise


class WebDavStorage(FsspecStorage):
    """A collection on a WebDAV server, by ``webdav4.fsspec.WebdavFileSystem``."""

    def __init__(self, filesystem: Any, root: str) -> None:
        super().__init__(filesystem, root)
        self._client = filesystem.client
        where = re.sub(r"(?<=://)[^/]*@", "", str(self._client.base_url)).rstrip("/")
        self.name = f"webdav:{where}/{self._root.lstrip('/')}"

    def _at(self, path: str) -> str:
        # What is not escaped is sent as it is, and then a file %41 is stored as A.
        return quote(f"{self._root}/{path}")

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        if _CONTROL.search(path):
            raise ValueError(
                "servers list names with control characters as others; rename the file"
            )
        with _explained(path):
            return super().write(path, source, run_id)

    def stat(self, path: str) -> Stat | None:
        with _explained(path):
            return super().stat(path)

    def read(self, path: str) -> Iterator[bytes]:
        # Its open() first looks the path up among unescaped ones.
        url = self._client.join_url(self._at(path))
        whole = {"Accept-Encoding": "identity"}
        with _explained(path), self._client.http.stream("GET", url, headers=whole) as answer:
            status = answer.status_code
            if status == HTTPStatus.NOT_FOUND:
                raise FileNotFoundError(path)
            if status != HTTPStatus.OK:
                refused = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
                raise (PermissionError if refused else OSError)(
                    f"WebDAV request of {path}: HTTP status {status}"
                )
            yield from answer.iter_raw(CHUNK_BYTES)

    def _version(self, info: Mapping[str, Any]) -> str | None:
        etag: str | None = info.get("etag")
        return f"webdav:{etag}" if etag else None  # it may look like an MD5, and be none

    def _make_directory(self, path: str) -> None:
        """Collection by collection from the innermost that exists, which most often is the last."""
        from webdav4.client import ResourceAlreadyExists

        missing = []
        at = f"{self._root}/{path}".rstrip("/")
        while at.strip("/") and not self._client.exists(quote(at)):
            missing.append(at)
            at = posixpath.dirname(at)
        for directory in reversed(missing):
            # By another thread, between the two.
            with contextlib.suppress(ResourceAlreadyExists):
                self._client.mkdir(quote(directory))

    def _send(self, target: str, source: Content) -> None:
        # In one request of known length, which a server does not take for complete when it breaks
        # off. What its open() gives would keep the file on a disk here first.
        self._client.upload_fileobj(
            _Reader(source.chunks()), target, overwrite=True, size=source.size
        )

    def discard_partial(self, path: str, run_id: str) -> None:
        # Of an upload that broke off, a server may make a file when it notices, a moment later.
        for _ in range(6):
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._at(partial_path(path, run_id)))
                return
            time.sleep(0.25)

    def _rename(self, old: str, new: str) -> None:
        # Overwriting it would remove a directory with all that is in it.
        with contextlib.suppress(FileNotFoundError):
            if self._fs.info(new)["type"] == "directory":
                raise IsADirectoryError(f"{posixpath.basename(new)} is a directory there")
        self._client.move(old, new, overwrite=True)

    def files(self) -> dict[str, int]:
        with _explained(""):
            return dict(self._walk(""))

    def _walk(self, directory: str) -> Iterator[tuple[str, int]]:
        try:
            found = self._fs.ls(self._at(directory))
        except FileNotFoundError:
            return
        for info in found:
            path = posixpath.join(directory, posixpath.basename(info["name"].rstrip("/")))
            if info["type"] == "directory":
                yield from self._walk(path)
            elif not is_partial(path):
                yield path, info["size"]

    def copy(self, path: str, to: str) -> None:
        with _explained(path):
            self._client.copy(self._at(path), self._at(to), overwrite=True)

    def remove(self, path: str) -> None:
        with _explained(path):
            super().remove(path)


class _Reader(io.RawIOBase):
    """A content's chunks as a file to read from, which is as long as it is said to be."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks

    def read(self, size: int = -1) -> bytes:
        return next(self._chunks, b"")


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Makes Python's errors of webdav4's and httpx's."""
    import httpx
    from webdav4.client import ForbiddenOperation, HTTPError, InsufficientStorage

    try:
        yield
    except (ForbiddenOperation, HTTPError) as error:
        status = getattr(error, "status_code", 403)
        text = f"WebDAV request of {path}: HTTP status {status} ({error})"
        raise (PermissionError if status in (401, 403) else OSError)(text) from None
    except InsufficientStorage as error:
        raise OSError(28, f"WebDAV request of {path}: {error}") from None
    except httpx.TransportError as error:
        raise ConnectionError(f"WebDAV request of {path}: {error}") from None
    except httpx.InvalidURL as error:
        raise ValueError(f"{path}: {error}") from None
