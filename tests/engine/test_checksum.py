"""Checksums of contents, and what an ETag says about one."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tune_sync_plugin.engine.checksum import PART_BYTES, Checksum, checksum_of, etag_matches

CONTENT = b"0123456789"


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def s3_etag(content: bytes, part_bytes: int) -> str:
    """The ETag of a multipart upload, by S3's rule and none of our code."""
    parts = [content[at : at + part_bytes] for at in range(0, len(content), part_bytes)] or [b""]
    digests = b"".join(hashlib.md5(part).digest() for part in parts)
    return f"{md5(digests)}-{len(parts)}"


@given(content=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40)), part=st.integers(1, 12))
@example(content=b"12345678", cuts=[], part=4)  # ends with a part
@example(content=b"", cuts=[], part=4)
def test_depends_on_content_and_not_on_chunks(content: bytes, cuts: list[int], part: int) -> None:
    bounds = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    checksum = Checksum(part)
    for start, end in itertools.pairwise(bounds):
        checksum.update(content[start:end])
    whole = len(content) <= part
    assert checksum.text() == (md5(content) if whole else f"{s3_etag(content, part)}/{part}")
    assert checksum_of([content], like=checksum.text() if not whole else "") == (
        md5(content) if whole else checksum.text()
    )


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_around_the_size_of_a_part(extra: int) -> None:
    content = b"x" * (PART_BYTES + extra)
    expected = f"{s3_etag(content, PART_BYTES)}/{PART_BYTES}" if extra > 0 else md5(content)
    assert checksum_of([content]) == expected


def test_text_may_be_asked_for_in_between() -> None:
    checksum = Checksum(4)
    checksum.update(b"1234")
    assert checksum.text() == md5(b"1234")
    checksum.update(b"5")
    assert checksum.text() == checksum.text() == f"{s3_etag(b'12345', 4)}/4"


OTHER = md5(b"other")
WHOLE, PARTS = md5(CONTENT), f"{s3_etag(CONTENT, 4)}/4"


@pytest.mark.parametrize(
    ("checksum", "etag", "verdict"),
    [
        pytest.param(WHOLE, WHOLE, True, id="plain, equal"),
        pytest.param(WHOLE, f'"{WHOLE}"', True, id="plain, quoted"),
        pytest.param(WHOLE, OTHER, False, id="plain, other"),
        pytest.param(WHOLE, s3_etag(CONTENT, 99), True, id="one part, equal"),
        pytest.param(WHOLE, f'"{s3_etag(CONTENT, 99)}"', True, id="one part, quoted"),
        pytest.param(WHOLE, f"{OTHER}-1", False, id="one part, other"),
        pytest.param(WHOLE, f"{WHOLE}-1", False, id="one part is hashed twice"),
        pytest.param(WHOLE, s3_etag(CONTENT, 4), None, id="parts that we did not make"),
        pytest.param(WHOLE, f"{OTHER}-10000", None, id="many parts"),
        pytest.param(PARTS, s3_etag(CONTENT, 4), True, id="several parts, equal"),
        pytest.param(PARTS, f"{OTHER}-3", False, id="several parts, other"),
        pytest.param(PARTS, s3_etag(CONTENT, 8), None, id="other parts"),
        pytest.param(PARTS, WHOLE, None, id="parts here, none there"),
        pytest.param(PARTS, s3_etag(CONTENT, 99), None, id="parts here, one there"),
        pytest.param(WHOLE, None, None, id="none"),
        pytest.param(WHOLE, "", None, id="empty"),
        pytest.param(WHOLE, '""', None, id="empty, quoted"),
        pytest.param(WHOLE, "0x8DCABCDEF", None, id="Azure's"),
        pytest.param(WHOLE, "CJ+Pm9fYjvMCEAE=", None, id="Google's"),
        pytest.param(WHOLE, f'W/"{WHOLE}"', None, id="weak"),
        pytest.param(WHOLE, WHOLE[:-1], None, id="too short"),
        pytest.param(WHOLE, WHOLE + "0", None, id="too long"),
        pytest.param(WHOLE, f"{WHOLE}-", None, id="no number of parts"),
        pytest.param(WHOLE, f"{WHOLE}-x", None, id="no such number"),
        pytest.param(WHOLE, md5(b"") + "\n", None, id="line end"),
        pytest.param(md5(b""), md5(b""), True, id="empty content"),
        pytest.param(md5(b""), s3_etag(b"", 4), True, id="empty content, one part"),
    ],
)
def test_etag(checksum: str, etag: str | None, verdict: bool | None) -> None:
    assert etag_matches(checksum, etag) is verdict
