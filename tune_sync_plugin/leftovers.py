"""What a killed driver left on the nodes of a cluster that lives on.

``Tuner.restore`` there uses the same directories again, but the trials may go on elsewhere, or are
over. So every node is asked once what it has of them, and that is synced before any trial goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from tune_sync_plugin.directories import SyncJob
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.executor import RayExecutor
from tune_sync_plugin.tasks import find_leftovers

logger = logging.getLogger(__name__)


class Leftovers:
    """Finds out what lies where, and requests it.

    Args:
        executor: Runs the question on each node.
        dispatcher: Is told of the places.
        jobs: The sync job of each trial of the restored experiment, by its id.
    """

    def __init__(
        self, executor: RayExecutor, dispatcher: Dispatcher, jobs: Mapping[str, SyncJob]
    ) -> None:
        self._executor = executor
        self._dispatcher = dispatcher
        self._jobs = jobs
        self._asked: dict[str, Any] = {}
        if jobs:
            for node_id in executor.alive_nodes():
                self._asked[node_id] = executor.call(node_id, find_leftovers, list(jobs.values()))

    def collect(self) -> bool:
        """Take in the answers that are there; returns whether they all are. Never blocks."""
        for node_id, reference in list(self._asked.items()):
            if not self._executor.is_ready(reference):
                continue
            del self._asked[node_id]
            try:
                keys: list[str] = self._executor.result(reference)
            except Exception as error:
                # Most likely the node is gone, and with it what it had.
                logger.debug("node %s could not be asked what it has: %s", node_id, error)
                continue
            for key in keys:
                self._dispatcher.add_target(key)
                self._dispatcher.add_left(key, node_id, self._jobs[key])
        return not self._asked
