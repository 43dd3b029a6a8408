"""One running experiment: the dispatcher, what feeds it, and the account given at the end."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from tune_sync_plugin import runs, tune_internals
from tune_sync_plugin.attacher import Attacher
from tune_sync_plugin.config import SyncConfig, plain
from tune_sync_plugin.directories import Run, SyncJob, prepare_driver_disk
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.driver_syncer import DriverSyncer
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.errors import SyncError, code_of, describe
from tune_sync_plugin.executor import RayExecutor
from tune_sync_plugin.metrics import Metrics
from tune_sync_plugin.mirror.start import start_mirror
from tune_sync_plugin.preflight import Preflight, warnings_about
from tune_sync_plugin.progress import Bar, of_flush, of_mirror
from tune_sync_plugin.report import (
    EXPERIMENT,
    ExperimentReport,
    FileFailure,
    MirrorReport,
    SyncReport,
)
from tune_sync_plugin.runs import RunFacts
from tune_sync_plugin.targets import Turn
from tune_sync_plugin.tasks import close_run
from tune_sync_plugin.watching import Watching

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)

# Failures that the last log message names; all of them are in the report.
_MOST_NAMED = 20
# What the summary may take, after everything else.
_SUMMARY_S = 10.0


class Experiment:
    """One experiment from the callback's ``setup`` to its end.

    Args:
        storage: Where Tune keeps the experiment.
        config: Our settings.
        report: Is filled.

    Attributes:
        config: As given.
        dispatcher: Takes requests.
    """

    def __init__(
        self, storage: tune_internals.Storage, config: SyncConfig, report: ExperimentReport
    ) -> None:
        self.config = config
        self._report = report
        report.destination, report.artifacts = storage.experiment_path, config.sync_artifacts
        self._started = time.monotonic()
        self._warned: set[str] = set()
        self._ending = False

        self._here = here = ray.get_runtime_context().get_node_id()
        self._run = run = Run(
            storage.filesystem,
            storage.session_subdir,
            f"driver-{here}",
            storage.experiment_path,
            tune_internals.STORAGE_MARK,
            RunFacts(uuid.uuid4().hex[:12], runs.now(), storage.resumed),
        )
        copies = prepare_driver_disk(run, tune_internals.session_dir())
        self._executor = RayExecutor(run, here)
        self.dispatcher = Dispatcher(
            self._executor,
            self._on_report,
            period_s=config.sync_period,
            timeout_s=config.sync_timeout,
            max_syncs_per_node=config.max_syncs_per_node,
            prepare=_prepare,
        )
        self.dispatcher.add_target(EXPERIMENT, config.experiment_sync_period)
        self._watching = Watching(
            report,
            self.dispatcher.account,
            Metrics(os.path.basename(storage.experiment_path)),
            config.sync_period,
        )
        options = SyncOptions(
            concurrency=config.max_concurrent_transfers,
            timeout_s=config.sync_timeout,
            read_back=config.verify_content,
        )
        job = SyncJob(
            EXPERIMENT,
            (copies, storage.driver_directory),
            storage.experiment_path,
            replace(options, overlaid=True),
            must_exist=True,
        )
        self.dispatcher.set_places(EXPERIMENT, {here: job})
        self._mirror = start_mirror(storage, config, options)
        if self._mirror:
            report.mirror = MirrorReport()

        self._preflight = Preflight(self._executor)
        self._syncer = DriverSyncer(
            self.dispatcher, report, storage.syncer, copies, config.sync_timeout
        )
        self._attacher = Attacher(
            run,
            config,
            self.dispatcher,
            self._executor,
            report,
            self.warn_once,
            storage.reuses_actors,
            self._is_on,
        )

    def _is_on(self, node_id: str) -> None:
        """A trial is there: what it writes will have to be synced."""
        self._executor.expect(node_id)
        if self.config.preflight:
            self._preflight.check(node_id)

    def take_over(self, storage: tune_internals.Storage, last: Callable[[], None]) -> None:
        """Put ourselves in the place of Ray's syncing; the last step is what does it."""
        if storage.resumed and self.config.sync_artifacts:
            self._attacher.look_for_leftovers(storage.trials)
        storage.set_sync_config(plain(self.config))
        storage.keep_local_results()
        storage.call_last(last)
        storage.syncer = self._syncer

    def warn_once(self, kind: str, message: str) -> None:
        """Log a message, the first time that one of its kind comes."""
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(message)

    def trial_started(self, trial: Trial) -> None:
        """A trial's actor has been made, and has not begun to train."""
        self._heard_of(trial)
        self._attacher.trial_started(trial)

    def has_news(self, trial: Trial, *, forced: bool) -> None:
        """A trial has reported something, or ended; its artifacts are to be synced."""
        self._heard_of(trial)
        self.dispatcher.request(trial.trial_id, forced=forced)

    def has_checkpoint(self, trial: Trial, path: str) -> None:
        """A trial has reported a checkpoint, which is in storage."""
        if self._mirror:
            self._mirror.checkpoint(path)
        if self.config.sync_artifacts_on_checkpoint:
            self.has_news(trial, forced=True)

    def _heard_of(self, trial: Trial) -> None:
        if self._mirror:
            self._mirror.heard_of(trial.trial_id, tune_internals.trial_directory(trial))

    def poll(self) -> None:
        """Do what is due; called at every step of Tune's loop."""
        self._syncer.step_ended()
        self._attacher.poll()
        self.dispatcher.poll()
        self._executor.tidy()
        for node_id, finding in self._preflight.poll().items():
            for warning in warnings_about(node_id, finding, self._report.destination):
                self.warn_once(warning, warning)
        if self._mirror:
            self._mirrored(self._mirror.poll())
        self._watching.poll()

    def _mirrored(self, report: MirrorReport | None) -> None:
        if report is None:
            return
        self._report.mirror = report
        for warning in report.warnings:
            self.warn_once(warning, warning)
        if not self._ending:
            for failure in report.failures:
                self._warn_of(failure)

    def _on_report(self, key: str, node_id: str, report: SyncReport) -> None:
        self._report.add(key, node_id, report)
        self._watching.synced(node_id, report)
        if self._mirror:
            self._mirror.synced(key)
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
            self._warn_of(failure)

    def _warn_of(self, failure: FileFailure) -> None:
        after = (
            "A shorter sync_period, and checkpoints that force syncs, keep such losses small"
            if failure.lost
            else "Training goes on and the next sync tries again"
        )
        # One per cause, and not one per class, file or sync.
        self.warn_once(
            code_of(failure.message) or failure.error,
            f"SyncCallback: {failure}. {after}; more failures of this kind are only counted, "
            "see callback.report.failures.",
        )

    def finish(self) -> None:
        """Sync everything once more, then say what was synced and what was not."""
        self._ending = True
        broken = []
        try:
            timeout_s = self._syncer.time_left()
            # The rest is for the flush, which syncs what that finds out.
            waited = self._attacher.finish(timeout_s / 2)
            with Bar(of_flush) as progress:
                self.dispatcher.flush(timeout_s - waited, progress)
            self._watching.ended()
        except Exception as error:
            broken = [FileFailure("all trials", "", type(error).__name__, describe(error))]
        finally:
            self.dispatcher.stop()
            self._attacher.close()
            self._report.duration_s = time.monotonic() - self._started
        try:
            self._write_summary()
        finally:
            self._executor.close()
        if self._mirror:
            with Bar(of_mirror) as progress:
                self._mirrored(self._mirror.finish(self._syncer.time_left(), progress))
            self._mirror.close()
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
    return replace(job, options=options, forced=turn.forced, shared=job.shared or turn.shared)
