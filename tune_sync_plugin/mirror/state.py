"""The experiment's state, taken at one moment, and the checkpoints that it names.

All files at the top of the experiment's directory are taken, by a copy: what goes to the mirror
then is this, whatever is written since. Knows no Ray but by the names of files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tune_sync_plugin.engine.index import OUR_DIRECTORY
from tune_sync_plugin.layout import newest_state
from tune_sync_plugin.whole_files import copy_files

STATE_FILES = "experiment_state-*.json"
# The paths of checkpoints, in whatever Ray wraps them: plain, or pickled and in hexadecimal.
_CHECKPOINT = re.compile(rb"([^/\\\"'\x00-\x1f]+/checkpoint_\d{6})(?!\d)")
_HEX = re.compile(rb'"((?:[0-9a-f]{2}){16,})"')
_ESCAPED_HEX = re.compile(rb'\\"((?:[0-9a-f]{2}){16,})\\"')


@dataclass(frozen=True)
class State:
    """A state that was taken.

    Attributes:
        version: Tells it from others.
        checkpoints: Those it names, as ``<trial directory>/<checkpoint directory>``.
        trials: The directories that there were beside it.
    """

    version: str
    checkpoints: frozenset[str]
    trials: frozenset[str] = frozenset()


def current_version(experiment: str) -> str | None:
    """Tells whether the state has changed; ``None`` if there is none yet."""
    newest = newest_state(os.listdir(experiment))
    if newest is None:
        return None
    status = os.stat(os.path.join(experiment, newest))
    return f"{newest}-{status.st_mtime_ns:x}-{status.st_size:x}"


def take(experiment: str, copy: str) -> State | None:
    """Copy the state's files to the directory ``copy``; ``None`` if there is no state yet."""
    version = current_version(experiment)
    if version is None:
        return None
    trials = frozenset(trials_in(experiment))
    copy_files(experiment, copy)
    newest = newest_state(os.listdir(copy))
    assert newest  # it was there a moment ago, and states are never removed
    with open(os.path.join(copy, newest), "rb") as file:
        return State(version, frozenset(checkpoints_in(file.read())), trials)


def trials_in(experiment: str) -> Iterator[str]:
    """The names of the trials' directories, and of what else there is besides ours."""
    for entry in os.scandir(experiment):
        if entry.is_dir() and entry.name != OUR_DIRECTORY:
            yield entry.name


def checkpoints_in(content: bytes) -> Iterator[str]:
    """The checkpoints that an ``experiment_state-*.json`` names.

    Example:
        >>> list(checkpoints_in(b'{"path": "/mnt/exp/trial_1/checkpoint_000002"}'))
        ['trial_1/checkpoint_000002']
    """
    parts = [content, *(bytes.fromhex(found[1].decode()) for found in _hexadecimal(content))]
    for part in parts:
        for found in _CHECKPOINT.finditer(part):
            yield found[1].decode(errors="replace")


def _hexadecimal(content: bytes) -> Iterator[re.Match[bytes]]:
    yield from _HEX.finditer(content)
    yield from _ESCAPED_HEX.finditer(content)
