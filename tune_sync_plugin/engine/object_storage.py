"""Storage on S3 by the fastest client there is: one request per small file, parts side by side.

obstore moves the bytes; what is rare (listings, copies, names that obstore does not allow) is left
to pyarrow, on the same bucket with the same options. See ``s3_options.py`` for these.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from tune_sync_plugin.engine import memory
from tune_sync_plugin.engine.arrow_storage import ArrowStorage
from tune_sync_plugin.engine.checksum import PART_BYTES, part_bytes_for
from tune_sync_plugin.engine.s3_append import PartCopier, part_copier
from tune_sync_plugin.engine.s3_options import obstore_client, options_of
from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Tail
from tune_sync_plugin.engine.storage import Stat, Storage

# Up to here one request sends the whole file; above it goes in parts.
_WHOLE_BYTES = PART_BYTES
# Parts of one file on their way at once.
_PARTS = 3

_NOT_FOR_OBSTORE = re.compile(r"[\x00-\x1f\x7f\\]")


def faster(plain: ArrowStorage, filesystem: Any, path: str) -> Storage:
    """The same place by a faster client; ``plain`` itself where that is not possible."""
    bucket, _, prefix = path.strip("/").partition("/")
    parts = prefix.split("/")
    if not bucket or (prefix and not all(parts)) or {".", ".."} & set(parts):
        return plain
    options = options_of(filesystem)
    client = options and obstore_client(options, bucket, os.getpid())
    if options is None or client is None:
        return plain
    return ObjectStorage(plain, client, prefix, part_copier(options, bucket, os.getpid()))


class ObjectStorage:
    """A prefix in a bucket."""

    has_directories = False
    has_checksums = True

    def __init__(self, plain: ArrowStorage, client: Any, prefix: str, copier: PartCopier) -> None:
        self._plain = plain
        self._client = client
        self._prefix = prefix
        self._copier = copier
        self.name = plain.name
        self.append_from = copier.append_from

    def _key(self, path: str) -> str | None:
        key = f"{self._prefix}/{path}" if self._prefix else path
        return None if _NOT_FOR_OBSTORE.search(key) else key

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        key = self._key(path)
        if key is None:
            return self._plain.write(path, source, run_id)
        if source.size <= _WHOLE_BYTES:
            with memory.bound.take(source.size), _explained(key):
                answer = obstore.put(self._client, key, source.read(), use_multipart=False)
        else:
            part_bytes = part_bytes_for(source.size)
            # One is being read, and one waits, besides those on their way.
            with memory.bound.take((_PARTS + 2) * part_bytes), _explained(key):
                answer = obstore.put(
                    self._client,
                    key,
                    source.chunks(part_bytes),
                    use_multipart=True,
                    chunk_size=part_bytes,
                    max_concurrency=_PARTS,
                )
        return _bare(answer["e_tag"])

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        key = self._key(path)
        if key is None:
            return False
        with memory.bound.take(tail.size):
            return self._copier.append(key, tail, etag)

    def stat(self, path: str) -> Stat | None:
        key = self._key(path)
        if key is None:
            return self._plain.stat(path)
        try:
            with _explained(key):
                found = obstore.head(self._client, key)
        except FileNotFoundError:
            return None
        return Stat(found["size"], _bare(found["e_tag"]))

    def read(self, path: str) -> Iterator[bytes]:
        key = self._key(path)
        if key is None:
            yield from self._plain.read(path)
            return
        with _explained(key):
            for chunk in obstore.get(self._client, key).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def files(self) -> dict[str, int]:
        return self._plain.files()

    def copy(self, path: str, to: str) -> None:
        self._plain.copy(path, to)

    def remove(self, path: str) -> None:
        key = self._key(path)
        if key is None:
            self._plain.remove(path)
            return
        # pyarrow would leave an object that stands for the directory.
        with contextlib.suppress(FileNotFoundError), _explained(key):
            obstore.delete(self._client, key)

    def discard_partial(self, path: str, run_id: str) -> None:
        """Nothing: an object is there or it is not."""


def _bare(etag: str | None) -> str | None:
    return etag.strip('"') if etag else None


_REQUEST = re.compile(r"Error performing (\w+) [^\s?]+\??(\S*)")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*)</Message>)?")
# By its method and the beginning of its query; as AWS's own clients name them.
_OPERATIONS = {
    ("PUT", ""): "PutObject",
    ("POST", "uploads"): "CreateMultipartUpload",
    ("PUT", "partNumber"): "UploadPart",
    ("POST", "uploadId"): "CompleteMultipartUpload",
    ("HEAD", ""): "HeadObject",
    ("GET", ""): "GetObject",
    ("POST", "delete"): "DeleteObjects",
    ("DELETE", ""): "DeleteObject",
}


@contextlib.contextmanager
def _explained(key: str) -> Iterator[None]:
    """Makes Python's errors of obstore's, whose texts fill a screen and hold headers."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(_explain(key, error)) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(_explain(key, error)) from None
    except BaseError as error:
        raise OSError(_explain(key, error)) from None


def _explain(key: str, error: Exception) -> str:
    text, _, details = str(error).partition("\n\nDebug source")
    request, status, code = (found.search(text) for found in (_REQUEST, _STATUS, _CODE))
    operation = "request"
    if request:
        method, query = request.groups()
        operation = _OPERATIONS.get((method, re.split("[=&]", query)[0]), method)
    if code:
        reason = f"({code[1]}) {code[2] or ''}".strip()
    else:
        # What the HTTP library says last is what happened.
        inner = re.findall(r'message: "([^"]+)"|kind: (Timeout)|(TimedOut)', details)
        reason = next((" ".join(said).strip() for said in reversed(inner)), "")
        reason = reason or " ".join(text.split())
    answer = f"HTTP status {status[1]} " if status else ""
    return f"S3 {operation} of {key}: {answer}{reason}"
