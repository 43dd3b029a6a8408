"""Runs sync jobs on nodes: the dispatcher's Executor, on Ray's public API."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import cloudpickle

from tune_sync_plugin.directories import SyncJob
from tune_sync_plugin.errors import describe
from tune_sync_plugin.events import Ended, Event, Synced
from tune_sync_plugin.workers import Worker, Workers, start_worker


@dataclass(eq=False)
class _Call:
    """Something that a worker does: a batch of so many jobs, or one function."""

    worker: Worker
    reference: Any
    jobs_left: int = 0


class RayExecutor:
    """Has batches of jobs, and single functions, done by the workers of a node.

    Args:
        run: The experiment (a ``Run``), or its mirror; what is called gets it as last argument.
        here: The driver's node.
    """

    def __init__(self, run: Any, here: str) -> None:
        start = functools.partial(start_worker, cloudpickle.dumps(run))
        self._workers = Workers(start, ray.kill, here)

    def expect(self, node_id: str) -> None:
        """A trial has come to that node: what it writes will have to be synced."""
        self._workers.warm_up(node_id)

    def has_room(self, node_id: str, for_experiment: bool) -> bool:
        """Whether to submit something now, or rather to wait for what is under way there."""
        return self._workers.has_room(node_id, for_experiment)

    def submit(self, node_id: str, jobs: Sequence[SyncJob], budget_s: float) -> Any:
        """Start the jobs in one process on that node."""
        name = f"tune_sync:{jobs[0].key}" + (f"+{len(jobs) - 1}" if len(jobs) > 1 else "")
        worker = self._workers.take(node_id)
        try:
            method = worker.actor.sync.options(name=name, num_returns="streaming")
            return _Call(worker, method.remote(jobs, budget_s), len(jobs))
        except Exception:
            self._workers.end(worker)
            raise

    def ready(self, handles: Sequence[_Call]) -> set[_Call]:
        """Those that have something to report."""
        of = {handle.reference: handle for handle in handles}
        found, _ = ray.wait(list(of), num_returns=len(of), timeout=0)
        return {of[reference] for reference in found}

    def poll(self, handle: _Call) -> list[Event]:
        """What has been reported since the last call."""
        events: list[Event] = []
        # Ready means here, not only made somewhere: fetching a long report would block the caller.
        while ray.wait([handle.reference], timeout=0)[0]:
            try:
                event: Event = ray.get(next(handle.reference))
            except StopIteration:
                event = Ended()
            except Exception as error:
                event = Ended(*cause_of(error))
            events.append(event)
            handle.worker.runs = True
            if isinstance(event, Synced):
                handle.jobs_left -= 1
                if not handle.jobs_left:
                    self._done(handle, reusable=event.reusable)
                    break
            elif isinstance(event, Ended):
                self._done(handle, reusable=event.error is None)
                break
        return events

    def _done(self, handle: _Call, *, reusable: bool) -> None:
        if reusable:
            self._workers.give_back(handle.worker)
        else:
            self._workers.end(handle.worker)

    def kill(self, handle: _Call) -> None:
        """End the process."""
        self._workers.end(handle.worker)

    def wait(self, handles: Sequence[_Call], timeout_s: float) -> None:
        """Return when one of them has something to report, or after the timeout."""
        if handles:
            ray.wait([handle.reference for handle in handles], timeout=timeout_s)
        else:
            time.sleep(min(timeout_s, 0.01))

    def call(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run ``function(*arguments, run)`` in a process on that node; never blocks."""
        worker = self._workers.take(node_id)
        method = worker.actor.call.options(name=f"tune_sync:{function.__name__}")
        return _Call(worker, method.remote(function, *arguments))

    def share(self, argument: Any) -> Any:
        """What to give to several calls in the argument's place: it is stored once for all."""
        return ray.put(argument)

    def is_ready(self, call: _Call) -> bool:
        """Whether a call has ended."""
        return bool(ray.wait([call.reference], timeout=0)[0])

    def result(self, call: _Call, timeout_s: float = 0.0) -> Any:
        """What a call returned.

        Raises:
            TimeoutError: It has not within that time; it has been killed.
            RuntimeError: It raised something, which the message names.
        """
        if not ray.wait([call.reference], timeout=timeout_s)[0]:
            self.kill(call)
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        try:
            result = ray.get(call.reference)
        except Exception as error:
            self._workers.end(call.worker)
            name, message = cause_of(error)
            raise RuntimeError(f"{name}: {message}") from None
        self._workers.give_back(call.worker)
        return result

    def alive_nodes(self) -> set[str]:
        """The ids of the cluster's live nodes."""
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    def tidy(self) -> None:
        """Let go of what is no longer needed. To be called often: mostly a no-op."""
        self._workers.end_idle()

    def close(self) -> None:
        """End all processes."""
        self._workers.close()


def cause_of(error: Exception) -> tuple[str, str]:
    """The name and the text of what really happened, out of what Ray wraps it in.

    A missing module comes as itself or, where it kept an actor from starting or an argument from
    being unpickled, as some error of Ray's with the traceback in its text. It is a
    ``ModuleNotFoundError`` here in any case.
    """
    cause = getattr(error, "cause", None) or error
    missing = re.search(r"No module named '[\w.]+'", str(cause))
    if missing:
        return "ModuleNotFoundError", (
            f"{missing[0]} in a process that Ray started: install it on every node "
            "(pip install tune-sync-plugin and what the storage needs, or a runtime_env of Ray)"
        )
    if isinstance(cause, ray.exceptions.RayActorError):
        # That it is an actor is our own affair.
        return "WorkerCrashedError", f"the process or its node ended: {describe(cause)}"
    return type(cause).__name__, describe(cause)
