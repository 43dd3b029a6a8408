"""What a sync did, as data, and the one line a person reads at the end.

How it looks as a table, a page or a plot is in ``report_views``.

Plain values that travel from the sync task to the driver; nothing here imports Ray or does I/O.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tune_sync_plugin.history import History
from tune_sync_plugin.words import count_of, human_bytes

if TYPE_CHECKING:
    import pandas

EXPERIMENT = "experiment"
"""The key under which the driver's own directory is synced and reported."""

MOST_PLOTTED = 10
"""Trials up to which each has a history of its own; a plot of more lines tells nothing."""


class FileFailure(NamedTuple):
    """One thing that was not synced, and why.

    Attributes:
        trial: The trial's id, or ``"experiment"`` for the driver's directory.
        path: The file, relative to the trial's directory; ``""`` if a whole directory is meant.
        error: The name of the exception's class, for example ``"TimeoutError"``.
        message: What was tried, what came back, and what to do where that is known.
    """

    trial: str
    path: str
    error: str
    message: str

    @property
    def lost(self) -> bool:
        """Whether there is nothing left to try: the only place that had it is gone."""
        return self.error == "NodeDiedError"

    def __str__(self) -> str:
        where = f"{self.trial}/{self.path}" if self.path else self.trial
        return f"{where}: {self.error}: {self.message}"


@dataclass(frozen=True)
class SyncReport:
    """What one sync of one directory on one node did.

    Attributes:
        files_uploaded: Files sent, and ``bytes_uploaded`` their size in bytes.
        files_unchanged: Files that storage already held, and ``bytes_unchanged`` their size.
        failures: What should be in storage and is not.
        deferred: Files that changed while they were read; the next sync takes them.
        files_stored: Files that storage holds from this directory, wherever they were sent from,
            and ``bytes_stored`` their size in bytes; 0 if the sync never came to look.
        skipped: Paths that can't be synced by their nature (FIFOs, sockets, devices, loops).
        warnings: Things that cost time but lose nothing, such as an unusable manifest.
        duration_s: How long it ran, in seconds.
        timed_out: Whether it was cut off by ``sync_timeout``.
    """

    files_uploaded: int = 0
    bytes_uploaded: int = 0
    files_unchanged: int = 0
    bytes_unchanged: int = 0
    failures: tuple[FileFailure, ...] = ()
    deferred: tuple[FileFailure, ...] = ()
    files_stored: int = 0
    bytes_stored: int = 0
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    duration_s: float = 0.0
    timed_out: bool = False

    @property
    def complete(self) -> bool:
        """Whether storage holds everything that was there when the sync started."""
        return not self.failures and not self.deferred


@dataclass(frozen=True)
class RestoreReport:
    """What was brought back to a trial's directory before it started again.

    Attributes:
        files_restored: Files brought back, and ``bytes_restored`` their size in bytes.
        files_kept: Files that were there already.
        files_local: Files of which another version was there: that one stays, and the stored one
            is kept under another name when it is overwritten.
        failures: What could not be brought back. It is in storage, and stays there.
        from_index: Whether storage had an index of ours, and not only a listing.
        warnings: Things that lose nothing, such as a damaged index that was rebuilt.
        duration_s: How long it took, in seconds.
    """

    files_restored: int = 0
    bytes_restored: int = 0
    files_kept: int = 0
    files_local: int = 0
    failures: tuple[FileFailure, ...] = ()
    from_index: bool = False
    warnings: tuple[str, ...] = ()
    duration_s: float = 0.0


