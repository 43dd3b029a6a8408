"""The index: a small hidden file beside a trial's files in storage that names what we uploaded.

Artifacts share their directory with checkpoints and with the driver's files; only the index tells
them apart, so it is what a restore brings back and what a verification compares with. It may lag
behind the files, since it is not written with each of them, but never names one that was not sent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import md5
from typing import NamedTuple

from tune_sync_plugin.engine.checksum import CHECKSUM
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import SyncError

OUR_DIRECTORY = ".tune_sync"
INDEX = f"{OUR_DIRECTORY}/index.json"
_VERSION = 1
# Entries that are made text of in one go.
_AT_ONCE = 10_000


class Entry(NamedTuple):
    """One file in storage.

    Attributes:
        size: In bytes; ``None`` if not known, as when an upload was cut off.
        checksum: As ``checksum.py`` makes it; empty if not known.
        root: The label of the local directory it came from.
    """

    size: int | None = None
    checksum: str = ""
    root: str = ""


@dataclass(frozen=True)
class Index:
    """What was uploaded, by path.

    ``writer`` names the disk from which all that has been uploaded since it was named; empty if
    there may be several.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    writer: str = ""


class IndexDamagedError(SyncError):
    """There is an index and it can't be made sense of."""


def parse(data: bytes) -> Index:
    """An index out of its file's bytes.

    Raises:
        IndexDamagedError: It is truncated, corrupt, or of a version that is not known here.
    """
    try:
        head, _, body = data.partition(b"\n")
        facts = json.loads(head)
        if facts["version"] != _VERSION:
            raise ValueError(f"version {facts['version']} is not known here")
        if facts["md5"] != _digest(facts["writer"], body):
            raise ValueError("its checksum is wrong")
        entries = {path: _entry(path, *facts) for path, facts in json.loads(body).items()}
        return Index(entries, facts["writer"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IndexDamagedError(str(error) or type(error).__name__) from error


def _entry(path: str, size: int | None, checksum: str, root: str) -> Entry:
    path.encode()  # as it is JSON, it may be no text that can be stored
    known = size is None or (type(size) is int and 0 <= size < 1 << 63)
    valid = checksum == "" or CHECKSUM.fullmatch(checksum)
    if not (known and valid and isinstance(root, str)):
        raise ValueError(f"what it says of {path!r} makes no sense")
    return Entry(size, checksum, root)


def serialize(index: Index) -> bytes:
    """The bytes of an index's file: a line of facts about the rest, then the rest."""
    # Some at a time: of very many files the text alone is as large as all the rest.
    body = bytearray(b"{")
    paths = sorted(index.entries)
    for start in range(0, len(paths), _AT_ONCE):
        some = {path: index.entries[path] for path in paths[start : start + _AT_ONCE]}
        body += b", " * (start > 0) + json.dumps(some, ensure_ascii=False)[1:-1].encode()
    body += b"}"
    facts = {"version": _VERSION, "writer": index.writer, "md5": _digest(index.writer, body)}
    return json.dumps(facts).encode() + b"\n" + body


def _digest(writer: str, body: bytes | bytearray) -> str:
    digest = md5(writer.encode() + b"\n", usedforsecurity=False)
    digest.update(body)
    return digest.hexdigest()


def read(storage: Storage) -> Index | None:
    """The index of ``storage``; ``None`` if it has none.

    Raises:
        IndexDamagedError: See :func:`parse`.
    """
    try:
        return parse(b"".join(storage.read(INDEX)))
    except FileNotFoundError:
        return None


def write(storage: Storage, index: Index, run_id: str) -> None:
    """Put ``index`` in the place of the one in storage."""
    storage.write(INDEX, Memory(serialize(index)), run_id)


def read_or_rebuild(
    storage: Storage, run_id: str, drivers: Callable[[str], bool], warn: Callable[[str], None]
) -> Index | None:
    """As :func:`read`; a damaged one is set aside and made anew from a listing, without checksums.

    Args:
        storage: Whose index.
        run_id: Goes into the damaged one's new name.
        drivers: Tells the files of the driver's and checkpoints by their paths.
        warn: Told what happened.
    """
    try:
        return read(storage)
    except IndexDamagedError as error:
        kept = f"{OUR_DIRECTORY}/index-{run_id}.corrupt.json"
        if not storage.stat(kept):  # an earlier try may have come so far
            storage.copy(INDEX, kept)
        rebuilt = Index(from_listing(storage.files(), drivers))
        write(storage, rebuilt, run_id)
        warn(
            f"the index {storage.name}/{INDEX} was damaged ({error}); it was set aside as {kept} "
            "and rebuilt from a listing"
        )
        return rebuilt


def from_listing(stored: Mapping[str, int], drivers: Callable[[str], bool]) -> dict[str, Entry]:
    """What the index would name, as far as a listing of paths and sizes tells.

    Names that are not UTF-8 are nothing that we ever send, nor can they be written down.
    """
    return {
        path: Entry(size)
        for path, size in stored.items()
        if not drivers(path) and not is_ours(path) and _is_text(path)
    }


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_ours(path: str) -> bool:
    """Whether this is a path of our own book-keeping in storage."""
    return path.startswith(OUR_DIRECTORY + "/")
