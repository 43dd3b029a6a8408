"""What a killed driver left on the nodes of a cluster that lives on.

``Tuner.restore`` there uses the same directories again, but the trials may go on elsewhere, or are
over. So every node is asked once what it has of them, and that is synced before any trial goes on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tune_sync_plugin.directories import SyncJob
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.executor import RayExecutor
from tune_sync_plugin.tasks import find_leftovers

logger = logging.getLogger(__name__)

# How long a node may take to answer: a worker process has to start there. One that hangs must not
# hold up every trial of the experiment.
_ANSWER_S = 60.0


class Leftovers:
    """Finds out what lies where, and requests it.

    Args:
        executor: Runs the question on each node.
        dispatcher: Is told of the places.
        jobs: The sync job of each trial of the restored experiment, by its id.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        executor: RayExecutor,
        dispatcher: Dispatcher,
        jobs: Mapping[str, SyncJob],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._dispatcher = dispatcher
        self._jobs = jobs
        self._asked: dict[str, Any] = {}
        self._clock = clock
        self._deadline = clock() + _ANSWER_S
        self._silent: dict[str, str] = {}
        if jobs:
            shared = executor.share(list(jobs.values()))
            for node_id in executor.alive_nodes():
                self._asked[node_id] = executor.call(node_id, find_leftovers, shared)

    def collect(self) -> bool:
        """Take in the answers that are there; returns whether they all are. Never blocks."""
        if not self._asked:
            return True
        late = self._clock() >= self._deadline
        for node_id, reference in list(self._asked.items()):
            if not self._executor.is_ready(reference):
                if late:
                    del self._asked[node_id]
                    self._executor.kill(reference)
                    self._silent[node_id] = "no answer in time"
                continue
            del self._asked[node_id]
            try:
                keys: list[str] = self._executor.result(reference)
            except Exception as error:
                self._silent[node_id] = str(error)
                continue
            for key in keys:
                self._dispatcher.add_target(key)
                self._dispatcher.add_left(key, node_id, self._jobs[key])
        if not self._asked and self._silent:
            node_id, why = next(iter(self._silent.items()))
            logger.warning(
                "SyncCallback: %d nodes could not be asked what the run before this one left "
                "unsynced on them; it stays there. Node %s: %s",
                len(self._silent),
                node_id[:8],
                why,
            )
        return not self._asked

    def wait(self, timeout_s: float) -> float:
        """Collect all answers that come within this time; returns the seconds it took."""
        started = self._clock()
        self._deadline = min(self._deadline, started + timeout_s)
        while not self.collect():
            self._executor.wait(list(self._asked.values()), 0.1)
        return self._clock() - started
