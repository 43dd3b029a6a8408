"""The line that says, while a run goes on, how far its syncing is. Pure: no clock, no logger."""

from __future__ import annotations

from tune_sync_plugin.report import ExperimentReport, FileFailure
from tune_sync_plugin.targets import Account
from tune_sync_plugin.words import count_of, human_bytes

# Storage's answers can be pages long; all of them are in the report.
_MOST_OF_AN_ERROR = 300
# So many seconds over the period are more than a busy queue.
_LATE_S = 60.0


class StatusLine:
    """Makes the lines of one experiment; each tells what came since the one before.

    Args:
        started: When the experiment began, in the seconds of whoever calls :meth:`next`.
        period_s: Seconds for which a request may have to wait though all is well.

    Example:
        >>> report = ExperimentReport()
        >>> report.history.add(0.0, 20_000_000)
        >>> StatusLine(0.0, 300.0).next(report, Account(2, 1, 1, 1, oldest_s=12.0), 10.0)
        'synced 1 of 2 trials, 20.0 MB up (2.0 MB/s), 1 not up to date, oldest unsynced 12 s'
    """

    def __init__(self, started: float, period_s: float) -> None:
        self._then = started
        self._late_s = self._said_late_s = period_s + _LATE_S
        self._bytes = 0
        self._failure: FileFailure | None = None
        self._last: tuple[object, ...] = (0, 0, 0, None)

    def next(self, report: ExperimentReport, account: Account, now: float) -> str | None:
        """The line to log at ``now``; ``None`` if nothing has happened since the last one."""
        uploaded = report.history.total
        if report.mirror:
            uploaded += report.mirror.bytes_uploaded
        # What is asked for is no news: in a run that reports all the time, something always is.
        news = (uploaded, account.synced, account.failing, report.latest_failure)
        rate = (uploaded - self._bytes) / max(now - self._then, 1e-3)
        is_early = report.artifacts and not account.trials and not report.latest_failure
        # Of what hangs nothing else is heard: that is said, and again when it has taken twice that.
        is_late = account.oldest_s >= self._said_late_s
        if is_early or (news == self._last and not is_late):
            self._then = now  # a pause does not lower the next rate
            return None
        self._said_late_s = max(self._late_s, 2 * account.oldest_s)
        new_failure = report.latest_failure is not self._failure
        self._last, self._failure = news, report.latest_failure
        self._then, self._bytes = now, uploaded
        parts = [
            f"synced {account.synced} of {count_of(account.trials, 'trial')}"
            if report.artifacts
            else "syncing the experiment's state (artifacts are off)",
            f"{human_bytes(uploaded)} up ({human_bytes(rate)}/s)",
        ]
        if account.owed_trials:
            parts.append(f"{account.owed_trials} not up to date")
        if account.owed:
            parts.append(f"oldest unsynced {account.oldest_s:.0f} s")
        if report.latest_failure and (new_failure or account.failing):
            parts.append(f"last error: {_short(str(report.latest_failure))}")
        return ", ".join(parts)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_OF_AN_ERROR else text[: _MOST_OF_AN_ERROR - 3] + "..."
