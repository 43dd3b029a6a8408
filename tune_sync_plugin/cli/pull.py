"""Downloads an experiment, or parts of it, to a directory: many files at once, each one whole.

What is there already with the same content is not fetched again, so that a pull that was
interrupted goes on where it was. Nothing is deleted, and nothing is written outside the directory.
No part of Ray is here, nor anything about arguments and output.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from tune_sync_plugin import layout
from tune_sync_plugin.cli.verify import Difference
from tune_sync_plugin.engine.checksum import ROLLING, checksum_of, has_etag
from tune_sync_plugin.engine.countdown import Countdown, Progress
from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.pool import Health, Limits, run
from tune_sync_plugin.engine.restore import LocalFileError, NotStoredError
from tune_sync_plugin.engine.source import CHUNK_BYTES
from tune_sync_plugin.engine.storage import Storage, holds
from tune_sync_plugin.engine.verdict import is_inside
from tune_sync_plugin.errors import SyncError, describe

_CONCURRENCY = 32


@dataclass
class Pulled:
    """What :func:`pull` did.

    Attributes:
        fetched: Files that were downloaded, and ``fetched_bytes`` their size.
        kept: Files that were there already, and ``kept_bytes`` their size.
        failures: What is not there, and why.
    """

    fetched: int = 0
    fetched_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    failures: list[Difference] = field(default_factory=list)


def matching_trials(stored: Collection[str], pattern: str) -> list[str]:
    """The names of the trials in a listing that a glob matches, or that are named exactly so.

    Example:
        >>> matching_trials(["a_1/result.json", "b_1/result.json"], "a_*")
        ['a_1']
    """
    names = layout.trials(stored)
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def choose(
    stored: Mapping[str, int],
    *,
    trials: Collection[str] | None = None,
    include: tuple[str, ...] = (),
) -> dict[str, int]:
    """The part of a listing to pull; our own book-keeping is never in it.

    Args:
        stored: Sizes by paths.
        trials: The names of trials' directories; all else is left out then.
        include: Globs as in ``SyncConfig(include=...)``, relative to the URL.

    Raises:
        ValueError: A glob is none.

    Example:
        >>> stored = {"tuner.pkl": 1, "t_1/log.txt": 2, "t_1/.tune_sync/index.json": 3}
        >>> choose(stored), choose(stored, trials=["t_1"]), choose(stored, include=("**/*.txt",))
        ({'tuner.pkl': 1, 't_1/log.txt': 2}, {'t_1/log.txt': 2}, {'t_1/log.txt': 2})
    """
    keep = Filter(include=include)
    return {
        path: size
        for path, size in stored.items()
        if not layout.is_own(path)
        and keep(path)
        and (trials is None or path.partition("/")[0] in trials)
    }


def pull(
    storage: Storage,
    wanted: Mapping[str, int],
    destination: str,
    progress: Progress = lambda left: None,
) -> Pulled:
    """Download files; what fails is named in what is returned.

    Args:
        storage: Where from.
        wanted: Sizes by paths, as :func:`choose` returns them.
        destination: The directory that they go to. It is made if need be.
        progress: Told how many bytes are left.

    Raises:
        SyncError: Another pull goes to the same directory.
        OSError: It can't be made.

    Example:
        >>> import tempfile
        >>> there, here = tempfile.mkdtemp(), tempfile.mkdtemp()
        >>> _ = open(f"{there}/log.txt", "w").write("12345")
        >>> pull(LocalStorage(there), {"log.txt": 5}, here).fetched
        1
        >>> pull(LocalStorage(there), {"log.txt": 5}, here).kept
        1
    """
    os.makedirs(destination, exist_ok=True)
    puller = _Puller(storage, destination, Countdown(sum(wanted.values()), progress))
    done = Pulled()
    with _alone(destination):
        # Large ones first: the small ones fill the gaps at the end.
        jobs = sorted(wanted.items(), key=lambda job: (-job[1], job[0]))
        for (path, size), result in run(jobs, puller.bring, Limits(_CONCURRENCY, math.inf)):
            if isinstance(result, BaseException):
                done.failures.append(Difference(path, describe(result)))
            elif result == "fetched":
                done.fetched, done.fetched_bytes = done.fetched + 1, done.fetched_bytes + size
            else:
                done.kept, done.kept_bytes = done.kept + 1, done.kept_bytes + size
    done.failures.sort()
    return done


@contextlib.contextmanager
def _alone(directory: str) -> Iterator[None]:
    """Two at once would write to the same half-written files."""
    lock = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise SyncError(f"another pull to {directory} is under way: wait for its end") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(lock)


class _Puller:
    def __init__(self, storage: Storage, destination: str, countdown: Countdown) -> None:
        self._storage = storage
        self._root = destination
        self._target = LocalStorage(destination)
        self._countdown = countdown

    def bring(self, job: tuple[str, int], health: Health) -> Literal["fetched", "kept"]:
        """See to it that one file is here."""
        path, size = job
        if not is_inside(self._root, path):
            raise LocalFileError(f"refused: it would be written outside of {self._root}")
        with self._countdown.file(size) as arrived:
            if self._is_here(path, size):
                health.succeeded()
                return "kept"
            content = _Stored(self._storage, path, size, arrived)
            try:
                # The same name for what is half-written, whoever pulls: the next takes it over.
                self._target.write(path, content, "pull")
            except OSError as error:
                if content.failed:
                    raise
                path = os.path.join(self._root, path)
                raise LocalFileError(f"writing {path}: {error}") from error
            health.succeeded()
            return "fetched"

    def _is_here(self, path: str, size: int) -> bool:
        try:
            status = os.stat(os.path.join(self._root, path))
            if not stat.S_ISREG(status.st_mode) or status.st_size != size:
                return False
        except OSError:
            return False
        found = self._storage.stat(path)
        if found is None:
            raise NotStoredError("it was listed, but is gone")
        if found.size != size:
            return False
        try:
            if self._storage.has_checksums:
                same = has_etag(lambda: self._target.read(path), size, found.etag)
                if same is not None:
                    # A wrong ETag may be that of an encrypted object: comparing would cost as much.
                    return same
            checksum = checksum_of(self._target.read(path), like=ROLLING)
        except OSError:
            return False
        return holds(self._storage, path, found, size, checksum)


class _Stored:
    """A file in storage, as what another one is told to write."""

    def __init__(
        self, storage: Storage, path: str, size: int, arrived: Callable[[int], None]
    ) -> None:
        self.size = size
        self.failed = False
        self._storage = storage
        self._path = path
        self._arrived = arrived

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        parts, size = self._storage.read(self._path), 0
        while True:
            try:
                chunk = next(parts, None)
                if chunk is None:
                    self._check(size)
                    return
            except FileNotFoundError as error:
                self.failed = True
                raise NotStoredError("it was listed, but is gone") from error
            except BaseException:
                self.failed = True
                raise
            size += len(chunk)
            self._arrived(len(chunk))
            yield chunk

    def _check(self, size: int) -> None:
        """All of it, as it was listed, or as it is by now."""
        if size != self.size:
            found = self._storage.stat(self._path)
            if found is None or found.size != size:
                has = "nothing" if found is None else f"{found.size} bytes"
                raise OSError(f"{size} bytes arrived, but storage has {has}")

    def read(self) -> bytes:
        return b"".join(self.chunks())
