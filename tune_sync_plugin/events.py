"""What passes between the dispatcher and whoever runs its sync tasks. Plain values, no Ray."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tune_sync_plugin.report import SyncReport


@dataclass(frozen=True)
class Started:
    """The task runs: its time counts from here."""


@dataclass(frozen=True)
class Synced:
    """The next job of the batch has ended, with this report.

    ``reusable`` is whether its process is as good as new, with nothing of ours still under way.
    """

    report: SyncReport
    reusable: bool = True


@dataclass(frozen=True)
class Ended:
    """The task is over. ``error`` is why, if that came before its last job."""

    error: str | None = None
    message: str = ""


Event = Started | Synced | Ended


class Executor(Protocol):
    """Runs batches of jobs on nodes. ``executor.RayExecutor`` does it with Ray tasks."""

    def has_room(self, node_id: str, for_experiment: bool) -> bool:
        """Whether to submit a batch now; if not, to ask again soon is better.

        Asked when the dispatcher would allow it. ``for_experiment`` tells the experiment's
        directory from trials: each waits on its own account.
        """

    def submit(self, node_id: str, jobs: Sequence[Any], budget_s: float) -> Hashable:
        """Start the jobs, one after another, in one task on that node; returns a handle.

        The task stops by itself after ``budget_s`` seconds, which may be infinite.
        """

    def ready(self, handles: Sequence[Any]) -> Collection[Any]:
        """Those of them that have something to say; never blocks."""

    def poll(self, handle: Any) -> list[Event]:
        """What has happened since the last call, in order; never blocks."""

    def kill(self, handle: Any) -> None:
        """End the task's process now, whatever it does."""

    def wait(self, handles: Sequence[Any], timeout_s: float) -> None:
        """Return when something has happened in one of them, or after the timeout."""

    def alive_nodes(self) -> set[str]:
        """The ids of the nodes that can run a task."""
