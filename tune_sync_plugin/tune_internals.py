"""Everything we touch of Ray that Ray does not promise, each with its reason, and nothing else.

If a Ray release breaks this package, it breaks here. Checked on Ray 2.44.1 and 2.60.0.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from ray import tune
    from ray.tune.experiment import Trial

# CallbackList.setup <- TuneController.setup_experiments, with room for wrappers in between.
_FRAMES_UP = 12


def session_dir() -> str:
    """Where Ray Tune keeps runs on the node this is called on; each node has its own.

    No public API tells it. The same expression as ``ray.train.constants``', whose import costs a
    new worker process more than a second.
    """
    return f"{ray._private.worker._global_node.get_session_dir_path()}/artifacts"


def cluster_address(address: str) -> tuple[str, int]:
    """Host and port of what ``ray.init(address=...)`` would connect to, ``"auto"`` too.

    ``ray.init`` itself goes on trying for many minutes where nobody listens.

    Raises:
        ConnectionError: ``"auto"``, and no cluster runs here, or several do.
        ValueError: It is no address.
    """
    found = ray._private.services.canonicalize_bootstrap_address_or_die(address)
    host, _, port = found.rpartition(":")
    return host.strip("[]"), int(port)


def find_controller() -> Any:
    """The TuneController that is calling a callback's ``setup``, from the call stack.

    Callbacks are given trials, whose storage contexts are copies; only the controller has the one
    whose ``syncer`` uploads the experiment's state.

    Raises:
        LookupError: Nothing of the kind is calling.
    """
    from ray.tune.execution.tune_controller import TuneController

    frame = sys._getframe(1)
    for _ in range(_FRAMES_UP):
        caller = frame.f_locals.get("self")
        if isinstance(caller, TuneController):
            return caller
        if frame.f_back is None:
            break
        frame = frame.f_back
    raise LookupError(
        "no TuneController is calling; use it in RunConfig(callbacks=[...]) or "
        "tune.run(callbacks=[...])"
    )


class Storage:
    """The controller's StorageContext: where the experiment goes, and who takes it there."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        self._context = controller._storage

    @property
    def filesystem(self) -> Any:
        return self._context.storage_filesystem

    @property
    def experiment_path(self) -> str:
        return str(self._context.experiment_fs_path)

    @property
    def driver_directory(self) -> str:
        """Where the driver writes the experiment's files, on its own disk.

        Not to be derived from a node's session directory: where several nodes share an IP address,
        Ray may count a driver to another node than the one whose session directory it uses.
        """
        return str(self._context.experiment_driver_staging_path)

    @property
    def session_subdir(self) -> str:
        """The run's directory below :func:`session_dir`, on every node."""
        return f"{self._context._timestamp}/{self._context.experiment_dir_name}"

    @property
    def sync_config(self) -> tune.SyncConfig:
        config: tune.SyncConfig = self._context.sync_config
        return config

    def set_sync_config(self, config: tune.SyncConfig) -> None:
        """Give Ray's own sync these settings, in trials that are there and those to come.

        A trial's context is a copy of the controller's and travels to its worker, where a class
        that is not installed would end the trial: so this must be Ray's own class.
        """
        self._context.sync_config = config
        for trial in self.trials:
            trial.storage.sync_config = config

    @property
    def trials(self) -> list[Trial]:
        """All of the experiment's trials so far."""
        return list(self._controller.get_trials())

    @property
    def reuses_actors(self) -> bool:
        """Whether Tune gives a trial's actor to the next one (``reuse_actors=True``)."""
        return bool(getattr(self._controller, "_reuse_actors", False))

    @property
    def resumed(self) -> bool:
        """Whether this run goes on with an experiment from storage (``Tuner.restore``)."""
        return bool(getattr(self._controller, "resumed", False))

    @property
    def syncer(self) -> Any:
        return self._context.syncer

    @syncer.setter
    def syncer(self, syncer: Any) -> None:
        self._context.syncer = syncer

    def call_last(self, function: Callable[[], None]) -> None:
        """Call it behind all callbacks' ``on_experiment_end``, also if one of them raises.

        Moving our callback to the end of the list would not do: one that raises ends the loop over
        them, and their saved states are told apart by their positions.
        """
        callbacks = self._controller._callbacks
        theirs = callbacks.on_experiment_end

        def on_experiment_end(**info: Any) -> None:
            try:
                theirs(**info)
            finally:
                function()

        callbacks.on_experiment_end = on_experiment_end

    def keep_local_results(self) -> None:
        """Stop Ray's loggers from replacing a restarted trial's results by older stored ones.

        When a trial restarts from a checkpoint they download its ``result.json`` and
        ``progress.csv`` over the driver's own files, so that every line since the last upload is
        gone. That is right only where the driver has not written these files in this run.
        """
        for callback in self._controller._callbacks._callbacks:
            if hasattr(callback, "_restore_from_remote") and hasattr(callback, "_trial_files"):
                callback._restore_from_remote = functools.partial(_restore_if_new, callback)


