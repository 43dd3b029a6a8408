"""Checksums of contents, computed the way S3 computes its ETags, so that one pass serves both.

A content of up to ``PART_BYTES`` has the MD5 of its bytes; a longer one the MD5 of its parts' MD5s,
with the number of parts and their size behind it. Against accidents, not against attackers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

# The size in which pyarrow uploads parts to S3.
PART_BYTES = 10 << 20

_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d+))?")


class Checksum:
    """Computes a content's checksum from its chunks.

    Args:
        part_bytes: The size of a part; the default unless it is to be compared with another's.

    Example:
        >>> checksum = Checksum()
        >>> checksum.update(b"hello")
        >>> checksum.text()
        '5d41402abc4b2a76b9719d911017c592'
        >>> checksum_of([b"12345678"], like="?-2/4")
        '914e6c4f1115d454253e32f0355f1466-2/4'
    """

    def __init__(self, part_bytes: int = PART_BYTES) -> None:
        self._part_bytes = part_bytes
        self._part = _md5()
        self._room = part_bytes
        self._parts: list[bytes] = []

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""
        while len(chunk) > self._room:
            self._part.update(chunk[: self._room])
            chunk = chunk[self._room :]
            self._parts.append(self._part.digest())
            self._part, self._room = _md5(), self._part_bytes
        self._part.update(chunk)
        self._room -= len(chunk)

    def text(self) -> str:
        """The checksum of everything so far."""
        if not self._parts:
            return self._part.hexdigest()
        parts = [*self._parts, self._part.digest()]
        return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}/{self._part_bytes}"


def _md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)


def checksum_of(chunks: Iterable[bytes], like: str = "") -> str:
    """A content's checksum, with parts as in the checksum ``like`` that it is to be compared to."""
    _, _, part_bytes = like.partition("/")
    checksum = Checksum(int(part_bytes) if part_bytes else PART_BYTES)
    for chunk in chunks:
        checksum.update(chunk)
    return checksum.text()


def etag_matches(checksum: str, etag: str | None) -> bool | None:
    """Whether an S3 ETag says that an object has this checksum; ``None`` if it can't tell.

    It can't where it is not an MD5 at all (other stores), or of parts of another size. One that
    differs may also be that of an encrypted object: read the content before believing it.
    """
    found = _ETAG.fullmatch(etag.strip('"')) if etag else None
    if not found:
        return None
    digest, parts = found[1], int(found[2] or 0)
    ours, _, rest = checksum.partition("-")
    our_parts = int(rest.partition("/")[0]) if rest else 1
    if our_parts > 1:
        return digest == ours if parts == our_parts else None
    if parts == 1:  # a multipart upload of one part
        ours = _md5(bytes.fromhex(ours)).hexdigest()
    return digest == ours if parts <= 1 else None
