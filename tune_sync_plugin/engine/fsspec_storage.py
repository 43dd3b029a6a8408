"""Storage on an fsspec file system.

``put`` and ``put_file`` are avoided: the first nests directories on its second call, the second
loops for ever on a file that is truncated while it is sent (DESIGN.md 7).
"""

from __future__ import annotations

import contextlib
import posixpath
from typing import Any

from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import partial_path

# Up to here one request sends the whole file; above it goes in parts.
_WHOLE_BYTES = 8 << 20

# Stores where a name points at a whole object or at none, by fsspec's protocol names.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "oci", "hf"}


class FsspecStorage:
    """A prefix on an ``fsspec.AbstractFileSystem``."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        protocol = filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.has_directories = not protocols & _OBJECT_STORES
        endpoint = getattr(filesystem, "endpoint_url", None) or ""
        self.name = f"{min(protocols)}:{endpoint}{self._root}"

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def write(self, path: str, source: Source, run_id: str) -> None:
        final = self._at(path)
        if not self.has_directories:
            self._send(final, source)
            return
        partial = self._at(partial_path(path, run_id))
        self._fs.makedirs(posixpath.dirname(final), exist_ok=True)
        try:
            self._send(partial, source)
            self._fs.mv(partial, final)
        except BaseException:
            self.discard_partial(path, run_id)
            raise

    def _send(self, target: str, source: Source) -> None:
        if source.size <= _WHOLE_BYTES:
            self._fs.pipe_file(target, source.read())
            return
        out = self._fs.open(target, "wb")
        try:
            for chunk in source.chunks():
                out.write(chunk)
        except BaseException:
            # Aborts the upload; without it the destructor would complete half a file.
            with contextlib.suppress(Exception):
                out.discard()
            out.closed = True
            raise
        out.close()

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(path))

    def discard_partial(self, path: str, run_id: str) -> None:
        if self.has_directories:
            with contextlib.suppress(Exception):
                self._fs.rm_file(self._at(partial_path(path, run_id)))
