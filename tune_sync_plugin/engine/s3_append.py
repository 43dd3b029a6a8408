"""Appends to an object on S3: the server copies what it has, and only the new end is sent.

obstore has no ``UploadPartCopy``, so botocore makes these requests; it is imported when the first
file calls for it. The server copies only from the very object that was sent from here, and takes
the end only with the right MD5. Nothing becomes visible before the last request; if one before it
fails, the upload is aborted.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import os
from typing import Any

from tune_sync_plugin.engine.s3_options import S3Options, botocore_client
from tune_sync_plugin.engine.source import Tail

# The largest part that S3 copies.
_MOST_PART_BYTES = 5 << 30
# A tail is held in memory; with a longer one the whole file goes, in parts, several at once.
_MOST_TAIL_BYTES = 64 << 20
# So many failures in a row, and this store is not asked any more.
_PATIENCE = 3


@functools.lru_cache(maxsize=16)
def part_copier(options: S3Options, bucket: str, process_id: int) -> PartCopier:
    """The one that appends to a bucket's objects in this process."""
    return PartCopier(options, bucket)


class PartCopier:
    """Appends to the objects of one bucket."""

    # Smaller ones take a single request; this takes four, and one to look at what came of it.
    append_from = 8 << 20

    def __init__(self, options: S3Options, bucket: str) -> None:
        self._options = options
        self._bucket = bucket
        self._failures = 0

    def append(self, key: str, tail: Tail, etag: str) -> bool:
        """See :meth:`.storage.Storage.append`.

        Raises:
            SourceError: The tail can't be read.
        """
        fits = tail.start <= _MOST_PART_BYTES and tail.size <= _MOST_TAIL_BYTES
        if not fits or self._failures >= _PATIENCE:
            return False
        from botocore.exceptions import BotoCoreError, ClientError

        client = botocore_client(self._options, os.getpid())
        target = {"Bucket": self._bucket, "Key": key}
        part: dict[str, str] = {}
        try:
            part = {**target, "UploadId": client.create_multipart_upload(**target)["UploadId"]}
            self._copy_and_send(client, part, tail, etag)
        except (BotoCoreError, ClientError):
            # Somebody else's object is there, or the server can't do it: it is sent whole.
            self._failures += 1
            self._abort(client, part)
            return False
        except BaseException:
            self._abort(client, part)
            raise
        self._failures = 0
        return True

    @staticmethod
    def _copy_and_send(client: Any, part: dict[str, str], tail: Tail, etag: str) -> None:
        copied = client.upload_part_copy(
            **part,
            PartNumber=1,
            CopySource={name: part[name] for name in ("Bucket", "Key")},
            CopySourceIfMatch=f'"{etag}"',
            CopySourceRange=f"bytes=0-{tail.start - 1}",
        )
        content = tail.read()
        digest = hashlib.md5(content, usedforsecurity=False).digest()
        # The server compares them.
        md5 = base64.b64encode(digest).decode()
        sent = client.upload_part(**part, PartNumber=2, Body=content, ContentMD5=md5)
        tags = [copied["CopyPartResult"]["ETag"], sent["ETag"]]
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, start=1)]
        client.complete_multipart_upload(**part, MultipartUpload={"Parts": parts})

    @staticmethod
    def _abort(client: Any, part: dict[str, str]) -> None:
        if part:
            with contextlib.suppress(Exception):
                client.abort_multipart_upload(**part)
