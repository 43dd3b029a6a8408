"""Decides what to do, with a reason for each decision. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import NamedTuple

from tune_sync_plugin.engine.scan import FileEntry, Fingerprint


class Record(NamedTuple):
    """What storage is known to hold under a path: the file as it was when it was uploaded.

    Attributes:
        fingerprint: The file's.
        checksum: Its content's, in the kind that storage is compared with.
        racy: Whether the fingerprint alone proves nothing, and the checksum has to.
        root: In which of the synced directories the file was, by that one's label.
        etag: What storage calls this content; empty if it did not say.
        rolling: The content's rolling checksum; empty if it is not known.
    """

    fingerprint: Fingerprint
    checksum: str = ""
    racy: bool = False
    root: str = ""
    etag: str = ""
    rolling: str = ""

    @property
    def size(self) -> int:
        """Of the content; negative if an upload of it never ended."""
        return self.fingerprint.size


class Reason(Enum):
    """Why a file is uploaded."""

    NEW = "new"
    APPENDED = "appended"
    CHANGED = "changed"
    UNPROVEN = "written too close to the last scan to tell; compare contents first"
    FOREIGN = "storage has one that was not sent from here; compare, or keep it under another name"
    UNRECORDED = "storage may have it already, but the record of that was lost; compare"


class Upload(NamedTuple):
    """A file to upload; ``sent`` is what storage holds by the manifest, if anything."""

    entry: FileEntry
    reason: Reason
    sent: Record = Record(Fingerprint(-1, -1, -1, -1))


@dataclass(frozen=True)
class Plan:
    """What one sync has to do.

    ``removals`` are paths that we uploaded and that now stand where a directory must go, or the
    other way round. Nothing else is ever removed.
    """

    uploads: list[Upload] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    files_unchanged: int = 0
    bytes_unchanged: int = 0


def make_plan(
    files: Mapping[str, FileEntry],
    known: Mapping[str, Record],
    unrecorded: Mapping[str, Reason] = MappingProxyType({}),
    *,
    gone: Iterable[str] = (),
    scanned_ns: int,
) -> Plan:
    """Compare what may have changed with what storage holds.

    Args:
        files: What the scan could not tell to be unchanged.
        known: The manifest's records of these.
        unrecorded: What to do about files that have no record.
        gone: Paths that have a record and are not here any more, where one of them may be in the
            way of a file: on file systems, but not in object stores.
        scanned_ns: When the scan began, in nanoseconds since the epoch.

    | local file                         | storage (by the manifest)  | do                    |
    |------------------------------------|----------------------------|-----------------------|
    | any                                | nothing                    | upload (NEW)          |
    | any                                | one without a record, or   | as ``unrecorded`` says|
    |                                    | only of a cut-off upload   |                       |
    | same inode, larger                 | the smaller one            | upload (APPENDED)     |
    | any other difference               | something                  | upload (CHANGED)      |
    | same fingerprint, but a racy one   | it                         | compare (UNPROVEN)    |
    | same fingerprint, racy only now    | it                         | compare (UNPROVEN)    |
    | same fingerprint                   | it                         | nothing               |
    | gone                               | something                  | nothing: never delete |
    | gone, a file is now a directory    | something, on a file system| remove, then upload   |

    "Racy only now" is one that was past at the last scan and is not at this one, at ``scanned_ns``:
    the clock was put back, and a rewrite since may bear the time of what was there before.

    Small files go first, so that one large file does not hold up the rest.
    """
    uploads: list[Upload] = []
    files_unchanged = bytes_unchanged = 0
    for path, entry in files.items():
        record = known.get(path)
        new = entry.fingerprint
        # An upload that was cut off may not have got as far as to look what was there.
        if record is None or (record.fingerprint.size < 0 and path in unrecorded):
            uploads.append(Upload(entry, unrecorded.get(path, Reason.NEW)))
        elif new != record.fingerprint:
            old = record.fingerprint
            grew = new.inode == old.inode and new.size > old.size
            uploads.append(Upload(entry, Reason.APPENDED if grew else Reason.CHANGED, record))
        elif record.racy or new.is_racy(scanned_ns):
            uploads.append(Upload(entry, Reason.UNPROVEN, record))
        else:
            files_unchanged += 1
            bytes_unchanged += new.size
    uploads.sort(key=lambda upload: (upload.entry.fingerprint.size, upload.entry.path))
    removals = _in_the_way(files, gone) if uploads else []
    return Plan(uploads, removals, files_unchanged, bytes_unchanged)


def _in_the_way(files: Mapping[str, FileEntry], gone: Iterable[str]) -> list[str]:
    # Files that did not change are in nobody's way: they were there together with what is gone.
    directories = {parent for path in files for parent in _parents(path)}
    return [
        path
        for path in gone
        if path in directories or any(parent in files for parent in _parents(path))
    ]


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]
