"""What a run writes about itself beside the experiment in storage: that it is there, and its end.

``.tune_sync/run.json`` is there from the first sync on, by which two runs in one directory notice
each other. ``.tune_sync/summary.json`` is written last of all: when it is there, so is everything
that it counts.
"""

from __future__ import annotations

import json
import posixpath
import socket
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from tune_sync_plugin.engine.index import OUR_DIRECTORY
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.report import ExperimentReport, FileFailure, TrialReport

RUN = f"{OUR_DIRECTORY}/run.json"
SUMMARY = f"{OUR_DIRECTORY}/summary.json"


@dataclass(frozen=True)
class RunFacts:
    """What tells a run from others in the same directory.

    Attributes:
        id: Unique to the run; a restored experiment is a new run.
        started: When, as ISO 8601 in UTC.
        resumed: Whether it goes on with what an earlier run left.
    """

    id: str
    started: str
    resumed: bool = False


def claim(storage: Storage, facts: RunFacts) -> str | None:
    """Note that this run writes here; returns a warning if another one seems to do so as well."""
    other = _read(storage, RUN)
    _write(storage, RUN, _described(facts), facts.id)
    if other is None or other.get("id") == facts.id:
        return None
    # Ours, or an earlier run's; it counts what is about to change.
    storage.remove(SUMMARY)
    if other.get("ended") or facts.resumed:
        return None
    return (
        f"{storage.name} is also the directory of a run that started at {other.get('started')} on "
        f"{other.get('host')} and has not ended, unless it was killed. Two runs at once in one "
        "directory replace each other's tuner.pkl and state; give each its own RunConfig(name=...)"
    )


def close(storage: Storage, facts: RunFacts, summary: dict[str, Any]) -> str | None:
    """Write the summary, and note the run's end; returns a warning if another one has been here."""
    other = _read(storage, RUN)
    if other and other.get("id") != facts.id:
        return (
            f"a run that started at {other.get('started')} on {other.get('host')} wrote to "
            f"{storage.name} while this one ran. Trials are kept apart by their ids, but tuner.pkl "
            "and other files of the experiment are those of whichever wrote last; no summary was "
            "written. Give each run its own RunConfig(name=...)"
        )
    _write(storage, RUN, {**_described(facts), "ended": now()}, facts.id)
    _write(storage, SUMMARY, summary, facts.id)
    return None


def now() -> str:
    """The time, as ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _described(facts: RunFacts) -> dict[str, Any]:
    return {"id": facts.id, "started": facts.started, "host": socket.gethostname(), "ended": None}


def _read(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        found = json.loads(b"".join(storage.read(path)))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(storage: Storage, path: str, content: dict[str, Any], run_id: str) -> None:
    storage.write(path, Memory(json.dumps(content, indent=1).encode()), run_id)


def read_summary(storage: Storage, directory: str = "") -> dict[str, Any] | None:
    """What the last run said when it ended; ``None`` if it has not, or said it unreadably."""
    return _read(storage, posixpath.join(directory, SUMMARY))


def read_run(storage: Storage, directory: str = "") -> dict[str, Any] | None:
    """What the last run said when it began, and whether it has ended; ``None`` as above."""
    return _read(storage, posixpath.join(directory, RUN))


def summarize(report: ExperimentReport, facts: RunFacts) -> dict[str, Any]:
    """What goes into the summary.

    Example:
        >>> facts = RunFacts("1a2b", "2026-11-24T10:00:00+00:00")
        >>> summarize(ExperimentReport(), facts)["complete"]
        True
    """
    return {
        "version": 1,
        "run": facts.id,
        "started": facts.started,
        "written": now(),
        "complete": not report.failures and not report.not_attached,
        "experiment": _part(report.experiment),
        "trials": {key: _part(trial) for key, trial in report.trials.items()},
        "left_to_ray": dict(report.not_attached),
    }


def _part(part: TrialReport) -> dict[str, Any]:
    lost = [failure for failure in part.failures if failure.lost]
    failed = [failure for failure in part.failures if not failure.lost]
    last = part.last_sync
    return {
        "files": part.files,
        "bytes": part.bytes,
        "failed": [_line(failure) for failure in failed],
        "lost": [_line(failure) for failure in lost],
        "last_sync": last
        and datetime.fromtimestamp(last, timezone.utc).isoformat(timespec="seconds"),
    }


def _line(failure: FileFailure) -> str:
    return f"{failure.path or 'all'}: {failure.error}: {failure.message}"