@dataclass
class TrialReport:
    """The sum of all syncs of one trial (or of the driver's directory) so far.

    Attributes:
        syncs: Syncs that ended, the final flush included.
        files_uploaded: Files sent, over all syncs.
        bytes_uploaded: Bytes sent, over all syncs.
        bytes_unchanged: Bytes that did not have to be sent again, over all syncs.
        duration_s: Seconds that all syncs took together.
        last_by_node: The last sync's report by the id of the node it ran on.
        files: Files in storage after the last sync, and ``bytes`` their size.
        restored: What each restart brought back; see :class:`RestoreReport`.
        last_sync: When the last complete sync ended, in seconds since the epoch; ``None`` if there
            was none.
        failures: What the last sync of each node left unsynced.
    """

    syncs: int = 0
    files_uploaded: int = 0
    bytes_uploaded: int = 0
    bytes_unchanged: int = 0
    duration_s: float = 0.0
    last_by_node: dict[str, SyncReport] = field(default_factory=dict)
    restored: list[RestoreReport] = field(default_factory=list)
    last_sync: float | None = None
    _stored: tuple[int, int] = (0, 0)

    def add(self, node_id: str, report: SyncReport) -> None:
        """Count one more sync, run on ``node_id``."""
        self.syncs += 1
        self.files_uploaded += report.files_uploaded
        self.bytes_uploaded += report.bytes_uploaded
        self.bytes_unchanged += report.bytes_unchanged
        self.duration_s += report.duration_s
        self.last_by_node[node_id] = report
        # Of several nodes, the one that looked last knows of the others' files as well.
        stored = (report.files_stored, report.bytes_stored)
        self._stored = max(self._stored, stored)
        if report.complete:
            self.last_sync = time.time()

    @property
    def files(self) -> int:
        return self._stored[0]

    @property
    def bytes(self) -> int:
        return self._stored[1]

    @property
    def files_restored(self) -> int:
        """Files brought back, over all restarts."""
        return sum(report.files_restored for report in self.restored)

    @property
    def not_restored(self) -> list[FileFailure]:
        """What the last restart did not get back. It is in storage."""
        return list(self.restored[-1].failures) if self.restored else []

    @property
    def failures(self) -> list[FileFailure]:
        return [
            failure
            for report in self.last_by_node.values()
            for failure in (*report.failures, *report.deferred)
        ]


