"""Reads one local file for upload, defended against whoever is still writing it.

What a reader gets is the file as it was when it was opened, or an error: a file that shrank or was
rewritten meanwhile is one to read again, and one that has grown since is as good. It never blocks
on a FIFO that took the file's place.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from tune_sync_plugin.engine.checksum import Rolling, checksum_of, hasher
from tune_sync_plugin.engine.scan import FileEntry, Fingerprint
from tune_sync_plugin.errors import SourceChangedError, SourceError

CHUNK_BYTES = 1 << 20

_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.ESTALE}


class Content(Protocol):
    """What a storage can be told to write; its size is known beforehand."""

    size: int

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """All of it, in order, from the start, in chunks of that size but for the last."""

    def read(self) -> bytes:
        """The whole of it, for what is small enough to hold in memory."""


class Memory:
    """A content that is in memory: ours, such as an index."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        for start in range(0, self.size, chunk_bytes):
            yield self._data[start : start + chunk_bytes]

    def read(self) -> bytes:
        return self._data


class Source:
    """A context manager around one open file of ``size`` bytes.

    Size and ``fingerprint`` are what it had when it was opened. The scan's would cut a file short
    that has been rewritten since, and be taken for true once a directory is swapped back.

    Args:
        entry: What the scan found.
        etags: Whether its checksum is to be one that S3's ETags can be compared with.

    Attributes:
        rolling: The rolling checksum of what was handed out last, once all of it was: the file may
            be written to at the same time, so that reading it again would not tell.
        checksum: Likewise the checksum that storage is compared with.

    Raises:
        SourceChangedError: The file is gone, is no regular file any more, or shrank since the scan.
        SourceError: It can't be read.
    """

    def __init__(self, entry: FileEntry, *, etags: bool = True) -> None:
        self.path = entry.path
        self.checksum = self.rolling = ""
        self._etags = etags
        try:
            # O_NONBLOCK: opening a FIFO for reading would wait for a writer.
            self._fd = os.open(entry.location, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._error(error) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise SourceChangedError(f"{self.path} is no longer a regular file")
        self.fingerprint, self._opened_ns = Fingerprint.of(status), time.time_ns()
        self.size = self.fingerprint.size
        scanned = entry.fingerprint
        if self.size < scanned.size and self.fingerprint.inode == scanned.inode:
            os.close(self._fd)  # most likely truncated, and about to be written anew
            raise self._changed("shrank before")

    def _error(self, error: OSError) -> SourceError:
        if error.errno in _GONE:
            return SourceChangedError(f"{self.path} is gone")
        return SourceError(f"reading {self.path} failed: {error.strerror or error}")

    def _changed(self, how: str) -> SourceChangedError:
        return SourceChangedError(f"{self.path} {how} it was read")

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The file's first ``size`` bytes, from the start.

        Raises:
            SourceChangedError: They never were the file's content at any one time.
        """
        rolling = Rolling()
        checksum = hasher() if self._etags else rolling
        for chunk in self.from_there(0, rolling, chunk_bytes):
            if checksum is not rolling:
                checksum.update(chunk)
            yield chunk
        self.checksum, self.rolling = checksum.text(), rolling.text()

    def from_there(self, start: int, rolling: Rolling, chunk_bytes: int) -> Iterator[bytes]:
        """The bytes from ``start`` on, each chunk added to the checksum of those before it.

        Raises:
            SourceChangedError: As :meth:`chunks`, before the last chunk is handed out: so no
                storage has the whole by then.
        """
        left = self.size - start
        for chunk in self._bytes(start, self.size, chunk_bytes):
            rolling.update(chunk)
            left -= len(chunk)
            if not left:
                self._must_still_be(rolling.text())
            yield chunk

    def _bytes(self, start: int, end: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        while start < end:
            try:
                chunk = os.pread(self._fd, min(chunk_bytes, end - start), start)
            except OSError as error:
                raise self._error(error) from error
            if not chunk:
                raise self._changed("shrank while")
            start += len(chunk)
            yield chunk

    def read(self) -> bytes:
        """The whole of it, for files small enough to hold in memory."""
        return b"".join(self.chunks())

    def _must_still_be(self, rolling: str) -> None:
        """Raises if it no longer begins with what was read: it is being rewritten."""
        same = Fingerprint.of(os.fstat(self._fd)) == self.fingerprint
        if same and not self.fingerprint.is_racy(self._opened_ns):
            return  # nothing has been written since
        if not self.matches(rolling):
            raise self._changed("was rewritten while")

    def matches(self, checksum: str) -> bool:
        """Whether the content has this checksum, to tell states with equal fingerprints apart."""
        return checksum_of(self._bytes(0, self.size), like=checksum) == checksum

    def compute_checksum(self) -> str:
        """Read it all for its checksum."""
        for _ in self.chunks():
            pass
        return self.checksum

    def tail(self, start: int, rolling: str) -> Tail | None:
        """What follows the first ``start`` bytes, if these still have that rolling checksum.

        Reads them, and so knows the whole content's rolling checksum once it has read the tail.
        """
        computing = Rolling()
        for chunk in self._bytes(0, start):
            computing.update(chunk)
        return Tail(self, start, computing) if computing.text() == rolling else None


class Tail:
    """The end of a file that has grown, as a content of its own.

    Attributes:
        start: The length of what is before it.
        size: Its own.
        rolling: The rolling checksum of the whole file up to its end, once it was handed out.
    """

    def __init__(self, source: Source, start: int, before: Rolling) -> None:
        self.start, self.size = start, source.size - start
        self.rolling = ""
        self._source, self._before = source, before

    def what_comes_before(self, size: int) -> bytes:
        """At most so many bytes right before it."""
        return b"".join(self._source._bytes(max(self.start - size, 0), self.start))

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        rolling = self._before.copy()
        yield from self._source.from_there(self.start, rolling, chunk_bytes)
        self.rolling = rolling.text()

    def read(self) -> bytes:
        return b"".join(self.chunks())
