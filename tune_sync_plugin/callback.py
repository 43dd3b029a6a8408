"""SyncCallback: Tune's hooks in, sync requests out. No file is touched here.

A hook must not raise (that would end the experiment) and must not block (that would hold up every
trial). What goes wrong is logged once, kept in the report, and training goes on.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from traceback import format_exc
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from tune_sync_plugin import tune_internals
from tune_sync_plugin.config import resolve
from tune_sync_plugin.driver_syncer import DriverSyncer
from tune_sync_plugin.errors import SyncError, describe, redact
from tune_sync_plugin.experiment import Experiment
from tune_sync_plugin.report import ExperimentReport

if TYPE_CHECKING:
    from ray.tune.experiment import Trial

logger = logging.getLogger(__name__)


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
            logger.debug("SyncCallback.%s failed: %s", hook.__name__, redact(format_exc()))

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
        SyncError: When the experiment starts, if its ``upload_dir`` can't be used. At its end, if
            something was not synced and ``SyncConfig(strict=True)``.

    Example:
        >>> from ray import tune
        >>> from tune_sync_plugin import SyncConfig
        >>> run_config = tune.RunConfig(
        ...     storage_path="/mnt/nfs/results",
        ...     sync_config=SyncConfig(sync_artifacts=True, sync_period=60),
        ...     callbacks=[SyncCallback()],
        ... )
    """

    def __init__(self, sync_config: tune.SyncConfig | None = None) -> None:
        self._given = None if sync_config is None else resolve(sync_config)
        self._active: Experiment | None = None
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
            experiment = Experiment(storage, config, self._report)
            experiment.take_over(storage, self._on_everything_ended)
        except SyncError:
            raise  # what was asked for can't be done, and training has not begun
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
    def on_trial_start(self, experiment: Experiment, *, trial: Trial, **info: Any) -> None:
        """Attach to the trial before its training starts."""
        experiment.trial_started(trial)

    @_guarded
    def on_trial_result(self, experiment: Experiment, *, trial: Trial, **info: Any) -> None:
        """Request an artifact sync, subject to ``sync_period``."""
        experiment.has_news(trial, forced=False)

    @_guarded
    def on_checkpoint(
        self, experiment: Experiment, *, trial: Trial, checkpoint: tune.Checkpoint, **info: Any
    ) -> None:
        """Request an artifact sync that starts after the checkpoint."""
        experiment.has_checkpoint(trial, checkpoint.path)

    @_guarded
    def on_trial_complete(self, experiment: Experiment, *, trial: Trial, **info: Any) -> None:
        """Sync what the trial has left on its node; after a crash this is the rescue."""
        experiment.has_news(trial, forced=True)

    on_trial_error = on_trial_complete
    on_trial_recover = on_trial_complete

    @_guarded
    def on_step_end(self, experiment: Experiment, **info: Any) -> None:
        """Let the dispatcher do what is due."""
        experiment.poll()

    @_guarded
    def _on_everything_ended(self, experiment: Experiment) -> None:
        self._active = None
        experiment.finish()


def _make_log_visible() -> None:
    """Show our log lines as Ray shows its own, unless the application has set logging up."""
    package = logging.getLogger(__package__)
    if package.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s\t%(levelname)s %(name)s -- %(message)s"))
    package.addHandler(handler)
    package.setLevel(logging.INFO)
