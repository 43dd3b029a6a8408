"""Storage on an fsspec file system.

``put`` and ``put_file`` are avoided: the first nests directories on its second call, the second
loops for ever on a file that is truncated while it is sent (DESIGN.md 7).
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from typing import Any

from fsspec import AbstractFileSystem

from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, is_partial, partial_path, service

# Up to here one request sends the whole file; above it goes in parts.
_WHOLE_BYTES = 8 << 20

# Stores where a name points at a whole object or at none, by fsspec's protocol names.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "hf"}

# Protocols that can make a file longer in place, and tell when it was last changed.
_APPENDABLE = {"sftp", "ssh"}
# Below it a file is replaced as a whole, which costs no more.
_APPEND_FROM_BYTES = 1 << 20
_COMPARED_BYTES = 16 << 10


class FsspecStorage:
    """A prefix on an ``fsspec.AbstractFileSystem``."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        protocol = filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.has_directories = not protocols & _OBJECT_STORES
        self.has_checksums = bool(protocols & {"s3", "s3a"})
        self.append_from = _APPEND_FROM_BYTES if protocols & _APPENDABLE else None
        # Attributes too: an option may have been given by position.
        given = {name: getattr(filesystem, name, None) for name in ("host", "port", "account_name")}
        self.name = f"{min(protocols)}:{service(given | filesystem.storage_options)}{self._root}"

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        final = self._at(path)
        if "?versionId=" in path and "s3" in self._fs.protocol:
            raise ValueError("s3fs would cut the name off at '?versionId='; rename the file")
        if not self.has_directories:
            self._send(final, source)
            return None
        partial = self._at(partial_path(path, run_id))
        self._fs.makedirs(posixpath.dirname(final), exist_ok=True)
        try:
            self._send(partial, source)
            self._rename(partial, final)
        except BaseException:
            self.discard_partial(path, run_id)
            raise
        return None

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        """In place, so that a reader may see any length from the old to the new one."""
        if self.append_from is None or self.stat(path) != Stat(tail.start, etag):
            return False
        # Its time is known to the second, within which somebody else may have replaced it.
        before = tail.what_comes_before(_COMPARED_BYTES)
        at = self._at(path)
        if self._fs.cat_file(at, start=tail.start - len(before), end=tail.start) != before:
            return False
        with self._fs.open(self._at(path), "ab") as out:
            for chunk in tail.chunks():
                out.write(chunk)
        return True

    def _send(self, target: str, source: Content) -> None:
        if source.size <= _WHOLE_BYTES:
            self._fs.pipe_file(target, source.read())
            return
        out = self._fs.open(target, "wb")
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
        changed = info.get("mtime") if self.append_from else None
        return Stat(info["size"], (info.get("ETag") or "").strip('"') or (changed and str(changed)))

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
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._fs.rm_file(self._at(path))
        # Listed first, since some file systems' rmdir takes what is in it along.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            while (path := posixpath.dirname(path)) and not self._fs.ls(self._at(path)):
                self._fs.rmdir(self._at(path))

    def discard_partial(self, path: str, run_id: str) -> None:
        if self.has_directories:
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._at(partial_path(path, run_id)))
