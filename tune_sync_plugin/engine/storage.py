"""The destination behind one small protocol, and the choice of who implements it.

Every implementation writes a file whole or not at all: a reader never sees a part of one. Object
stores do that by nature; file systems get a temporary name next to the final one, then a rename.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from tune_sync_plugin.engine.checksum import checksum_of, etag_matches
from tune_sync_plugin.engine.source import Content, Tail
from tune_sync_plugin.errors import is_denied


class Stat(NamedTuple):
    """What a storage says of a file.

    Attributes:
        size: In bytes.
        etag: What changes with the content, if it tells such a thing; on S3 the object's ETag,
            without its quotes, on others that know it the content's MD5.
    """

    size: int
    etag: str | None = None


class Storage(Protocol):
    """A prefix in some storage, below which paths are relative and ``/``-separated.

    Implementations are used by several threads at once, each on paths of its own.
    """

    @property
    def name(self) -> str:
        """Names the storage and the prefix, without credentials; equal only for the same place."""

    @property
    def has_directories(self) -> bool:
        """Whether a file ``a`` and a file ``a/b`` exclude each other."""

    @property
    def has_checksums(self) -> bool:
        """Whether its ETags are MD5s as those of S3, which :func:`.etag_matches` understands."""

    @property
    def append_from(self) -> int | None:
        """From what size on, in bytes, a file that grew is better appended to; ``None``: never."""

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        """Store the source's bytes under ``path``, replacing what was there, in one step.

        Returns the ETag of what is there now, if storage tells it unasked.
        """

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        """Make the file under ``path`` longer, if it is the one with that ETag and that length.

        Returns ``False``, with nothing changed, if it is not, or storage can't.
        """

    def stat(self, path: str) -> Stat | None:
        """What there is under ``path``, asked of the storage itself; ``None`` if nothing."""

    def read(self, path: str) -> Iterator[bytes]:
        """A file's bytes.

        Raises:
            FileNotFoundError: There is none.
        """

    def files(self) -> dict[str, int]:
        """All files below the prefix and their sizes; our own half-written ones left out."""

    def copy(self, path: str, to: str) -> None:
        """Give a stored file a second name, if possible without moving its bytes here."""

    def remove(self, path: str) -> None:
        """Remove one file, and the directories that this leaves empty; a missing one is fine."""

    def discard_partial(self, path: str, run_id: str) -> None:
        """Remove what an interrupted ``write`` of this path in that run may have left behind."""


def storage_at(filesystem: Any, path: str, *, in_training: bool = False) -> Storage:
    """The best implementation for a pyarrow or fsspec file system, unwrapped as far as possible.

    Args:
        filesystem: A ``pyarrow.fs.FileSystem`` (also one around an fsspec file system), or an
            ``fsspec.AbstractFileSystem``.
        path: The prefix on that file system.
        in_training: Whether this process is the user's. Then the client is the one that Ray uses
            there itself: another one's threads would not survive a fork, as of a data loader.

    Raises:
        TypeError: It is neither.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem
    from pyarrow import fs as arrow

    filesystem, path = _unwrap(filesystem, path)
    if type(filesystem) in (LocalFileSystem, arrow.LocalFileSystem):
        from tune_sync_plugin.engine.local_storage import LocalStorage

        return LocalStorage(LocalFileSystem._strip_protocol(path))
    if isinstance(filesystem, arrow.FileSystem):
        from tune_sync_plugin.engine.arrow_storage import ArrowStorage

        plain = ArrowStorage(filesystem, path)
        if filesystem.type_name != "s3" or in_training:
            return plain
        from tune_sync_plugin.engine.object_storage import faster

        return faster(plain, filesystem, path)
    if isinstance(filesystem, fsspec.AbstractFileSystem):
        from tune_sync_plugin.engine.fsspec_storage import fsspec_storage

        return fsspec_storage(filesystem, path)
    raise TypeError(
        f"storage_filesystem must be a pyarrow.fs.FileSystem or an fsspec file system, "
        f"not {type(filesystem).__name__}"
    )


def _unwrap(filesystem: Any, path: str) -> tuple[Any, str]:
    from fsspec.implementations.dirfs import DirFileSystem
    from pyarrow import fs as arrow

    if isinstance(filesystem, arrow.SubTreeFileSystem):
        # As it does itself: a leading slash is below its root, not the machine's.
        inside = posixpath.join(filesystem.base_path, path.lstrip("/"))
        return _unwrap(filesystem.base_fs, inside)
    # Exact types from here on: whoever derives from one of these does something of his own.
    if type(filesystem) is arrow.PyFileSystem and type(filesystem.handler) is arrow.FSSpecHandler:
        return _unwrap(filesystem.handler.fs, path)
    if type(filesystem) is DirFileSystem and filesystem.path:
        return _unwrap(filesystem.fs, f"{filesystem.path}/{path}")
    return filesystem, path


def service(options: Mapping[str, Any]) -> str:
    """Which of several services of one kind a client talks to, by the options it was made with.

    Two of them may have buckets or directories of the same name. Nothing secret is in it.
    """
    endpoint = options.get("endpoint_override") or options.get("endpoint_url")
    endpoint = endpoint or (options.get("client_kwargs") or {}).get("endpoint_url")
    facts = (endpoint, options.get("host"), options.get("port"), options.get("account_name"))
    named = ":".join(str(fact) for fact in facts if fact)
    return re.sub(r"(?<=://)[^/]+@", "", named) + "/" if named else ""


def partial_path(path: str, run_id: str) -> str:
    """Where a file is written before it gets its name: in the same directory, unique to the run.

    The name's length does not depend on the file's, which may be the longest allowed.
    """
    digest = hashlib.sha256(f"{run_id}/{path}".encode()).hexdigest()[:16]
    return posixpath.join(posixpath.dirname(path), f".tune_sync-{digest}.part")


def is_partial(path: str) -> bool:
    """Whether this is a name that :func:`partial_path` makes."""
    name = posixpath.basename(path)
    return name.startswith(".tune_sync-") and name.endswith(".part")


def holds(
    storage: Storage, path: str, found: Stat, size: int, checksum: str, *, sure: bool = True
) -> bool:
    """Whether the file that ``found`` is about has this content; reads it if need be.

    An ETag that differs may be that of an encrypted object. With ``sure=False`` it will do all the
    same: then an encrypted one is taken for another content, and nothing is read.
    """
    if found.size != size:
        return False
    verdict = etag_matches(checksum, found.etag)
    if verdict or (verdict is False and not sure):
        return verdict
    try:
        return checksum_of(storage.read(path), like=checksum) == checksum
    except Exception as error:
        if is_denied(error):
            return False  # as far as anybody can tell
        raise