@dataclass
class MirrorReport:
    """What is in ``SyncConfig(upload_dir)``; ``SyncCallback.report.mirror``.

    Attributes:
        url: Where the experiment's mirror is, without credentials.
        files_uploaded: Files sent, and ``bytes_uploaded`` their size in bytes.
        checkpoints_uploaded: Checkpoints that arrived.
        checkpoints_skipped: Checkpoints that Tune had deleted before the link could take them.
        checkpoints_deleted: Checkpoints that Tune deleted and that were deleted there in turn.
        states: States of the experiment that arrived.
        states_passed_over: States that could not be mirrored, since a checkpoint that they name was
            deleted before it could be kept; a later one took their place.
        last_state: When the last state arrived, in seconds since the epoch; ``None`` if none did.
        owed: Checkpoints, trials and states that have yet to go there.
        failures: What is not there.
        warnings: What nodes can't do, and what to do about it.
    """

    url: str = ""
    files_uploaded: int = 0
    bytes_uploaded: int = 0
    checkpoints_uploaded: int = 0
    checkpoints_skipped: int = 0
    checkpoints_deleted: int = 0
    states: int = 0
    states_passed_over: int = 0
    last_state: float | None = None
    owed: int = 0
    failures: list[FileFailure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def state_arrived(self) -> None:
        """Count one more state."""
        self.states, self.last_state = self.states + 1, time.time()

    def summary(self) -> str:
        """One line for the log.

        Example:
            >>> MirrorReport("s3://bucket/exp", bytes_uploaded=10**6).summary()
            'mirror s3://bucket/exp: 1.0 MB uploaded, 0 checkpoints (0 skipped), 0 failed'
        """
        checkpoints = count_of(self.checkpoints_uploaded, "checkpoint")
        return (
            f"mirror {self.url}: {human_bytes(self.bytes_uploaded)} uploaded, "
            f"{checkpoints} ({self.checkpoints_skipped} skipped), "
            f"{len(self.failures)} failed"
        )


@dataclass
class ExperimentReport:
    """Everything that was synced in one experiment; ``SyncCallback.report``.

    Attributes:
        trials: One :class:`TrialReport` per trial id whose artifacts we sync.
        experiment: The driver's directory (experiment state, results, logs).
        destination: Where on the storage file system all of it went.
        artifacts: Whether artifacts were to be synced (``sync_artifacts``).
        not_attached: Trials that Ray's own artifact sync still serves, and why.
        mirror: What is in ``upload_dir``; ``None`` without one.
        duration_s: Seconds from the callback's ``setup`` to the end of the final flush.
        history: When how many bytes had been sent, over all trials and the driver's directory.
        trial_histories: The same per trial, while there are at most ten of them.
        latest_failure: What a sync left out last, also if a later one succeeded.

    Example:
        >>> report = ExperimentReport()
        >>> report.add("trial_1", "node", SyncReport(files_uploaded=2, bytes_uploaded=10**6))
        >>> report.to_pandas()["bytes_uploaded"].to_dict()
        {'experiment': 0, 'trial_1': 1000000}
    """

    trials: dict[str, TrialReport] = field(default_factory=dict)
    experiment: TrialReport = field(default_factory=TrialReport)
    destination: str = ""
    artifacts: bool = True
    _timeouts: dict[FileFailure, None] = field(default_factory=dict)
    not_attached: dict[str, str] = field(default_factory=dict)
    mirror: MirrorReport | None = None
    duration_s: float = 0.0
    history: History = field(default_factory=History)
    trial_histories: dict[str, History] = field(default_factory=dict)
    latest_failure: FileFailure | None = None

    def of(self, key: str) -> TrialReport:
        """The part about one trial, or about the driver's directory."""
        if key == EXPERIMENT:
            return self.experiment
        return self.trials.setdefault(key, TrialReport())

    def add(self, key: str, node_id: str, report: SyncReport) -> None:
        """Count one more sync."""
        self.of(key).add(node_id, report)
        self._remember(key, report)
        late = (failure for failure in report.failures if failure.error == "TimeoutError")
        self._timeouts.update(dict.fromkeys(late))

    def _remember(self, key: str, report: SyncReport) -> None:
        for failure in (*report.deferred, *report.failures)[-1:]:
            self.latest_failure = failure
        now = time.time()
        self.history.add(now, report.bytes_uploaded)
        if len(self.trials) > MOST_PLOTTED:
            self.trial_histories.clear()
        elif key != EXPERIMENT:
            self.trial_histories.setdefault(key, History()).add(now, report.bytes_uploaded)

    @property
    def timeouts(self) -> list[FileFailure]:
        """What ``sync_timeout`` cut off at any time, also if a later sync succeeded."""
        return list(self._timeouts)

    def _parts(self) -> Iterator[TrialReport]:
        yield self.experiment
        yield from self.trials.values()

    @property
    def failures(self) -> list[FileFailure]:
        """What is not in storage as far as we know: the failures of each place's last sync."""
        failures = [failure for part in self._parts() for failure in part.failures]
        return failures + (self.mirror.failures if self.mirror else [])

    @property
    def not_restored(self) -> list[FileFailure]:
        """What trials that started again did not get back. It is in storage, and stays there."""
        return [failure for part in self._parts() for failure in part.not_restored]

    @property
    def files_restored(self) -> int:
        """Files brought back to trials that started again."""
        return sum(part.files_restored for part in self._parts())

    @property
    def files(self) -> int:
        """Files in storage."""
        return sum(part.files for part in self._parts())

    @property
    def bytes_uploaded(self) -> int:
        """Bytes sent over all syncs."""
        return sum(part.bytes_uploaded for part in self._parts())

    @property
    def bytes_unchanged(self) -> int:
        """Bytes that were in storage already and were not sent again, over all syncs."""
        return sum(part.bytes_unchanged for part in self._parts())

    def summary(self) -> str:
        """One line for the log.

        Example:
            >>> ExperimentReport().summary()
            'synced 0 trials: 0 files, 0 B uploaded, 0 B unchanged, 0 failed, 0.0 s'
        """
        trials = count_of(len(self.trials), "trial")
        left = count_of(len(self.not_attached), "trial")
        return (
            f"synced {trials if self.artifacts else 'no artifacts (they are off)'}: "
            f"{count_of(self.files, 'file')}, "
            f"{human_bytes(self.bytes_uploaded)} uploaded, "
            f"{human_bytes(self.bytes_unchanged)} unchanged, "
            f"{len(self.failures)} failed, {self.duration_s:.1f} s"
            + (f", {self.files_restored} restored" if self.files_restored else "")
            + (f", {len(self.not_restored)} not restored" if self.not_restored else "")
            + (f", {left} left to Ray" if self.not_attached else "")
            + (f"; {self.mirror.summary()}" if self.mirror else "")
        )

    def to_pandas(self) -> pandas.DataFrame:
        """A row for the driver's directory and one per trial; the index is the trial's id.

        The columns are ``files`` and ``bytes`` in storage, ``bytes_uploaded`` and
        ``bytes_unchanged`` over all syncs, ``failed`` and ``lost`` (failures that a later sync may
        mend, and those it can't), ``files_restored``, ``duration_s`` (seconds, all syncs together)
        and ``last_sync`` (UTC; ``NaT`` if no sync was complete).
        """
        from tune_sync_plugin import report_views

        return report_views.to_pandas(self)

    def plot(self, ax: Any = None) -> Any:
        """Draw the bytes uploaded over time: in total and, of at most ten trials, of each.

        Args:
            ax: matplotlib's axes to draw on. Default: new ones.

        Returns:
            The axes.

        Raises:
            ImportError: matplotlib is missing; says how to install it.
        """
        from tune_sync_plugin import report_views

        return report_views.plot(self, ax)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from tune_sync_plugin import report_views

        return report_views.to_html(self)
