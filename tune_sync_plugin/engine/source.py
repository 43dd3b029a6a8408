"""Reads one local file for upload, defended against whoever is still writing it.

A reader never gets more than the size in the file's fingerprint, never blocks on a FIFO that took
the file's place, and hears of a file that shrank as an error of its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from tune_sync_plugin.engine.checksum import Checksum, checksum_of
from tune_sync_plugin.engine.scan import FileEntry, Fingerprint
from tune_sync_plugin.errors import SourceChangedError, SourceError

CHUNK_BYTES = 1 << 20

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}


class Content(Protocol):
    """What a storage can be told to write; its size is known beforehand."""

    size: int

    def chunks(self) -> Iterator[bytes]:
        """All of it, in order, from the start."""

    def read(self) -> bytes:
        """The whole of it, for what is small enough to hold in memory."""


class Memory:
    """A content that is in memory: ours, such as an index."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def chunks(self) -> Iterator[bytes]:
        yield self._data

    def read(self) -> bytes:
        return self._data


class Source:
    """A context manager around one open file of ``size`` bytes.

    ``fingerprint`` is the scan's, unless another file has taken the place since (by a rename, or
    because a directory was swapped): then it is that one's, and so is the size. The scan's would
    cut a replaced file short, and be taken for true once a directory is swapped back.

    Attributes:
        checksum: Of what was handed out last, once all of it was: the file may be written to at
            the same time, so that reading it again would not tell.

    Raises:
        SourceChangedError: The file is gone, is no regular file any more, or shrank.
        SourceError: It can't be read.
    """

    def __init__(self, entry: FileEntry) -> None:
        self.path = entry.path
        self.checksum = ""
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
        checksum = Checksum()
        while offset < self.size:
            try:
                chunk = os.pread(self._fd, min(CHUNK_BYTES, self.size - offset), offset)
            except OSError as error:
                raise self._error(error) from error
            if not chunk:
                raise SourceChangedError(f"{self.path} shrank while it was read")
            offset += len(chunk)
            checksum.update(chunk)
            yield chunk
        self.checksum = checksum.text()

    def read(self) -> bytes:
        """The whole of it, for files small enough to hold in memory."""
        return b"".join(self.chunks())

    def matches(self, checksum: str) -> bool:
        """Whether the content has this checksum, to tell states with equal fingerprints apart."""
        return checksum_of(self.chunks(), like=checksum) == checksum
