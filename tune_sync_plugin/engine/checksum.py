"""Checksums of contents, against accidents and not against attackers. Two kinds, each for its use:

* *MD5 by parts*, computed as S3 computes its ETags, so that S3 itself vouches for an upload. A
  content of up to ``PART_BYTES`` has the MD5 of its bytes; a longer one the MD5 of its parts' MD5s,
  with the number of parts and their size behind it.
* *Rolling*: XXH3 over all bytes so far, sixty times as fast. It tells whether a file still begins
  with what was sent, and is the checksum of what storage can't or did not vouch for by an MD5.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

# The size of a part in an upload to S3, pyarrow's too.
PART_BYTES = 10 << 20
# S3 takes 10,000 of them.
_MOST_PARTS = 10_000

_ETAG = re.compile(r"([0-9a-f]{32})(?:-(\d+))?")
ROLLING = "xxh3:"
"""What the rolling kind's texts begin with; as ``like`` it stands for that kind."""
CHECKSUM = re.compile(
    rf"{ROLLING}[0-9a-f]{{32}}|[0-9a-f]{{32}}(?:-[0-9]{{1,9}}/[1-9][0-9]{{0,14}})?"
)


def part_bytes_for(size: int) -> int:
    """The size of the parts in which a content of ``size`` bytes is sent.

    Example:
        >>> part_bytes_for(1 << 30) >> 20, part_bytes_for(1 << 40) >> 20
        (10, 110)
    """
    needed = -(-size // (_MOST_PARTS * PART_BYTES))
    return PART_BYTES * max(needed, 1)


class Hasher(Protocol):
    """Computes a checksum from a content's chunks."""

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""

    def text(self) -> str:
        """The checksum of everything so far."""


class Checksum:
    """MD5 by parts.

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


class Rolling:
    """XXH3, 128 bits.

    Example:
        >>> rolling = Rolling()
        >>> rolling.update(b"hello")
        >>> rolling.text()
        'xxh3:b5e9c1ad071b3e7fc779cfaa5e523818'
    """

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, chunk: bytes) -> None:
        """Add the next bytes."""
        self._hash.update(chunk)

    def text(self) -> str:
        """The checksum of everything so far."""
        return ROLLING + self._hash.hexdigest()

    def copy(self) -> Rolling:
        """One that goes on from here by itself."""
        other = Rolling()
        other._hash = self._hash.copy()
        return other


def _md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)


def hasher(like: str = "") -> Hasher:
    """What computes a checksum of the kind, and with the parts, of ``like``."""
    if like.startswith(ROLLING):
        return Rolling()
    _, _, part_bytes = like.partition("/")
    return Checksum(int(part_bytes)) if part_bytes else Checksum()


def is_like(checksum: str, other: str) -> bool:
    """Whether equal contents have equal checksums of these two kinds."""
    kinds = {(text.startswith(ROLLING), text.partition("/")[2]) for text in (checksum, other)}
    return len(kinds) == 1


def checksum_of(chunks: Iterable[bytes], like: str = "") -> str:
    """A content's checksum, as the checksum ``like`` is made, that it is to be compared to."""
    computing = hasher(like)
    for chunk in chunks:
        computing.update(chunk)
    return computing.text()


def etag_matches(checksum: str, etag: str | None) -> bool | None:
    """Whether an S3 ETag says that an object has this checksum; ``None`` if it can't tell.

    It can't where it is not an MD5 at all (other stores), or of parts of another size. One that
    differs may also be that of an encrypted object: read the content before believing it.
    """
    found = _ETAG.fullmatch(etag.strip('"')) if etag else None
    if not found or checksum.startswith(ROLLING):
        return None
    digest, parts = found[1], int(found[2] or 0)
    ours, _, rest = checksum.partition("-")
    our_parts = int(rest.partition("/")[0]) if rest else 1
    if our_parts > 1:
        return digest == ours if parts == our_parts else None
    if parts == 1:  # a multipart upload of one part
        ours = _md5(bytes.fromhex(ours)).hexdigest()
    return digest == ours if parts <= 1 else None


# Besides ours: those of AWS's own tools, and of others that people copy with.
_PARTS_OF_OTHERS = tuple(size << 20 for size in (5, 8, 16, 32, 50, 64, 100))


def has_etag(read: Callable[[], Iterable[bytes]], size: int, etag: str | None) -> bool | None:
    """Whether a content of ``size`` bytes has that S3 ETag; ``None`` if it can't be told.

    Unlike :func:`etag_matches` it has the content, and can try the sizes of parts that clients use.

    Args:
        read: Returns the content's chunks; called once for each size of parts that may be it.
        size: Its size.
        etag: See :class:`.storage.Stat`.

    Example:
        >>> has_etag(lambda: [b"hello"], 5, "5d41402abc4b2a76b9719d911017c592")
        True
    """
    found = _ETAG.fullmatch(etag.strip('"')) if etag else None
    if not found:
        return None
    parts = int(found[2] or 0)
    sizes = {part_bytes_for(size): None, **dict.fromkeys(_PARTS_OF_OTHERS)}
    fitting = [each for each in sizes if -(-size // each) == parts] if parts > 1 else [size or 1]
    if any(etag_matches(checksum_of(read(), f"/{each}"), etag) for each in fitting):
        return True
    return False if fitting else None
