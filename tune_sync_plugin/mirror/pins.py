"""Checkpoints kept on disk until they are mirrored, though Tune may delete them any moment.

By hard links below ``.tune_sync/pins`` in the experiment's directory: they cost no space and no
copying while the checkpoint itself is there, and nothing of Tune's is touched. On a file system
without hard links a checkpoint is mirrored from where it is, and dropped if it is deleted under us.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator

from tune_sync_plugin.engine.index import OUR_DIRECTORY

_PINS = f"{OUR_DIRECTORY}/pins"
# A directory that is being deleted has changed again after so long, or is gone.
_DELETION_S = 0.5


class Pins:
    """The pins of one experiment; a name is ``<trial directory>/<checkpoint directory>``.

    Args:
        experiment: The experiment's directory, on a file system that may be shared.
        sleep: Waits for so many seconds.
    """

    def __init__(self, experiment: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self._experiment = experiment
        self._root = os.path.join(experiment, _PINS)
        self._sleep = sleep
        # Those that could not be linked.
        self._in_place: set[str] = set()
        self._names = set(self._linked())

    def _linked(self) -> Iterator[str]:
        """What an earlier process of this run, or an earlier run, has left."""
        with contextlib.suppress(FileNotFoundError):
            for trial in os.listdir(self._root):
                path = os.path.join(self._root, trial)
                if trial.startswith("."):  # half of one
                    shutil.rmtree(path, ignore_errors=True)
                    continue
                for name in os.listdir(path):
                    yield f"{trial}/{name}"

    def names(self) -> set[str]:
        """All that are pinned."""
        return set(self._names)

    def path(self, name: str) -> str:
        """Where a pinned checkpoint's files are, relative to the experiment's directory."""
        return name if name in self._in_place else f"{_PINS}/{name}"

    def is_deleted(self, name: str) -> bool:
        """Whether Tune has deleted the checkpoint itself."""
        return not os.path.isdir(os.path.join(self._experiment, name))

    def pin(self, name: str) -> bool:
        """Keep a checkpoint that is complete; ``False`` if it is gone, or about to be."""
        final = os.path.join(self._root, name)
        if name in self._names:
            return True
        source = os.path.join(self._experiment, name)
        # Its own, since another thread may be about to pin the same.
        partial = os.path.join(self._root, f".{uuid.uuid4().hex}.part")
        try:
            suspicious = self._link(source, partial)
            if suspicious:
                self._sleep(_DELETION_S)
            whole = sorted(files_in(source, _raise)) == sorted(files_in(partial, _raise))
        except (FileNotFoundError, NotADirectoryError):
            whole = False
        except OSError:  # no hard links here
            shutil.rmtree(partial, ignore_errors=True)
            self._in_place.add(name)
            self._names.add(name)
            return True
        if whole:
            os.makedirs(os.path.dirname(final), exist_ok=True)
            with contextlib.suppress(OSError):  # there is one already
                os.rename(partial, final)
            self._names.add(name)
        shutil.rmtree(partial, ignore_errors=True)
        return whole

    @staticmethod
    def _link(source: str, target: str) -> bool:
        """Returns whether some of it seems to have been deleted before it could be linked."""
        suspicious = False
        os.makedirs(target)
        for directory, names, files in os.walk(source, onerror=_raise):
            there = os.path.join(target, os.path.relpath(directory, source))
            for name in names:
                os.mkdir(os.path.join(there, name))
            last = 0
            for name in files:
                path = os.path.join(directory, name)
                last = max(last, os.stat(path).st_ctime_ns)  # before the link changes it
                os.link(path, os.path.join(there, name))
            # A directory is older than what was written in it last, unless something was removed.
            suspicious |= bool(files) and os.stat(directory).st_mtime_ns > last
        return suspicious

    def release(self, name: str) -> None:
        """Let a checkpoint go."""
        self._in_place.discard(name)
        self._names.discard(name)
        path = os.path.join(self._root, name)
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # the last one of its trial's, or of all
            os.rmdir(os.path.dirname(path))
            os.rmdir(self._root)


def files_in(directory: str, onerror: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """The paths of all files below a directory, relative to it."""
    for parent, _, files in os.walk(directory, onerror=onerror):
        for name in files:
            yield os.path.relpath(os.path.join(parent, name), directory)


def _raise(error: OSError) -> None:
    raise error
