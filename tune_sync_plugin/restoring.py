"""Brings a trial's artifacts back to the node where it starts again, before it trains.

Runs in the trial's own actor, and there only for such trials: see ``attach.py``.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import ray

from tune_sync_plugin.directories import Directories, Run, SyncJob, this_node
from tune_sync_plugin.engine.restore import restore
from tune_sync_plugin.errors import describe
from tune_sync_plugin.progress import Bar, of_restore
from tune_sync_plugin.report import FileFailure, RestoreReport


@dataclass(frozen=True)
class Restoring:
    """How a trial that starts again gets its artifacts back.

    Attributes:
        job: The trial's sync job, with the working directory as the only root.
        run: The experiment.
        left: The ids of the nodes where the trial was earlier in this run.
        flushed: A reference that is ready when these hold nothing unsynced any more. In a tuple,
            so that one that fails does not fail the attach.
        is_seen: Whether the driver can show how far it is.
    """

    job: SyncJob
    run: Run
    left: tuple[str, ...] = ()
    flushed: tuple[Any, ...] = ()
    is_seen: bool = False


def bring_back(restoring: Restoring) -> RestoreReport | None:
    """Restore what this node lacks; ``None`` if it has it all. Raises nothing but bugs."""
    job, run = restoring.job, restoring.run
    try:
        here, node = this_node(run)
        place = Directories(job, run, here, node, in_training=True)
        if set(restoring.left) == {node} and os.path.exists(place.manifest):
            return None  # it is as the trial left it
        started = time.monotonic()
        unflushed: tuple[str, ...] = ()
        if restoring.flushed:
            timeout_s = job.options.timeout_s
            flushed, _ = ray.wait(list(restoring.flushed), timeout=timeout_s, fetch_local=False)
            if not flushed:
                unflushed = (
                    f"trial {job.key} did not wait any longer than sync_timeout={timeout_s:g} s "
                    "for the last files from the node it was on",
                )
        # Something is left in any case: what held the flush up need not hold this up.
        left_s = max(job.options.timeout_s - (time.monotonic() - started), 10.0)
        # Where the run is ours from its start, no index means that nothing was sent.
        options = place.restoring(left_s, without_index=run.facts.resumed)
        with Bar(of_restore(job.key) if restoring.is_seen else None) as progress:
            report = restore(
                place.to_restore(),
                place.storage,
                place.manifest,
                options,
                label=job.key,
                progress=progress,
            )
        return replace(report, warnings=(*unflushed, *report.warnings))
    except Exception as error:
        message = f"restoring from {job.destination} failed: {describe(error)}"
        failure = FileFailure(job.key, "", type(error).__name__, message)
        return RestoreReport(failures=(failure,))
