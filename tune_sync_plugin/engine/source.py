"""Reads one local file for upload, defended against whoever is still writing it.

A reader never gets more than the size seen at the scan, never blocks on a FIFO that took the file's
place, and hears of a file that shrank as an error of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from types import TracebackType

from tune_sync_plugin.engine.scan import FileEntry
from tune_sync_plugin.errors import SourceChangedError, SourceError

CHUNK_BYTES = 1 << 20

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}


class Source:
    """A context manager around one open file of ``size`` bytes.

    Raises:
        SourceChangedError: The file is gone, is no regular file any more, or shrank.
        SourceError: It can't be read.
    """

    def __init__(self, entry: FileEntry) -> None:
        self.path = entry.path
        self.size = entry.fingerprint.size
        try:
            # O_NONBLOCK: opening a FIFO for reading would wait for a writer.
            self._fd = os.open(entry.location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise SourceChangedError(f"{self.path} is no longer a regular file")

    def _error(self, error: OSError) -> SourceError:
        if error.errno in _GONE:
            return SourceChangedError(f"{self.path} is gone")
        return SourceError(f"reading {self.path} failed: {error.strerror or error}")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def chunks(self) -> Iterator[bytes]:
        """The file's first ``size`` bytes, as they are now, from the start."""
        offset = 0
        while offset < self.size:
            try:
                chunk = os.pread(self._fd, min(CHUNK_BYTES, self.size - offset), offset)
            except OSError as error:
                raise self._error(error) from error
            if not chunk:
                raise SourceChangedError(f"{self.path} shrank while it was read")
            offset += len(chunk)
            yield chunk

    def read(self) -> bytes:
        """The whole of it, for files small enough to hold in memory."""
        return b"".join(self.chunks())

    def digest(self) -> bytes:
        """A hash of the content, to tell two states with the same fingerprint apart."""
        result = hashlib.blake2b(digest_size=16)
        for chunk in self.chunks():
            result.update(chunk)
        return result.digest()