def _restore_if_new(logger: Any, file_name: str, trial: Trial) -> None:
    if trial not in logger._trial_files:
        type(logger)._restore_from_remote(logger, file_name, trial)


def trial_directory(trial: Trial) -> str:
    """The name of a trial's directory in the experiment's."""
    return str(trial.storage.trial_dir_name)


def trial_roots(trial: Trial) -> tuple[str, str]:
    """A trial's working directory, and what ``get_trial_dir()`` names, in the run's directory.

    The second lies in the driver's staging area even on nodes that are not the driver's.
    """
    name = trial.storage.trial_dir_name
    return f"working_dirs/{name}", f"driver_artifacts/{name}"


# Files of the driver's in a trial's directory, whose names a trial may not use for its own.
DRIVERS_NAMES = frozenset(
    ("error.pkl", "error.txt", "params.json", "params.pkl", "progress.csv", "result.json")
)

# How Ray names checkpoints there.
_CHECKPOINT = re.compile(r"checkpoint_\d{6}/")
# What else the driver's default callbacks and checkpointing put there.
_NO_ARTIFACTS = re.compile(r"checkpoint_[^/]*/|events\.out\.tfevents\.")


def is_rays(path: str) -> bool:
    """Whether Ray itself writes to this path in a trial's directory, so that a trial may not."""
    return path in DRIVERS_NAMES or bool(_CHECKPOINT.match(path))


def is_drivers(path: str) -> bool:
    """Whether a file in a trial's directory is, by its name, no artifact.

    For where only a listing is there to go by: it is better to leave an artifact in storage than to
    take a checkpoint for one.
    """
    return path in DRIVERS_NAMES or bool(_NO_ARTIFACTS.match(path))


# Ray leaves it in the experiment's directory to tell whether a node sees the same storage.
STORAGE_MARK = ".validate_storage_marker"


def trial_destination(trial: Trial) -> str:
    """The trial's prefix on the storage file system."""
    return str(trial.storage.trial_fs_path)


def trial_actor(trial: Trial) -> Any | None:
    """The actor that runs a trial; set before ``on_trial_start`` is called."""
    return trial.temporary_state.ray_actor


def end_rays_sync(trial: Trial) -> None:
    """Turn Ray's artifact sync off in the actors that this trial has from now on.

    With ``reuse_actors`` Ray starts some that it stops again without ever telling a callback. As it
    stops them each uploads the trial's directory on its node, however old, over what we have sent.
    """
    storage = trial.storage
    storage.sync_config = dataclasses.replace(storage.sync_config, sync_artifacts=False)


def _name_one_trial_dir(path: str) -> None:
    """Let ``get_trial_dir()`` name the same directory in a reused actor as in a fresh one.

    Ray names the working directory after a reset: a trial that goes on would find its files gone,
    and leave two of one name.
    """
    module = sys.modules.get("ray.train._internal.session")
    session = module.get_session() if module else None  # a class trainable has none
    if session is not None and getattr(session, "trial_info", None) is not None:
        session.trial_info.logdir = path


def attach(trainable: Any) -> tuple[str, list[str]]:
    """Take over a trial's artifacts; runs inside its actor, before its training code does.

    Turns Ray's artifact sync off for this trial (a function trainable's session holds the same
    context object) and makes the directory that ``get_trial_dir()`` names, which Ray makes on the
    driver's node only. Returns the trainable's ``logdir``, which Ray 2.44 puts elsewhere than the
    working directory if the driver's node has another temp_dir, and the ids of the nodes that the
    trial has a share of.
    """
    context = trainable._storage
    os.makedirs(context.trial_driver_staging_path, exist_ok=True)
    _name_one_trial_dir(context.trial_driver_staging_path)
    here = ray.get_runtime_context().get_node_id()
    nodes = {here}
    group = ray.util.get_current_placement_group()
    if group is not None and group.bundle_count > 1:
        nodes |= set(ray.util.placement_group_table(group)["bundles_to_node_id"].values())
    attached = trainable.logdir, [here, *sorted(node for node in nodes - {here} if node)]
    # Last: if anything above fails, Ray goes on syncing.
    context.sync_config = dataclasses.replace(context.sync_config, sync_artifacts=False)
    return attached
