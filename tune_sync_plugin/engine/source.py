"""Reads one local file for upload, defended against whoever is still writing it.

A reader never gets more than the size in the file's fingerprint, never blocks on a FIFO that took
the file's place, and hears of a file that shrank as an error of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from functools import partial
from types import TracebackType

from tune_sync_plugin.engine.scan import FileEntry, Fingerprint
from tune_sync_plugin.errors import SourceChangedError, SourceError

CHUNK_BYTES = 1 << 20

_hasher = partial(hashlib.blake2b, digest_size=16)

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}


class Source:
    """A context manager around one open file of ``size`` bytes.

    ``fingerprint`` is the scan's, unless another file has taken the place since (by a rename, or
    because a directory was swapped): then it is that one's, and so is the size. The scan's would
    cut a replaced file short, and be taken for true once a directory is swapped back.

    Attributes:
        hashing: Whether to hash what is handed out; off unless set.
        sent_digest: The hash of what was handed out last.

    Raises:
        SourceChangedError: The file is gone, is no regular file any more, or shrank.
        SourceError: It can't be read.
    """

    def __init__(self, entry: FileEntry) -> None:
        self.path = entry.path
        self.hashing = False
        self.sent_digest: bytes | None = None
        try:
            # O_NONBLOCK: opening a FIFO for reading would wait for a writer.
            self._fd = os.open(entry.location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise SourceChangedError(f"{self.path} is no longer a regular file")
        replaced = status.st_ino != entry.fingerprint.inode
        self.fingerprint = Fingerprint.of(status) if replaced else entry.fingerprint
        self.size = self.fingerprint.size

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
        hasher = _hasher() if self.hashing else None
        while offset < self.size:
            try:
                chunk = os.pread(self._fd, min(CHUNK_BYTES, self.size - offset), offset)
            except OSError as error:
                raise self._error(error) from error
            if not chunk:
                raise SourceChangedError(f"{self.path} shrank while it was read")
            offset += len(chunk)
            if hasher:
                hasher.update(chunk)
            yield chunk
        self.sent_digest = hasher.digest() if hasher else None

    def read(self) -> bytes:
        """The whole of it, for files small enough to hold in memory."""
        return b"".join(self.chunks())

    def digest(self) -> bytes:
        """A hash of the content, to tell two states with the same fingerprint apart."""
        result = _hasher()
        for chunk in self.chunks():
            result.update(chunk)
        return result.digest()
