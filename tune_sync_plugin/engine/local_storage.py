"""Storage on a directory of this machine: its disk, NFS, any mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator

from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, is_partial, partial_path

# Below it a file is replaced as a whole, which costs no more.
_APPEND_FROM_BYTES = 1 << 20


class LocalStorage:
    """A directory, given by its path."""

    has_directories = True
    has_checksums = False
    append_from = _APPEND_FROM_BYTES

    def __init__(self, root: str) -> None:
        self._root = os.path.abspath(root)
        self.name = f"local:{self._root}"
        self._made: set[str] = set()

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        final = os.path.join(self._root, path)
        partial = os.path.join(self._root, partial_path(path, run_id))
        parent = os.path.dirname(final)
        if parent not in self._made:
            os.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        try:
            with open(partial, "wb", buffering=0) as out:
                for chunk in source.chunks():
                    _write_all(out.fileno(), chunk)
            os.replace(partial, final)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            # Somebody may have removed the directory under us; the retry makes it anew.
            self._made.discard(parent)
            raise
        return None

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        """In place, so that a reader may see any length from the old to the new one.

        Every one of these the file has had where it is written, too.
        """
        try:
            out = os.open(os.path.join(self._root, path), os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            status = os.fstat(out)
            # Another name for it is one that it is kept under, as it was.
            if _etag(status) != etag or status.st_size != tail.start or status.st_nlink > 1:
                return False
            os.lseek(out, 0, os.SEEK_END)
            try:
                for chunk in tail.chunks():
                    _write_all(out, chunk)
            except BaseException:
                os.ftruncate(out, tail.start)
                raise
        finally:
            os.close(out)
        return True

    def stat(self, path: str) -> Stat | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.stat(os.path.join(self._root, path))
            return Stat(status.st_size, _etag(status)) if stat.S_ISREG(status.st_mode) else None
        return None

    def read(self, path: str) -> Iterator[bytes]:
        with open(os.path.join(self._root, path), "rb", buffering=0) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def files(self) -> dict[str, int]:
        found = {}
        for directory, _, names in os.walk(self._root):
            for name in names:
                location = os.path.join(directory, name)
                path = os.path.relpath(location, self._root)
                with contextlib.suppress(FileNotFoundError):
                    if not is_partial(path) and os.path.isfile(location):
                        found[path] = os.stat(location).st_size
        return found

    def copy(self, path: str, to: str) -> None:
        source, target = os.path.join(self._root, path), os.path.join(self._root, to)
        try:
            # Enough, since a file is replaced by renaming and never written to in place.
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(source, target)

    def remove(self, path: str) -> None:
        final = os.path.join(self._root, path)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            os.unlink(final)
        self._made.clear()
        with contextlib.suppress(OSError):  # the first one that is not empty ends it
            parent = os.path.dirname(final)
            while parent != self._root:
                os.rmdir(parent)
                parent = os.path.dirname(parent)

    def discard_partial(self, path: str, run_id: str) -> None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(os.path.join(self._root, partial_path(path, run_id)))


def _write_all(out: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(out, view) :]


def _etag(status: os.stat_result) -> str:
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
