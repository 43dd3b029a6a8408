"""What can be seen of the syncing while a run goes on: the status line and Ray's metrics.

Called at every step of Tune's loop, where it costs a look at the clock; now and then it asks the
dispatcher for its account, which it passes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tune_sync_plugin.metrics import Metrics
from tune_sync_plugin.report import ExperimentReport, SyncReport
from tune_sync_plugin.status_line import StatusLine
from tune_sync_plugin.targets import Account

logger = logging.getLogger(__name__)

# Seconds between two looks; gauges are as old as that at most.
EVERY_S = 10.0


class Watching:
    """Logs the status line and sets the gauges, each when its time has come.

    Args:
        report: What was synced so far.
        account: Tells what is owed.
        metrics: Get what is found.
        period_s: Least seconds between two lines, and between two syncs of a trial; of the lines,
            ``EVERY_S`` counts where it is more.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        report: ExperimentReport,
        account: Callable[[], Account],
        metrics: Metrics,
        period_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._account = account
        self._metrics = metrics
        self._clock = clock
        now = clock()
        self._line = StatusLine(now, period_s)
        self._period_s = period_s
        self._look_at = now + EVERY_S
        self._line_at = now + self._period_s

    def synced(self, node_id: str, report: SyncReport) -> None:
        """A sync has ended, and is in the report."""
        self._metrics.synced(node_id, report)

    def poll(self) -> None:
        """Do what is due."""
        now = self._clock()
        if now < self._look_at:
            return
        self._look_at = now + EVERY_S
        account = self._account()
        self._metrics.owed(account)
        if now < self._line_at:
            return
        line = self._line.next(self._report, account, now)
        if line:
            # Where nothing was new, what comes next is said soon.
            self._line_at = now + self._period_s
            logger.info(line)

    def ended(self) -> None:
        """The run is over: the gauges are left at what is owed in the end."""
        self._metrics.owed(self._account())
