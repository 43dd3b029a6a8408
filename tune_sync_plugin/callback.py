"""SyncCallback: Tune's hooks in, sync requests out. No file is touched here.

A hook must not raise (that would end the experiment) and must not block (that would hold up every
trial). What goes wrong is logged once, kept in the report, and training goes on.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from tune_sync_plugin import runs, tune_internals
from tune_sync_plugin.config import SyncConfig, plain, resolve
from tune_sync_plugin.directories import Run, SyncJob, mark_driver_disk
from tune_sync_plugin.dispatcher import Dispatcher, Turn
from tune_sync_plugin.driver_syncer import DriverSyncer
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.errors import SyncError, code_of, describe
from tune_sync_plugin.executor import RayExecutor, cause_of
from tune_sync_plugin.gate import Gates
from tune_sync_plugin.leftovers import Leftovers
from tune_sync_plugin.report import (
    EXPERIMENT,
    ExperimentReport,
    FileFailure,
    RestoreReport,
    SyncReport,
)
from tune_sync_plugin.runs import RunFacts
from tune_sync_plugin.tasks import Attached, Restoring, attach, close_run

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)

# Failures that the last log message names; all of them are in the report.
_MOST_NAMED = 20
# What the summary may take, after everything else.
_SUMMARY_S = 10.0


def _guarded(hook: Callable[..., None]) -> Callable[..., None]:
    """Hand a hook the running experiment, and keep a bug of ours from ending it."""

    @functools.wraps(hook)
    def guarded(self: SyncCallback, **info: Any) -> None:
        experiment = self._active
        if experiment is None:
            return
        try:
            hook(self, experiment, **info)
        except SyncError:
            raise  # asked for, by strict=True
        except Exception as error:
            experiment.warn_once(
                f"{hook.__name__}: {type(error).__name__}",
                f"SyncCallback.{hook.__name__} failed, which is a bug in tune_sync_plugin. "
                "Training goes on; files may arrive late. "
                f"{type(error).__name__}: {describe(error)}",
            )
            logger.debug("SyncCallback.%s failed", hook.__name__, exc_info=True)

    return guarded


class SyncCallback(tune.Callback):
    """Syncs a Tune experiment to its storage path: incremental, non-blocking, nothing lost.

    Add it to ``RunConfig(callbacks=[...])``; it reads ``storage_path``, ``storage_filesystem`` and
    ``sync_config`` from there. It then does what ``ray.tune.SyncConfig`` promises, by remote tasks
    on the nodes where the files are, in place of Ray's own syncing.

    Args:
        sync_config: Overrides the RunConfig's; a ``SyncConfig`` or Ray's own. Default: the
            RunConfig's.

    Raises:
        ValueError: A setting makes no sense (here, or when the experiment starts).
        SyncError: At the end of the experiment, if something was not synced and
            ``SyncConfig(strict=True)``.

    Example:
        >>> from ray import tune
        >>> run_config = tune.RunConfig(
        ...     storage_path="/mnt/nfs/results",
        ...     sync_config=SyncConfig(sync_artifacts=True, sync_period=60),
        ...     callbacks=[SyncCallback()],
        ... )
    """

    def __init__(self, sync_config: tune.SyncConfig | None = None) -> None:
        self._given = None if sync_config is None else resolve(sync_config)
        self._active: _Experiment | None = None
        self._report = ExperimentReport()

    @property
    def report(self) -> ExperimentReport:
        """What has been synced so far; complete when ``Tuner.fit`` has returned."""
        return self._report

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its callbacks with the RunConfig, at any time.
        return {"_given": self._given, "_active": None, "_report": ExperimentReport()}

    def setup(self, *args: Any, **info: Any) -> None:
        """Take the experiment's syncing over from Ray."""
        self._report = ExperimentReport()
        self._active = None
        _make_log_visible()
        try:
            storage = tune_internals.Storage(tune_internals.find_controller())
            if isinstance(storage.syncer, DriverSyncer):
                logger.warning("There is more than one SyncCallback; the first does the syncing.")
                return
            given = storage.sync_config
        except Exception as error:
            self._stay_out(error)
            return
        config = self._given or resolve(given)
        try:
            experiment = _Experiment(storage, config, self._report)
            experiment.take_over(storage, self._on_everything_ended)
        except Exception as error:
            self._stay_out(error)
            return
        self._active = experiment

    @staticmethod
    def _stay_out(error: Exception) -> None:
        logger.warning(
            "SyncCallback can't take this experiment's syncing over, so Ray's own stays on "
            "(Ray %s): %s: %s",
            ray.__version__,
            type(error).__name__,
            describe(error),
        )

    @_guarded
    def on_trial_start(self, experiment: _Experiment, *, trial: Trial, **info: Any) -> None:
        """Attach to the trial before its training starts."""
        experiment.trial_started(trial)

    @_guarded
    def on_trial_result(self, experiment: _Experiment, *, trial: Trial, **info: Any) -> None:
        """Request an artifact sync, subject to ``sync_period``."""
        experiment.dispatcher.request(trial.trial_id, forced=False)

    @_guarded
    def on_checkpoint(self, experiment: _Experiment, *, trial: Trial, **info: Any) -> None:
        """Request an artifact sync that starts after the checkpoint."""
        if experiment.config.sync_artifacts_on_checkpoint:
            experiment.dispatcher.request(trial.trial_id, forced=True)

    @_guarded
    def on_trial_complete(self, experiment: _Experiment, *, trial: Trial, **info: Any) -> None:
        """Sync what the trial has left on its node; after a crash this is the rescue."""
        experiment.dispatcher.request(trial.trial_id, forced=True)

    on_trial_error = on_trial_complete
    on_trial_recover = on_trial_complete

    @_guarded
    def on_step_end(self, experiment: _Experiment, **info: Any) -> None:
        """Let the dispatcher do what is due."""
        experiment.poll()

    @_guarded
    def _on_everything_ended(self, experiment: _Experiment) -> None:
        self._active = None
        experiment.finish()


