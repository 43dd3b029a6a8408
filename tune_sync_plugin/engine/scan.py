"""A directory tree -> fingerprints. Reads directories and inodes, never a file's content.

The fingerprint decides whether a file changed, so everything that can fool one belongs here:
timestamp granularity, renames, links, names that can't be stored.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from tune_sync_plugin.engine.filters import Filter

_NS = 1_000_000_000
# Older than this a file's times are told apart from any that a write would give it now, whatever
# the file system's clock; see Fingerprint.is_racy.
_SETTLED_NS = 3 * _NS


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


# A path with its fingerprint's size, mtime_ns, ctime_ns and inode: a bare tuple, as there may be
# very many.
State = tuple[str, int, int, int, int]


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
    """A tree's files, and what in it can't be synced and why.

    Attributes:
        files: All but those that are exactly as they are known to be.
        unchanged: The paths of these, and ``bytes_unchanged`` their size.
        skipped: What is no file, with the reason.
        failures: What can't be synced, and why.
        conflicts: Paths that are in more than one root.
        started_ns: When the scan began, in nanoseconds since the epoch.
    """

    files: dict[str, FileEntry] = field(default_factory=dict)
    unchanged: set[str] = field(default_factory=set)
    bytes_unchanged: int = 0
    skipped: list[str] = field(default_factory=list)
    failures: list[tuple[str, BaseException]] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    started_ns: int = field(default_factory=time.time_ns)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to sync and nothing to say."""
        return not (self.files or self.unchanged or self.skipped or self.failures)


def scan(
    roots: Sequence[str],
    keep: Filter,
    *,
    follow_symlinks: bool = False,
    labels: Mapping[str, str] = MappingProxyType({}),
    known: Set[State] = frozenset(),
) -> Scan:
    """Walk ``roots`` and fingerprint every regular file that ``keep`` wants.

    Links to files count as files; links to directories are followed only if asked to, and never
    around a loop. A root that does not exist is empty. Where two roots hold the same relative path
    the first one wins and the path is listed in ``conflicts``. ``labels`` names the roots. What is
    as it is in ``known``, and has been so for some seconds, is unchanged.
    """
    result = Scan()
    for number, root in enumerate(roots):
        _walk(_Root(root, labels.get(root, ""), number > 0), keep, follow_symlinks, known, result)
    return result


class _Root(NamedTuple):
    location: str
    label: str
    overlaid: bool  # on another one, whose files go before its own


def _walk(  # noqa: PLR0912 - a call per file would cost more than the file
    root: _Root,
    keep: Filter,
    follow: bool,
    known: Set[State],
    result: Scan,
) -> None:
    # What takes time here takes it for each of perhaps 100,000 files, at every sync.
    unchanged = result.unchanged
    settled_ns = result.started_ns - _SETTLED_NS
    keeps_all = keep == Filter()
    # (location, relative prefix, identities of the directories above: only kept when following)
    todo: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(root.location, "", frozenset())]
    while todo:
        location, prefix, above = todo.pop()
        try:
            if follow:
                status = os.stat(location)
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                above |= {identity}
            with os.scandir(location) as entries:
                children = list(entries)
        except OSError as error:
            _cannot(prefix.rstrip("/"), error, result)
            continue
        for child in children:
            path = prefix + child.name
            try:
                if child.is_dir(follow_symlinks=follow):
                    if not keep.prunes(path):
                        todo.append((child.path, path + "/", above))
                    continue
                if not (keeps_all or keep(path)):
                    continue
                status = child.stat()
                size, mtime_ns, ctime_ns = status.st_size, status.st_mtime_ns, status.st_ctime_ns
                if (
                    (path, size, mtime_ns, ctime_ns, status.st_ino) in known
                    and mtime_ns < settled_ns
                    and ctime_ns < settled_ns
                    and not (root.overlaid and (path in unchanged or path in result.files))
                ):
                    unchanged.add(path)
                    result.bytes_unchanged += size
                else:
                    _take(child, path, status, root, result)
            except OSError as error:
                if not child.is_symlink():
                    _cannot(path, error, result)
                elif _has_a_name(path, result):
                    kind = "dangling link" if error.errno == errno.ENOENT else "link loop"
                    result.skipped.append(f"{path} ({kind})")


def _cannot(path: str, error: OSError, result: Scan) -> None:
    if error.errno == errno.ELOOP:
        result.skipped.append(f"{_printable(path)} (link loop)")
    elif error.errno != errno.ENOENT:  # else it has just gone
        result.failures.append((_printable(path), error))


def _take(
    child: os.DirEntry[str], path: str, status: os.stat_result, root: _Root, result: Scan
) -> None:
    if not _has_a_name(path, result):
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "link to a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        result.skipped.append(f"{path} ({kind})")
    elif path in result.unchanged or path in result.files:
        result.conflicts.append(path)
    else:
        fingerprint = Fingerprint.of(status)
        result.files[path] = FileEntry(path, child.path, fingerprint, root.label)


def _has_a_name(path: str, result: Scan) -> bool:
    """Whether it is a name that can be stored; says so if not."""
    printable = _printable(path)
    if printable != path:
        result.failures.append((printable, OSError("the name is not valid UTF-8; rename it")))
    return printable == path


def _printable(path: str) -> str:
    """The path itself, unless it is not UTF-8: such a name breaks whatever prints or sends it."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
