"""A directory tree -> fingerprints. Reads directories and inodes, never a file's content.

The fingerprint decides whether a file changed, so everything that can fool one belongs here:
timestamp granularity, renames, links, names that can't be stored.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from tune_sync_plugin.engine.filters import Filter

_NS = 1_000_000_000


class Fingerprint(NamedTuple):
    """What identifies a file's content without reading it.

    ``ctime`` catches what ``mtime`` can be made to hide (a same-size rewrite with its old time
    restored), ``inode`` catches a directory that was swapped for another, whose files' ctimes do
    not change.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Fingerprint:
        """The fingerprint of a file from its ``stat``."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_racy(self, scanned_ns: int) -> bool:
        """Whether a write right after the scan could leave this very fingerprint behind.

        File systems stamp times with the kernel's tick (up to 10 ms) and old ones with whole
        seconds; git calls such an entry "racily clean".
        """
        newest = max(self.mtime_ns, self.ctime_ns)
        whole_seconds = not self.mtime_ns % _NS and not self.ctime_ns % _NS
        return newest >= scanned_ns - (2 * _NS if whole_seconds else _NS // 50)


class FileEntry(NamedTuple):
    """A file to sync: its path relative to the root, where it lies, and its fingerprint.

    ``root`` is the label of the directory it was found in.
    """

    path: str
    location: str
    fingerprint: Fingerprint
    root: str = ""


@dataclass
class Scan:
    """A tree's files, and what in it can't be synced and why."""

    files: dict[str, FileEntry] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failures: list[tuple[str, BaseException]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    started_ns: int = field(default_factory=time.time_ns)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sync and nothing to say."""
        return not (self.files or self.skipped or self.failures)


def scan(
    roots: Sequence[str],
    keep: Filter,
    *,
    follow_symlinks: bool = False,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> Scan:
    """Walk ``roots`` and fingerprint every regular file that ``keep`` wants.

    Links to files count as files; links to directories are followed only if asked to, and never
    around a loop. A root that does not exist is empty. Where two roots hold the same relative path
    the first one wins and the path is listed in ``conflicts``. ``labels`` names the roots.
    """
    result = Scan()
    for root in roots:
        for found in _walk(root, keep, follow_symlinks, result):
            entry = found._replace(root=labels[root]) if root in labels else found
            if result.files.setdefault(entry.path, entry) is not entry:
                result.conflicts.append(entry.path)
    return result


def _walk(root: str, keep: Filter, follow: bool, result: Scan) -> Iterator[FileEntry]:
    # (location, relative prefix, identities of the directories above: only kept when following)
    todo: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(root, "", frozenset())]
    while todo:
        location, prefix, above = todo.pop()
        try:
            if follow:
                status = os.stat(location)
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    result.skipped.append(f"{_printable(prefix.rstrip('/'))} (link loop)")
                    continue
                above |= {identity}
            with os.scandir(location) as entries:
                children = list(entries)
        except FileNotFoundError:
            continue
        except OSError as error:
            result.failures.append((_printable(prefix.rstrip("/")), error))
            continue
        for child in children:
            path = prefix + child.name
            try:
                if child.is_dir(follow_symlinks=follow):
                    if not keep.prunes(path):
                        todo.append((child.path, path + "/", above))
                elif keep(path) and (entry := _file(child, path, result)):
                    yield entry
            except OSError as error:
                if error.errno == errno.ELOOP:
                    result.skipped.append(f"{_printable(path)} (link loop)")
                else:
                    result.failures.append((_printable(path), error))


def _file(child: os.DirEntry[str], path: str, result: Scan) -> FileEntry | None:
    if (printable := _printable(path)) != path:
        result.failures.append((printable, OSError("the name is not valid UTF-8; rename it")))
        return None
    try:
        status = child.stat()
    except FileNotFoundError:
        if child.is_symlink():
            result.skipped.append(f"{path} (dangling link)")
        return None
    if stat.S_ISREG(status.st_mode):
        return FileEntry(path, child.path, Fingerprint.of(status))
    kind = "link to a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
    result.skipped.append(f"{path} ({kind})")
    return None


def _printable(path: str) -> str:
    """The path itself, unless it is not UTF-8: such a name breaks whatever prints or sends it."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