@dataclass(frozen=True)
class _Attaching:
    """An attach that is under way in a trial's actor."""

    reference: Any
    trial: Trial
    # Whether the trial was told to wait for ``gate``, and when that may open.
    gate: Any
    is_flushed: Callable[[], bool]


class _Experiment:
    """What one running experiment needs: who is attached where, and the dispatcher."""

    def __init__(
        self, storage: tune_internals.Storage, config: SyncConfig, report: ExperimentReport
    ) -> None:
        self.config = config
        self._report = report
        report.destination, report.artifacts = storage.experiment_path, config.sync_artifacts
        self._started = time.monotonic()
        self._warned: set[str] = set()
        self._attaching: dict[str, _Attaching] = {}
        self._options = config.options()
        self._resumed = storage.resumed
        self._gates = Gates()
        self._leftovers: Leftovers | None = None
        self._ending = False

        self._here = here = ray.get_runtime_context().get_node_id()
        self._run = run = Run(
            storage.filesystem,
            storage.session_subdir,
            f"driver-{here}",
            storage.experiment_path,
            tune_internals.STORAGE_MARK,
            RunFacts(uuid.uuid4().hex[:12], runs.now(), self._resumed),
        )
        mark_driver_disk(run, tune_internals.session_dir())
        self._executor = RayExecutor(run)
        self.dispatcher = Dispatcher(
            self._executor,
            self._on_report,
            period_s=config.sync_period,
            timeout_s=config.sync_timeout,
            max_syncs_per_node=config.max_syncs_per_node,
            prepare=_prepare,
        )
        self.dispatcher.add_target(EXPERIMENT, config.experiment_sync_period)
        options = SyncOptions(
            concurrency=config.max_concurrent_transfers,
            timeout_s=config.sync_timeout,
            read_back=config.verify_content,
        )
        job = SyncJob(
            EXPERIMENT,
            (storage.driver_directory,),
            storage.experiment_path,
            options,
            must_exist=True,
        )
        self.dispatcher.set_places(EXPERIMENT, {here: job})

        self._syncer = DriverSyncer(self.dispatcher, report, storage.syncer, config.sync_timeout)

    def take_over(self, storage: tune_internals.Storage, last: Callable[[], None]) -> None:
        """Put ourselves in the place of Ray's syncing."""
        storage.set_sync_config(plain(self.config))
        storage.keep_local_results()
        storage.call_last(last)
        storage.syncer = self._syncer
        if storage.resumed and self.config.sync_artifacts:
            jobs = {trial.trial_id: self._job(trial) for trial in storage.trials}
            self._leftovers = Leftovers(self._executor, self.dispatcher, jobs)

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    # -- trials ---------------------------------------------------------------------------------

    def trial_started(self, trial: Trial) -> None:
        actor = tune_internals.trial_actor(trial)
        if not self.config.sync_artifacts or actor is None:
            return
        key = trial.trial_id
        left = tuple(self.dispatcher.places(key))
        starts_again = left or self._resumed
        restoring: Restoring | None = None
        gate, is_flushed = None, _at_once
        self.dispatcher.add_target(key)
        if starts_again and self.config.restore_artifacts:
            gate, is_flushed = self._gates.promise(), self._flush(key, left)
            # Where a killed driver left it is not known yet; at worst nothing is brought back.
            left = () if self._resumed else left
            restoring = Restoring(self._job(trial), self._run, left, (gate,))
        # From now on it may be anywhere; what it left where it was is requested by this.
        self.dispatcher.set_places(key, {})
        self._forget_attaching(key)
        # Queued in the actor ahead of restore and train, so it comes before the training code.
        reference = actor.__ray_call__.remote(attach, restoring)
        self._attaching[key] = _Attaching(reference, trial, gate, is_flushed)

    def _flush(self, key: str, left: tuple[str, ...]) -> Callable[[], bool]:
        # What a trial on the driver's disk wrote to get_trial_dir() goes with the driver's files.
        with_drivers = self._resumed or self._here in left
        keys = (key, EXPERIMENT) if with_drivers else (key,)
        parts: list[Callable[[], bool]] = []

        def is_over() -> bool:
            if self._leftovers and not self._leftovers.collect():
                return False
            if not parts:
                parts.extend(map(self.dispatcher.catch_up, keys))
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
            self.warn_once(
                "attach",
                f"SyncCallback could not attach to trial {trial.trial_id}, so Ray's own artifact "
                f"sync stays on for it: {name}: {message}. Other such trials are in "
                "callback.report.not_attached.",
            )
            return
        self._report.not_attached.pop(trial.trial_id, None)
        tune_internals.end_rays_sync(trial)
        if attached.restored:
            self._restored(trial.trial_id, attached.restored)
        job = self._job(trial, attached.logdir)
        self.dispatcher.set_places(trial.trial_id, dict.fromkeys(attached.nodes, job))

    def _restored(self, key: str, report: RestoreReport) -> None:
        self._report.of(key).restored.append(report)
        for warning in report.warnings:
            self.warn_once(warning, f"SyncCallback: {warning}")
        for failure in report.failures:
            self.warn_once(
                f"restore: {failure.error}",
                f"SyncCallback: {failure}. The trial goes on without it; what storage has stays "
                "there. Others are in callback.report.not_restored.",
            )

    # -- the loop and its end -------------------------------------------------------------------

    def poll(self) -> None:
        self._syncer.step_ended()
        if self._leftovers and self._leftovers.collect():
            self._leftovers = None
        if self._attaching:
            self._collect_attached()
        self.dispatcher.poll()

    def _on_report(self, key: str, node_id: str, report: SyncReport) -> None:
        self._report.add(key, node_id, report)
        for warning in report.warnings:
            self.warn_once(warning, f"SyncCallback on node {node_id[:8]}: {warning}")
        linked = [path for path in report.skipped if path.endswith("(link to a directory)")]
        if linked:
            self.warn_once(
                "links",
                f"SyncCallback: {key}/{linked[0]} is not walked into; with "
                "SyncConfig(follow_symlinks=True) what it points to is synced.",
            )
        if self._ending:
            return  # all that is missing is about to be named
        for failure in report.failures:
            # One per cause, and not one per class, file or sync.
            self.warn_once(
                code_of(failure.message) or failure.error,
                f"SyncCallback: {failure}. Training goes on and the next sync tries again; "
                "more failures of this kind are only counted, see callback.report.failures.",
            )

    def finish(self) -> None:
        """Sync everything once more, then say what was synced and what was not."""
        self._ending = True
        broken = []
        try:
            if self._attaching:
                self._collect_attached()
            self.dispatcher.flush(self._syncer.time_left())
        except Exception as error:
            broken = [FileFailure("all trials", "", type(error).__name__, describe(error))]
        finally:
            self.dispatcher.stop()
            self._gates.close()
            self._report.duration_s = time.monotonic() - self._started
        self._write_summary()
        failures = self._report.failures + broken
        if not failures:
            logger.info("%s, in %s", self._report.summary(), self._report.destination)
        else:
            lines = "\n".join(f"  {failure}" for failure in failures[:_MOST_NAMED])
            if len(failures) > _MOST_NAMED:
                lines += f"\n  and {len(failures) - _MOST_NAMED} more: callback.report.failures"
            logger.warning("%s\nNot synced:\n%s", self._report.summary(), lines)
        if self.config.strict and (failures or self._report.not_attached):
            left_to_ray = [
                f"{t}: left to Ray: {why}" for t, why in self._report.not_attached.items()
            ]
            named = [*map(str, failures), *left_to_ray]
            raise SyncError("\n  ".join([self._report.summary(), *named]))

    def _write_summary(self) -> None:
        """Last of all, since it says that everything else has arrived."""
        if self._report.experiment.failures:
            return  # the state of the experiment itself has not
        summary = runs.summarize(self._report, self._run.facts)
        try:
            end = self._executor.call(self._here, close_run, summary, _SUMMARY_S)
            problem = self._executor.result(end, _SUMMARY_S)
        except Exception as error:
            problem = f"the summary could not be written: {type(error).__name__}: {describe(error)}"
        if problem:
            logger.warning("SyncCallback: %s", problem)


def _prepare(job: SyncJob, turn: Turn) -> SyncJob:
    options = replace(job.options, only_missing=turn.superseded)
    return replace(job, options=options, forced=turn.forced, shared=turn.shared)


def _at_once() -> bool:
    return True


def _make_log_visible() -> None:
    """Show our log lines as Ray shows its own, unless the application has set logging up."""
    package = logging.getLogger(__package__)
    if package.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s\t%(levelname)s %(name)s -- %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
