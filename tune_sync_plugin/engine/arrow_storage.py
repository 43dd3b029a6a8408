"""Storage on a native pyarrow file system: what Ray resolves ``s3://``, ``gs://`` and the like to.

Streams, never ``pyarrow.fs.copy_files``: with pyarrow 19 to 26 that returns without error when an
upload to S3 failed (DESIGN.md 2, row 13). ``write`` and ``close`` of a stream do raise.
"""

from __future__ import annotations

import contextlib
import ctypes
import posixpath
from collections.abc import Iterator
from typing import Any

from pyarrow.fs import FileSelector, FileType

from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, is_partial, partial_path, service

# Up to here a file is read before its upload starts, so that one that shrinks costs no upload.
_WHOLE_BYTES = 4 << 20

_OBJECT_STORES = {"s3", "gcs", "abfs"}


class ArrowStorage:
    """A prefix on a ``pyarrow.fs.FileSystem``."""

    append_from = None

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self.has_directories = filesystem.type_name not in _OBJECT_STORES
        self.has_checksums = filesystem.type_name == "s3"
        self.name = f"{filesystem.type_name}:{service(_options(filesystem))}{self._root}"

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        if not self.has_directories:
            self._stream(self._at(path), source)
            return None
        final, partial = self._at(path), self._at(partial_path(path, run_id))
        self._fs.create_dir(posixpath.dirname(final), recursive=True)
        try:
            self._stream(partial, source)
            self._fs.move(partial, final)
        except BaseException:
            self.discard_partial(path, run_id)
            raise
        return None

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        return False

    def _stream(self, target: str, source: Content) -> None:
        chunks = [source.read()] if source.size <= _WHOLE_BYTES else source.chunks()
        # compression=None: the default gzips a file whose name ends in .gz once more.
        out = self._fs.open_output_stream(target, compression=None)
        try:
            for chunk in chunks:
                out.write(chunk)
        except BaseException:
            if not self.has_directories:
                _never_close(out)
            raise
        out.close()

    def stat(self, path: str) -> Stat | None:
        if self._fs.type_name != "s3":
            with contextlib.suppress(NotADirectoryError):
                info = self._fs.get_file_info(self._at(path))
                return Stat(info.size) if info.type == FileType.File else None
            return None
        try:
            # One request, and the only way to the ETag; nothing is read.
            with self._fs.open_input_stream(self._at(path), compression=None) as stream:
                facts = stream.metadata()
        except FileNotFoundError:
            return None
        return Stat(int(facts["Content-Length"]), facts.get("ETag", b"").decode().strip('"'))

    def read(self, path: str) -> Iterator[bytes]:
        with self._fs.open_input_stream(self._at(path), compression=None) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk

    def files(self) -> dict[str, int]:
        everything = FileSelector(self._root, recursive=True, allow_not_found=True)
        return {
            posixpath.relpath(info.path, self._root): info.size
            for info in self._fs.get_file_info(everything)
            if info.type == FileType.File and not is_partial(info.path)
        }

    def copy(self, path: str, to: str) -> None:
        if not self._fs.type_name.startswith("py::"):
            self._fs.copy_file(self._at(path), self._at(to))
            return
        # A Python handler may copy into a directory of the new name, as fsspec does.
        with self._fs.open_output_stream(self._at(to), compression=None) as out:
            for chunk in self.read(path):
                out.write(chunk)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if self._fs.get_file_info(self._at(path)).type == FileType.File:
                self._fs.delete_file(self._at(path))
            # Listed first, since delete_dir takes what is in it along.
            while (path := posixpath.dirname(path)) and not self._fs.get_file_info(
                FileSelector(self._at(path))
            ):
                self._fs.delete_dir(self._at(path))

    def discard_partial(self, path: str, run_id: str) -> None:
        if self.has_directories:
            with contextlib.suppress(OSError):
                self._fs.delete_file(self._at(partial_path(path, run_id)))


def _never_close(out: Any) -> None:
    """Keep a half-written object from being published.

    pyarrow can't abort an upload, and both ``close`` and the destructor complete it: the half
    object would replace the whole one. So the stream is leaked: a few megabytes, in a worker
    process that ends with the experiment, for an upload that broke off.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(out))


def _options(filesystem: Any) -> dict[str, Any]:
    """What the client was made with, as far as pyarrow tells."""
    try:
        options = filesystem.__reduce__()[1][0]
    except (TypeError, LookupError, AttributeError):
        return {}
    return options if isinstance(options, dict) else {}
