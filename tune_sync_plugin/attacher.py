"""Attaches to trials as they start: from then on their artifacts are ours to sync and to restore.

Attaching happens in the trial's own actor, before its training code runs. Here is decided what it
is told, and taken in what it found out. Nothing here waits but the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray

from tune_sync_plugin import tune_internals
from tune_sync_plugin.attach import Attached, attach
from tune_sync_plugin.config import SyncConfig
from tune_sync_plugin.directories import Run, SyncJob
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.errors import describe
from tune_sync_plugin.executor import RayExecutor, cause_of
from tune_sync_plugin.gate import Gates
from tune_sync_plugin.leftovers import Leftovers
from tune_sync_plugin.progress import is_seen
from tune_sync_plugin.report import EXPERIMENT, ExperimentReport, RestoreReport
from tune_sync_plugin.restoring import Restoring

if TYPE_CHECKING:
    from ray.tune.experiment import Trial


@dataclass(frozen=True)
class _Attaching:
    """An attach that is under way in a trial's actor."""

    reference: Any
    trial: Trial
    # Whether the trial was told to wait for ``gate``, and when that may open.
    gate: Any
    is_flushed: Callable[[], bool]


class Attacher:
    """Knows which trial is attached where, and tells the dispatcher.

    Args:
        run: The experiment, as tasks know it.
        config: Our settings.
        dispatcher: Is told where trials are.
        executor: Runs what a restored experiment has to find out first.
        report: Gets what restores did, and who could not be attached to.
        warn_once: Logs a message of a kind, the first time.
        reuses_actors: Whether Tune does.
        is_on: Told of each node that a trial has come to.
    """

    def __init__(
        self,
        run: Run,
        config: SyncConfig,
        dispatcher: Dispatcher,
        executor: RayExecutor,
        report: ExperimentReport,
        warn_once: Callable[[str, str], None],
        reuses_actors: bool,
        is_on: Callable[[str], None],
    ) -> None:
        self._run = run
        self._config = config
        self._dispatcher = dispatcher
        self._executor = executor
        self._report = report
        self._warn_once = warn_once
        self._reuses_actors = reuses_actors
        self._is_on = is_on
        self._options = config.options()
        self._resumed = run.facts.resumed
        self._here = ray.get_runtime_context().get_node_id()
        self._attaching: dict[str, _Attaching] = {}
        self._gates = Gates()
        self._leftovers: Leftovers | None = None
        self._drivers_sync: Callable[[], bool] = _at_once

    def look_for_leftovers(self, trials: list[Trial]) -> None:
        """Sync first what an earlier run of the experiment has left on this cluster's nodes."""
        # Any of them may have been on several nodes: it is not known which was the last.
        jobs = {trial.trial_id: replace(self._job(trial), shared=True) for trial in trials}
        # Once for all of them, what trials on the driver's disk wrote to get_trial_dir().
        self._drivers_sync = self._dispatcher.catch_up(EXPERIMENT)
        self._leftovers = Leftovers(self._executor, self._dispatcher, jobs)

    def trial_started(self, trial: Trial) -> None:
        """Attach to a trial whose actor has just been made."""
        actor = tune_internals.trial_actor(trial)
        if not self._config.sync_artifacts or actor is None:
            return
        key = trial.trial_id
        if key in self._attaching:
            self._collect_attached()  # where it has been since the last step is not to be missed
        left = tuple(self._dispatcher.places(key))
        starts_again = left or self._resumed
        restoring: Restoring | None = None
        gate, is_flushed = None, _at_once
        self._dispatcher.add_target(key)
        if starts_again and self._config.restore_artifacts:
            gate, is_flushed = self._gates.promise(), self._flush(key, left)
            # Where a killed driver left it is not known yet; at worst nothing is brought back.
            left = () if self._resumed else left
            restoring = Restoring(self._job(trial), self._run, left, (gate,), is_seen())
        # From now on it may be anywhere; what it left where it was is requested by this.
        self._dispatcher.set_places(key, {})
        self._forget_attaching(key)
        # Queued in the actor ahead of restore and train, so it comes before the training code.
        reference = actor.__ray_call__.remote(attach, restoring)
        self._attaching[key] = _Attaching(reference, trial, gate, is_flushed)

    def _flush(self, key: str, left: tuple[str, ...]) -> Callable[[], bool]:
        # What a trial on the driver's disk wrote to get_trial_dir() goes with the driver's files.
        keys = (key, EXPERIMENT) if self._here in left else (key,)
        parts: list[Callable[[], bool]] = []

        def is_over() -> bool:
            if self._leftovers and not self._leftovers.collect():
                return False
            if not self._drivers_sync():
                return False
            if not parts:
                parts.extend(map(self._dispatcher.catch_up, keys))
            return all(part() for part in parts)

        is_over()
        return is_over

    def _job(self, trial: Trial, *more_roots: str) -> SyncJob:
        working_dir, trial_dir = tune_internals.trial_roots(trial)
        return SyncJob(
            trial.trial_id,
            (working_dir, *more_roots),
            tune_internals.trial_destination(trial),
            self._options,
            drivers_root=trial_dir,
        )

    def poll(self) -> None:
        """Take in what has ended."""
        if self._leftovers and self._leftovers.collect():
            self._leftovers = None
        if self._attaching:
            self._collect_attached()

    def finish(self, timeout_s: float) -> float:
        """Take in all there is: a run may be over before it knows what the last one left.

        Returns the seconds that it waited for that, at most ``timeout_s``.
        """
        waited = self._leftovers.wait(timeout_s) if self._leftovers else 0.0
        self.poll()
        return waited

    def close(self) -> None:
        """Let go of whoever still waits."""
        self._gates.close()

    def _collect_attached(self) -> None:
        for key, attaching in list(self._attaching.items()):
            if attaching.gate and attaching.is_flushed():
                self._gates.open(attaching.gate)
                self._attaching[key] = replace(attaching, gate=None)
        references = [attaching.reference for attaching in self._attaching.values()]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        if not ready:
            return
        for key, attaching in list(self._attaching.items()):
            if attaching.reference in ready:
                self._forget_attaching(key)
                self._attached(attaching.trial, attaching.reference)

    def _forget_attaching(self, key: str) -> None:
        attaching = self._attaching.pop(key, None)
        if attaching and attaching.gate:
            self._gates.open(attaching.gate)  # nobody waits there any more

    def _attached(self, trial: Trial, reference: Any) -> None:
        try:
            attached: Attached = ray.get(reference)
        except ray.exceptions.RayActorError as error:
            # It died before its training began. If Tune restarts it, we attach anew.
            self._report.not_attached[trial.trial_id] = f"it ended at once: {describe(error)}"
            return
        except Exception as error:
            name, message = cause_of(error)
            self._report.not_attached[trial.trial_id] = message
            self._warn_once(
                "attach",
                f"SyncCallback could not attach to trial {trial.trial_id}, so Ray's own artifact "
                f"sync stays on for it: {name}: {message}. Other such trials are in "
                "callback.report.not_attached.",
            )
            return
        self._report.not_attached.pop(trial.trial_id, None)
        if self._reuses_actors:
            tune_internals.end_rays_sync(trial)
        if attached.restored:
            self._restored(trial.trial_id, attached.restored)
        job = self._job(trial, attached.logdir)
        self._dispatcher.set_places(trial.trial_id, dict.fromkeys(attached.nodes, job))
        for node_id in attached.nodes:
            self._is_on(node_id)

    def _restored(self, key: str, report: RestoreReport) -> None:
        self._report.of(key).restored.append(report)
        for warning in report.warnings:
            self._warn_once(warning, f"SyncCallback: {warning}")
        for failure in report.failures:
            self._warn_once(
                f"restore: {failure.error}",
                f"SyncCallback: {failure}. The trial goes on without it; what storage has stays "
                "there. Others are in callback.report.not_restored.",
            )


def _at_once() -> bool:
    return True
