"""How the syncing does, as metrics of Ray's: its nodes export them to Prometheus.

Here are all names, which a dashboard relies on (``examples/grafana``), and what each is fed with.
Metrics must never harm a run: what fails is logged for debugging, once, and then left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tune_sync_plugin.errors import describe
from tune_sync_plugin.report import SyncReport
from tune_sync_plugin.targets import Account

logger = logging.getLogger(__name__)

BYTES_UPLOADED = "tune_sync_bytes_uploaded"
FILES_UPLOADED = "tune_sync_files_uploaded"
FAILURES = "tune_sync_failures"
DURATION = "tune_sync_duration_seconds"
QUEUE_LENGTH = "tune_sync_queue_length"
OLDEST_UNSYNCED = "tune_sync_oldest_unsynced_seconds"

# Seconds. Ray gives a histogram's sum from the middles of these, so averages of it are rough.
_BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]


def exported_names() -> set[str]:
    """The names in Prometheus: Ray puts ``ray_`` before them, Prometheus ``_total`` after counters.

    Example:
        >>> "ray_tune_sync_bytes_uploaded_total" in exported_names()
        True
    """
    counters = {f"ray_{name}_total" for name in (BYTES_UPLOADED, FILES_UPLOADED, FAILURES)}
    gauges = {f"ray_{name}" for name in (QUEUE_LENGTH, OLDEST_UNSYNCED)}
    return counters | gauges | {f"ray_{DURATION}_{part}" for part in ("bucket", "count", "sum")}


class Metrics:
    """The metrics of one experiment, exported by the driver's node.

    All have the tag ``experiment``, its name. Those of syncs have ``node`` as well: the first
    eight digits of the id of the node that a sync ran on, as in our log.

    Args:
        experiment: The experiment's name.
    """

    def __init__(self, experiment: str) -> None:
        self._tags = {"experiment": experiment}
        self._broken = False
        self._safely(self._make)

    def _make(self) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        of_syncs, of_all = ("experiment", "node"), ("experiment",)
        self._bytes = Counter(BYTES_UPLOADED, "Bytes uploaded.", of_syncs)
        self._files = Counter(FILES_UPLOADED, "Files uploaded.", of_syncs)
        self._failures = Counter(
            FAILURES,
            "Things that a sync left out; the next one tries most of them again.",
            of_syncs,
        )
        self._duration = Histogram(DURATION, "Seconds that a sync took.", _BOUNDARIES, of_syncs)
        self._queue = Gauge(
            QUEUE_LENGTH, "Directories of which something is yet to be synced.", of_all
        )
        self._oldest = Gauge(
            OLDEST_UNSYNCED, "Seconds since the oldest request that is not answered.", of_all
        )

    def synced(self, node_id: str, report: SyncReport) -> None:
        """Count one sync that ended."""
        self._safely(lambda: self._count(node_id, report))

    def _count(self, node_id: str, report: SyncReport) -> None:
        tags = {**self._tags, "node": node_id[:8]}
        for counter, count in (
            (self._bytes, report.bytes_uploaded),
            (self._files, report.files_uploaded),
            (self._failures, len(report.failures) + len(report.deferred)),
        ):
            if count:  # a counter takes nothing else
                counter.inc(count, tags)
        if report.duration_s:
            self._duration.observe(report.duration_s, tags)

    def owed(self, account: Account) -> None:
        """Say what is owed now."""
        self._safely(lambda: self._set(account))

    def _set(self, account: Account) -> None:
        self._queue.set(account.owed, self._tags)
        self._oldest.set(account.oldest_s, self._tags)

    def _safely(self, function: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            function()
        except Exception as error:
            self._broken = True
            logger.debug("no more metrics: %s: %s", type(error).__name__, describe(error))
