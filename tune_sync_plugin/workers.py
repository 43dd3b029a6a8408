"""The processes that syncs run in: Ray actors, made early, kept, few, and only ours.

Ray ends a task's process when it has idled for a second while trials have all the CPUs, so each
sync would start a new one: 1.5 s and more, at the end of every run too. And it hands that process
to the user's tasks next, so that its priority, which nobody but root can raise again, had to stay
as it is. An actor's process has neither fault. It keeps no state that a sync depends on: one that
fails is thrown away.

A process costs a CPU a second to start, which on a small machine training waits for, and 100 MB. So
a node has one, and gets another when that one is kept busy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_sync_plugin.errors import describe
from tune_sync_plugin.tasks import SyncWorker

logger = logging.getLogger(__name__)

# So long an idle one is kept on a node that is not the driver's: while it is there, an autoscaler
# does not give the node back.
_IDLE_S = 60.0
# Most syncs are over sooner than another process could be there to do them.
_PATIENCE_S = 1.0
# Two that start at once on a busy machine keep each other from it.
_STARTS_S = 10.0


@dataclass(eq=False)
class Worker:
    """One process.

    Attributes:
        node_id: Where it is.
        actor: Its handle.
        made: When.
        idle_since: When it was made or given back; ``None`` while it is at work.
        runs: Whether it has ever answered, and so has started.
    """

    node_id: str
    actor: Any
    made: float
    idle_since: float | None = None
    runs: bool = False


# Once: each would be sent to the cluster anew.
_SyncActor = ray.remote(
    # Beside trials that fill the node.
    num_cpus=0,
    # One that is killed while it idles is back before it is needed; and Ray, when it runs out of
    # memory, takes what can be had back before it takes a trial. What it was at is not repeated:
    # the dispatcher knows better when.
    max_restarts=-1,
    max_task_retries=0,
)(SyncWorker)


def start_worker(run: bytes, node_id: str) -> Any:
    """A :class:`SyncWorker` on that node; returns its handle at once.

    Args:
        run: The experiment, pickled.
        node_id: Where.
    """
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return _SyncActor.options(scheduling_strategy=strategy).remote(run)


class Workers:
    """Makes, lends and ends them. Nothing here waits for one to start.

    Args:
        start: Starts one on a node; returns its actor.
        stop: Ends an actor's process, whatever it does.
        here: The driver's node, which is there as long as the driver.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        start: Callable[[str], Any],
        stop: Callable[[Any], None],
        here: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._stop = stop
        self._here = here
        self._clock = clock
        self._workers: dict[str, list[Worker]] = {}
        # Since when somebody waits for one of a node's to be free.
        self._waiting: dict[tuple[str, Hashable], float] = {}
        self._look_again = clock() + _IDLE_S

    def warm_up(self, node_id: str) -> None:
        """Have one on a node, ready or about to be, unless it can't be made."""
        if not self._workers.get(node_id):
            try:
                self._make(node_id)
            except Exception as error:  # whoever needs it meets the same, and reports it
                logger.debug("starting a sync worker early failed: %s", describe(error))

    def has_room(self, node_id: str, who: Hashable) -> bool:
        """Whether to :meth:`take` one now, or rather to wait for one to be free.

        Args:
            node_id: Of which node.
            who: Who asks; told ``False``, they are expected to ask again soon.
        """
        workers = self._workers.get(node_id, ())
        if all(worker.idle_since is None for worker in workers) and workers:
            now = self._clock()
            since = self._waiting.setdefault((node_id, who), now)
            starting = any(not w.runs and now - w.made < _STARTS_S for w in workers)
            if starting or now - since < _PATIENCE_S:
                return False
        self._waiting.pop((node_id, who), None)
        return True

    def take(self, node_id: str) -> Worker:
        """An idle one, if possible one that has started; or a new one."""
        idle = [w for w in self._workers.get(node_id, ()) if w.idle_since is not None]
        worker = max(idle, key=lambda w: (w.runs, w.idle_since), default=None)
        worker = worker or self._make(node_id)
        worker.idle_since = None
        return worker

    def _make(self, node_id: str) -> Worker:
        now = self._clock()
        worker = Worker(node_id, self._start(node_id), made=now, idle_since=now)
        self._workers.setdefault(node_id, []).append(worker)
        return worker

    def give_back(self, worker: Worker) -> None:
        """It has done what it was taken for."""
        worker.idle_since, worker.runs = self._clock(), True

    def end(self, worker: Worker) -> None:
        """End its process, whatever it does."""
        workers = self._workers.get(worker.node_id, [])
        if worker not in workers:
            return
        workers.remove(worker)
        try:
            self._stop(worker.actor)
        except Exception as error:
            # Nobody is there to be killed, or to tell: nothing that the caller could do.
            logger.debug("ending a sync worker failed: %s", describe(error))

    def end_idle(self) -> None:
        """Let go of those that nobody has needed for long. To be called often: mostly a no-op."""
        now = self._clock()
        if now < self._look_again:
            return
        self._look_again = now + _IDLE_S / 4
        for node_id, workers in list(self._workers.items()):
            for worker in list(workers):
                since = worker.idle_since
                if node_id != self._here and since is not None and now - since >= _IDLE_S:
                    self.end(worker)
            if not workers:
                del self._workers[node_id]

    def close(self) -> None:
        """End all of them."""
        for workers in list(self._workers.values()):
            for worker in list(workers):
                self.end(worker)
