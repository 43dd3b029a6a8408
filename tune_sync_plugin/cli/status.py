"""What an experiment's directory in storage holds, how old it is, and whether that is all.

Reads storage and nothing else: a listing, what the run says of itself, the indexes, and the newest
of Ray's experiment states. Works on a mirror, and on what Ray alone wrote. No part of Ray is here.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone

from tune_sync_plugin import layout
from tune_sync_plugin.cli.verify import MISSING, Difference, against_indexes, by_summary
from tune_sync_plugin.engine.index import INDEX
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import SyncError
from tune_sync_plugin.runs import read_run, read_summary

US, RAY = "tune_sync_plugin", "ray"


@dataclass(frozen=True)
class TrialStatus:
    """What there is of one trial.

    Attributes:
        name: Its directory's.
        files: Files of all kinds, and ``bytes`` their size; our own book-keeping left out.
        checkpoints: Checkpoints among them.
        indexed: Whether there is an index of ours.
    """

    name: str
    files: int
    bytes: int
    checkpoints: int
    indexed: bool


@dataclass
class Status:
    """What there is of one experiment, or of one trial where the URL is a trial's.

    Attributes:
        path: Where, relative to the URL; empty if it is the URL itself.
        written_by: ``"tune_sync_plugin"``, or ``"ray"`` if nothing of ours is there.
        files: Files of all kinds, and ``bytes`` their size; our own book-keeping left out.
        checkpoints: Checkpoints among them.
        trials: The trials.
        started: When the last run began, and ``ended`` when it ended (ISO 8601); as it says itself.
        host: Its driver's machine.
        complete: Whether everything is there; ``None`` if nobody has said so.
        state: The newest experiment state of Ray's.
        trial_states: How many trials are in which state, by that.
        last_result: When the last result came, by that.
        problems: What is not as it should be.
    """

    path: str
    written_by: str = RAY
    files: int = 0
    bytes: int = 0
    checkpoints: int = 0
    trials: list[TrialStatus] = field(default_factory=list)
    started: str | None = None
    ended: str | None = None
    host: str | None = None
    complete: bool | None = None
    state: str | None = None
    trial_states: dict[str, int] = field(default_factory=dict)
    last_result: str | None = None
    problems: list[str] = field(default_factory=list)


def status(storage: Storage) -> list[Status]:
    """What ``storage`` holds: one :class:`Status` per experiment.

    Sizes are compared with the indexes, contents are not; :func:`.verify` does that.

    Args:
        storage: An experiment's directory, a trial's, or one that holds several experiments.

    Raises:
        SyncError: There is nothing.
        OSError: Storage can't be read.

    Example:
        >>> import os, tempfile
        >>> from tune_sync_plugin.engine.local_storage import LocalStorage
        >>> there = tempfile.mkdtemp(); os.mkdir(f"{there}/trial_1")
        >>> for name in ("tuner.pkl", "trial_1/result.json"):
        ...     _ = open(f"{there}/{name}", "w").write("{}")
        >>> (found,) = status(LocalStorage(there))
        >>> found.written_by, found.files, [trial.name for trial in found.trials]
        ('ray', 2, ['trial_1'])
    """
    stored = storage.files()
    if not stored:
        raise SyncError(f"there is nothing in {storage.name}: correct the URL")
    differences = against_indexes(storage, stored, contents=False).differences
    found = []
    for directory in layout.experiments(stored) or [""]:
        start = f"{directory}/" if directory else ""
        inside = [
            Difference(each.path[len(start) :], each.problem)
            for each in differences
            if each.path.startswith(start)
        ]
        found.append(_experiment(storage, directory, layout.below(stored, directory), inside))
    return found


def _experiment(
    storage: Storage, directory: str, stored: dict[str, int], differences: list[Difference]
) -> Status:
    files = {path: size for path, size in stored.items() if not layout.is_own(path)}
    trials = [""] if layout.is_trial(stored) else layout.trials(stored)
    found = Status(
        directory,
        US if len(files) < len(stored) else RAY,
        len(files),
        sum(files.values()),
        len(layout.checkpoints(files)),
        [_trial(name, stored, files) for name in trials],
        state=layout.newest_state(files),
    )
    run, summary = read_run(storage, directory) or {}, read_summary(storage, directory)
    found.started, found.host, found.ended = run.get("started"), run.get("host"), run.get("ended")
    if summary:
        found.complete = bool(summary.get("complete"))
        found.started = found.started or summary.get("started")
        found.ended = found.ended or summary.get("written")
        differences = [*differences, *by_summary(summary)]
    else:
        # While a run goes on, an index may lag behind a file that grew; but a file that it names
        # has been sent.
        differences = [each for each in differences if each.problem == MISSING]
    found.problems = [str(each) for each in differences]
    if found.problems:
        found.complete = False
    if found.state:
        _look_into(found, storage, posixpath.join(directory, found.state))
    return found


def _trial(name: str, stored: Mapping[str, int], files: Mapping[str, int]) -> TrialStatus:
    inside = layout.below(files, name)
    return TrialStatus(
        name,
        len(inside),
        sum(inside.values()),
        len(layout.checkpoints(inside)),
        posixpath.join(name, INDEX) in stored,
    )


def _look_into(found: Status, storage: Storage, path: str) -> None:
    """Add what Ray's state says of the trials, as far as it is what we expect."""
    try:
        trials = [
            (json.loads(trial)["status"], json.loads(facts).get("last_result_time"))
            for trial, facts in json.loads(b"".join(storage.read(path)))["trial_data"]
        ]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return  # it is being replaced, or another version's: the files still count
    found.trial_states = dict(Counter(str(state) for state, _ in trials))
    times = [time for _, time in trials if isinstance(time, int | float) and 0 < time < 1e11]
    if times:
        last = datetime.fromtimestamp(max(times), timezone.utc)
        found.last_result = last.isoformat(timespec="seconds")
