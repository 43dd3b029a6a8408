"""What is what in an experiment's directory, told by nothing but the names in a listing of it.

Ray's names and ours. Neither Ray nor any I/O: whoever has a listing asks here.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from tune_sync_plugin.engine.index import INDEX, OUR_DIRECTORY
from tune_sync_plugin.runs import RUN, SUMMARY

_STATE = re.compile(r"experiment_state-[^/]*\.json")
_CHECKPOINT = re.compile(r"((?:.*/)?checkpoint_\d{6})/")
_OF_A_TRIAL = ("result.json", "params.json", "params.pkl", "progress.csv", INDEX)
_OF_AN_EXPERIMENT = ("tuner.pkl", RUN, SUMMARY)

V = TypeVar("V")


def is_own(path: str) -> bool:
    """Whether a path, at any depth, is one of our own book-keeping.

    Example:
        >>> is_own("trial_1/.tune_sync/index.json"), is_own("trial_1/log.txt")
        (True, False)
    """
    return OUR_DIRECTORY in path.split("/")


def experiments(paths: Iterable[str]) -> list[str]:
    """The directories that are experiments', but for those in others; ``""`` is the top itself.

    Example:
        >>> experiments(["a/tuner.pkl", "b/experiment_state-1.json", "b/t/tuner.pkl", "c/x"])
        ['a', 'b']
    """
    found: set[str] = set()
    for path in paths:
        for name in _OF_AN_EXPERIMENT:
            if path == name or path.endswith(f"/{name}"):
                found.add(path[: -len(name)].rstrip("/"))
        if _STATE.fullmatch(posixpath.basename(path)):
            found.add(posixpath.dirname(path))
    return sorted(each for each in found if not found & set(_above(each)))


def _above(directory: str) -> Iterable[str]:
    while directory:
        directory = posixpath.dirname(directory)
        yield directory


def below(listing: Mapping[str, V], directory: str) -> dict[str, V]:
    """The part of a listing that is in a directory, by paths relative to it.

    Example:
        >>> below({"a/x": 1, "ab/y": 2}, "a")
        {'x': 1}
    """
    if not directory:
        return dict(listing)
    start = f"{directory}/"
    return {path[len(start) :]: value for path, value in listing.items() if path.startswith(start)}


def is_trial(paths: Iterable[str]) -> bool:
    """Whether these are the paths in a trial's directory."""
    return any(path in _OF_A_TRIAL or re.match(r"checkpoint_\d{6}/", path) for path in paths)


def trials(paths: Iterable[str]) -> list[str]:
    """The names of the trials' directories in an experiment's.

    Example:
        >>> trials(["tuner.pkl", "t_1/result.json", "t_2/checkpoint_000000/x", "other/x"])
        ['t_1', 't_2']
    """
    inside: dict[str, list[str]] = {}
    for path in paths:
        name, slash, rest = path.partition("/")
        if slash and name != OUR_DIRECTORY:
            inside.setdefault(name, []).append(rest)
    return sorted(name for name, rests in inside.items() if is_trial(rests))


def checkpoints(paths: Iterable[str]) -> set[str]:
    """The directories of checkpoints.

    Example:
        >>> checkpoints(["t_1/checkpoint_000003/model/w", "t_1/log.txt"])
        {'t_1/checkpoint_000003'}
    """
    return {found[1] for path in paths if (found := _CHECKPOINT.match(path))}


def newest_state(paths: Iterable[str]) -> str | None:
    """The name of the newest experiment state: Ray puts the time at which a run began into it."""
    return max(filter(_STATE.fullmatch, paths), default=None)
