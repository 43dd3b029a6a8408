"""The command line's results as lines for a person. What they mean is in ``status.py``; no I/O."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone

from tune_sync_plugin.cli.status import RAY, Status
from tune_sync_plugin.words import count_of, human_bytes

# So many lines about what is not there are read; the rest is in --json.
_LINES = 50


def lines_about(found: Status, url: str) -> Iterator[str]:
    """What a person reads about an experiment; ``url`` is its name if it has none of its own."""
    if found.written_by == RAY:
        said = "written by Ray alone, not by tune_sync_plugin: nobody has said that it is complete"
    elif found.complete is None:
        said = "the run has not ended, or was killed" if not found.ended else "no summary"
    else:
        said = "complete" if found.complete else "not complete"
    yield f"{found.path or url}: {said}"
    yield (
        f"  {count_of(len(found.trials), 'trial')}, {count_of(found.files, 'file')}, "
        f"{human_bytes(found.bytes)}, {count_of(found.checkpoints, 'checkpoint')}"
    )
    times = (("started", found.started), ("ended", found.ended), ("last result", found.last_result))
    ages = [f"{name} {_age(time)}" for name, time in times if time]
    if found.host:
        ages.append(f"on {found.host}")
    if ages:
        yield f"  {', '.join(ages)}"
    if found.state:
        states = ", ".join(f"{count} {name}" for name, count in found.trial_states.items())
        yield f"  newest experiment state: {found.state}{f': {states}' if states else ''}"
    yield from cut([f"  {problem}" for problem in found.problems])


def _age(then: str) -> str:
    try:
        time = datetime.fromisoformat(then)
        seconds = (datetime.now(timezone.utc) - time).total_seconds()
    except (ValueError, TypeError):
        return then
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago ({then})"
    return f"{max(seconds, 0):.0f} s ago ({then})"


def cut(lines: list[str]) -> list[str]:
    """As many lines as anybody reads."""
    more = len(lines) - _LINES
    return lines if more <= 0 else [*lines[:_LINES], f"... and {more} more; --json has them all"]
