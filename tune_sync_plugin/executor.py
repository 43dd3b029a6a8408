"""Runs sync jobs as Ray tasks pinned to nodes: the dispatcher's Executor, on Ray's public API."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_sync_plugin.directories import Run, SyncJob
from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Ended, Event
from tune_sync_plugin.tasks import sync_directories

logger = logging.getLogger(__name__)


class RayExecutor:
    """Submits :func:`tasks.sync_directories`, one generator task per batch of jobs.

    The tasks ask for no CPU, so that they run beside trials that fill the node, and are never
    retried by Ray: the dispatcher knows better when.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._task = ray.remote(num_cpus=0, max_retries=0)(sync_directories)

    def submit(self, node_id: str, jobs: Sequence[SyncJob], budget_s: float) -> Any:
        """Start the jobs in one task on that node."""
        task = self._task.options(
            name=f"tune_sync:{jobs[0].key}" + (f"+{len(jobs) - 1}" if len(jobs) > 1 else ""),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        return task.remote(jobs, self._run, budget_s)

    def poll(self, handle: Any) -> list[Event]:
        """What the task has reported since the last call."""
        events: list[Event] = []
        # Ready means here, not only made somewhere: fetching a long report would block the caller.
        while ray.wait([handle], timeout=0)[0]:
            try:
                events.append(ray.get(next(handle)))
            except StopIteration:
                events.append(Ended())
                break
            except Exception as error:
                events.append(Ended(*cause_of(error)))
                break
        return events

    def kill(self, handle: Any) -> None:
        """End the task's worker process."""
        try:
            ray.cancel(handle, force=True)
        except Exception as error:
            # Nobody is there to be killed, or to tell: nothing that the caller could do.
            logger.debug("killing a sync task failed: %s", describe(error))

    def wait(self, handles: Sequence[Any], timeout_s: float) -> None:
        """Return when one of them has something to report, or after the timeout."""
        if handles:
            ray.wait(list(handles), timeout=timeout_s)
        else:
            time.sleep(min(timeout_s, 0.01))

    def call(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function(*arguments, run)`` in a worker process of that node; never blocks."""
        task = ray.remote(num_cpus=0, max_retries=0)(function).options(
            name=f"tune_sync:{function.__name__}",
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        return task.remote(*arguments, self._run)

    def share(self, argument: Any) -> Any:
        """What to give to several calls in the argument's place: it is stored once for all."""
        return ray.put(argument)

    def is_ready(self, reference: Any) -> bool:
        """Whether a call has ended."""
        return bool(ray.wait([reference], timeout=0)[0])

    def result(self, reference: Any, timeout_s: float = 0.0) -> Any:
        """What a call returned.

        Raises:
            TimeoutError: It has not within that time; it has been killed.
            RuntimeError: It raised something, which the message names.
        """
        if not ray.wait([reference], timeout=timeout_s)[0]:
            self.kill(reference)
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        try:
            return ray.get(reference)
        except Exception as error:
            name, message = cause_of(error)
            raise RuntimeError(f"{name}: {message}") from None

    def alive_nodes(self) -> set[str]:
        """The ids of the cluster's live nodes."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def cause_of(error: Exception) -> tuple[str, str]:
    """The name and the text of what really happened, out of what Ray wraps it in.

    A missing module comes as itself or, where the arguments could not be unpickled for it, as a
    RaySystemError with the traceback in its text. Both are a ``ModuleNotFoundError`` here.
    """
    cause = getattr(error, "cause", None) or error
    missing = re.search(r"No module named '[\w.]+'", str(cause))
    if missing:
        return "ModuleNotFoundError", (
            f"{missing[0]} in a process that Ray started: install it on every node "
            "(pip install tune-sync-plugin and what the storage needs, or a runtime_env of Ray)"
        )
    return type(cause).__name__, describe(cause)
