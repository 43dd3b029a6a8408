"""Compares what storage holds with what the indexes and the summary say it should.

Reads storage and nothing else; neither Ray nor a local directory is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine.checksum import checksum_of, etag_matches
from tune_sync_plugin.engine.index import INDEX, Entry, Index, IndexDamagedError
from tune_sync_plugin.engine.pool import Health, Limits, run
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import SyncError, describe
from tune_sync_plugin.runs import read_summary

MISSING = "missing"
_CONCURRENCY = 16


class Difference(NamedTuple):
    """One thing that is not as it should be.

    Attributes:
        path: Where, relative to the URL that was verified.
        problem: What is wrong with it.
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


@dataclass
class Verification:
    """What :func:`verify` found.

    Attributes:
        trials: Indexes that were compared.
        files: Files that they name, and ``bytes`` their size.
        differences: What is not as it should be.
        ended: Whether the last run wrote a summary when it ended.
    """

    trials: int = 0
    files: int = 0
    bytes: int = 0
    differences: list[Difference] = field(default_factory=list)
    ended: bool = False


class _Check(NamedTuple):
    path: str
    entry: Entry


def verify(storage: Storage, *, contents: bool = True) -> Verification:
    """Compare what ``storage`` holds with its indexes: presence, sizes, and contents.

    Contents are compared by S3's ETags where these are checksums, otherwise by reading them.

    Args:
        storage: An experiment's directory, a trial's, or one that holds several experiments.
        contents: Whether to compare more than sizes.

    Raises:
        SyncError: There is no index to compare with.
        OSError: Storage can't be read.
    """
    found = against_indexes(storage, storage.files(), contents=contents)
    if not found.trials:
        raise SyncError(
            f"there is no index ({INDEX}) in any directory of {storage.name}: either nothing was "
            "synced there with sync_artifacts=True, or the URL is not an experiment's"
        )
    summary = read_summary(storage)
    found.ended = summary is not None
    found.differences += by_summary(summary or {})
    return found


def against_indexes(storage: Storage, stored: Mapping[str, int], *, contents: bool) -> Verification:
    """The part of :func:`verify` that is about indexes; finds no trials where there is none.

    Args:
        storage: As there, and ``contents`` likewise.
        stored: What ``storage.files()`` said.
    """
    found = Verification()
    checks: list[_Check] = []
    for path, index in _indexes(storage, stored):
        directory = path.removesuffix(INDEX)
        found.trials += 1
        if isinstance(index, IndexDamagedError):
            found.differences.append(Difference(path, f"the index is damaged: {index}"))
            continue
        for name, entry in index.entries.items():
            found.files += 1
            found.bytes += entry.size or 0
            check = _Check(directory + name, entry)
            unlisted = _by_listing(check, stored)
            if unlisted:
                found.differences.append(Difference(check.path, unlisted))
            elif contents and entry.checksum:
                checks.append(check)
    limits = Limits(_CONCURRENCY, math.inf)
    for check, problem in run(checks, lambda check, _: _by_content(check, storage), limits):
        if isinstance(problem, BaseException):
            raise OSError(f"reading {check.path} failed: {describe(problem)}") from problem
        if isinstance(problem, str):
            found.differences.append(Difference(check.path, problem))
    return found


def _indexes(
    storage: Storage, stored: Mapping[str, int]
) -> list[tuple[str, Index | IndexDamagedError]]:
    """All of them, in the order of their paths."""

    def read(path: str, health: Health) -> Index | IndexDamagedError:
        data = b"".join(storage.read(path))
        health.succeeded()
        try:
            return indexes.parse(data)
        except IndexDamagedError as error:
            return error

    paths = [path for path in stored if path == INDEX or path.endswith(f"/{INDEX}")]
    found: list[tuple[str, Index | IndexDamagedError]] = []
    for path, index in run(paths, read, Limits(_CONCURRENCY, math.inf)):
        if isinstance(index, BaseException) and not isinstance(index, IndexDamagedError):
            raise OSError(f"reading {path} failed: {describe(index)}") from index
        found.append((path, index))
    return sorted(found, key=lambda each: each[0])


def _by_listing(check: _Check, stored: Mapping[str, int]) -> str | None:
    size = stored.get(check.path)
    if size is None:
        return MISSING
    if check.entry.size not in (None, size):
        return f"{size} bytes are stored, the index says {check.entry.size}"
    return None


def _by_content(check: _Check, storage: Storage) -> str | None:
    path, wanted = check.path, check.entry.checksum
    stat = storage.stat(path)
    if stat and etag_matches(wanted, stat.etag):
        return None
    if checksum_of(storage.read(path), like=wanted) == wanted:
        return None
    return "its content is not what was uploaded, by its checksum in the index"


def by_summary(summary: dict[str, Any]) -> Iterator[Difference]:
    """What a run itself missed, by its summary."""
    parts = {"experiment": summary.get("experiment", {}), **summary.get("trials", {})}
    for key, part in parts.items():
        for kind in ("failed", "lost"):
            for line in part.get(kind, []):
                yield Difference(key, f"{kind}, said the run when it ended: {line}")
    for key, why in summary.get("left_to_ray", {}).items():
        yield Difference(key, f"was left to Ray's own sync: {why}")
