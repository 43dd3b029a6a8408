"""From a path or URL, as a person types it, to the storage there.

Opened where it is used, on this machine or on a node of a cluster. Imports no part of Ray.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.engine.urls import filesystem_at, protocol_of, without_secrets

_S3 = ("s3", "s3a")
# What pyarrow speaks besides S3, for which fsspec needs a library of its own.
_ARROWS = ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")


@dataclass(frozen=True)
class Place:
    """A path or URL, and what it takes to open it.

    Args:
        url: A path, a URL as Ray takes it, or one of any protocol of fsspec's.
        options: fsspec's ``storage_options`` of that protocol. They may hold secrets: they travel,
            and are never shown.

    Example:
        >>> Place("sftp://me:secret@host/results/exp").name
        'sftp://host/results/exp'
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The URL as it may be shown."""
        return without_secrets(self.url)

    def root(self) -> Storage:
        """The storage there.

        Raises:
            ImportError: A library is missing; the message says how to install it.
            ValueError: There is no such directory, or nothing here speaks this kind of URL.
        """
        if "://" not in self.url and not os.path.isdir(self.url):
            raise ValueError(f"there is no directory {self.url}")
        filesystem, path = self._filesystem()
        return storage_at(filesystem, path)

    def _filesystem(self) -> tuple[Any, str]:
        from pyarrow import fs

        protocol = protocol_of(self.url)
        arrows = protocol in _ARROWS
        if "://" not in self.url:
            return fs.LocalFileSystem(), os.path.abspath(self.url)
        if "?" in self.url and arrows:
            return fs.FileSystem.from_uri(self.url)  # type: ignore[no-any-return]
        # A query says all that there is to say, as it does for Ray.
        queried = "?" in self.url and protocol in _S3
        try:
            return filesystem_at(self.url, {} if queried else self.options)
        except ImportError:
            if arrows and not self.options:
                return fs.FileSystem.from_uri(self.url)  # type: ignore[no-any-return]
            raise


def place_at(url: str) -> Place:
    """A place, with the options that the environment has for it, as fsspec reads them.

    ``FSSPEC_S3='{"key": ..., "secret": ...}'`` gives those of ``s3://``.
    """
    from fsspec.config import conf

    return Place(url, dict(conf.get(protocol_of(url), {})))


def last_name(storage: Storage) -> str:
    """The name of the storage's own directory; empty if it has none.

    Example:
        >>> from tune_sync_plugin.engine.local_storage import LocalStorage
        >>> last_name(LocalStorage("/mnt/results/exp"))
        'exp'
    """
    return posixpath.basename(storage.name.partition(":")[2].rstrip("/"))
