"""A driver to be killed, and one that goes on: ``python -m tests.support.resumable '{...}'``.

The argument is JSON, see :class:`Settings`. A trial's steps are the same in every run, so that an
interrupted and a whole experiment can be compared; ``hold`` stops them where the kill is to come.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tests.support.cluster import connect
from tests.support.restarts import (
    TRIAL_CPUS,
    move_away_when_this_ends,
    note_start,
    report_step,
    start_step,
)
from tune_sync_plugin import SyncCallback, SyncConfig

STEPS, HOLD_AT = 8, 4


@dataclass(frozen=True)
class Settings:
    """What the driver is told.

    Attributes:
        storage_path: As Tune takes it.
        trainable: "function" or "class".
        hold: While this file exists, trials stand still after step ``HOLD_AT``; once
            it contains "late", they write a bit more there, after what was synced.
        restore: Whether to go on with what is there.
        temp_dir: Of a cluster of its own, which ends with the driver.
        address: Of a cluster to join instead.
        trials: How many.
        moves: Whether the trial's node is blocked before it holds.
        sync: Of the SyncConfig.
        by_ray: Whether Ray's own sync is used, without our callback. A restored experiment that had
            no callback gets one.
    """

    storage_path: str
    trainable: str = "function"
    hold: str = "/nonexistent"
    restore: bool = False
    temp_dir: str = ""
    address: str = ""
    trials: int = 2
    moves: bool = False
    sync: dict[str, Any] = dataclasses.field(default_factory=lambda: {"sync_period": 1})
    by_ray: bool = False


def _write(config: dict[str, Any], step: int) -> None:
    for log in ("log.txt", Path(tune.get_context().get_trial_dir(), "log2.txt")):
        with open(log, "a") as out:
            out.write(f"{config['x']}:{step}\n")
    Path(f"model_{step}.bin").write_bytes(f"{config['x']}:{step}".encode() * 1000)


def _hold(config: dict[str, Any]) -> None:
    if config["moves"] and Path(config["hold"]).exists():
        move_away_when_this_ends()
    late = False
    while Path(config["hold"]).exists():
        time.sleep(0.05)
        if not late and Path(config["hold"]).read_text() == "late":
            late = True
            with open("log.txt", "a") as out:
                out.write(f"{config['x']}:late\n")
            Path("late.bin").write_bytes(b"l" * 1000)


def train_steps(config: dict[str, Any]) -> None:
    start = start_step()
    note_start(start)
    for step in range(start, STEPS):
        _write(config, step)
        report_step(step, score=config["x"] * step)
        if step == HOLD_AT:
            _hold(config)


class Steps(tune.Trainable):
    """The same as a class. What ``setup`` writes is there before any artifact is brought back."""

    def setup(self, config: dict[str, Any]) -> None:
        Path("setup.txt").write_text(uuid.uuid4().hex)
        Path("same.txt").write_text("set up")

    def step(self) -> dict[str, Any]:
        step = self.iteration
        if step == HOLD_AT + 1:
            _hold(self.config)
        if not list(Path().glob("attempt_at_*.txt")) or step == HOLD_AT + 1:
            note_start(step)
        with open("log.txt", "a") as out:
            out.write(f"{self.config['x']}:{step}\n")
        Path(f"model_{step}.bin").write_bytes(f"{self.config['x']}:{step}".encode() * 1000)
        return {"step": step, "score": self.config["x"] * step, "done": step == STEPS - 1}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "state").write_text(str(self.iteration))

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass


def main(settings: Settings) -> None:
    """Run or restore the experiment, and print a line of JSON about it."""
    if settings.address:
        connect(settings.address, log_to_driver=False)
    else:
        ray.init(
            "local",
            num_cpus=settings.trials,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=settings.temp_dir,
        )
    is_class = settings.trainable == "class"
    trainable: Any = Steps if is_class else train_steps
    if settings.address:
        trainable = tune.with_resources(trainable, {"CPU": TRIAL_CPUS})
    if settings.restore:
        # The storage's URL has a query behind the path.
        path, query, options = settings.storage_path.partition("?")
        tuner = tune.Tuner.restore(f"{path}/exp{query}{options}", trainable=trainable)
        config = tuner._local_tuner.get_run_config()  # there is no public way
        config.callbacks = config.callbacks or [SyncCallback()]
    else:
        config_class = tune.SyncConfig if settings.by_ray else SyncConfig
        tuner = tune.Tuner(
            trainable,
            param_space={
                "x": tune.grid_search(list(range(1, settings.trials + 1))),
                "hold": settings.hold,
                "moves": settings.moves,
            },
            run_config=tune.RunConfig(
                name="exp",
                storage_path=settings.storage_path,
                sync_config=config_class(sync_artifacts=True, **settings.sync),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1 if is_class else 0),
                callbacks=[] if settings.by_ray else [SyncCallback()],
                verbose=0,
            ),
        )
    results = tuner.fit()
    report = callback_of(tuner).report
    print(
        "REPORT",
        json.dumps(
            {
                "errors": [str(error) for error in results.errors],
                "metrics": sorted((r.metrics["step"], r.metrics["score"]) for r in results),
                "failures": [str(failure) for failure in report.failures],
                "not_restored": [str(failure) for failure in report.not_restored],
                "files_restored": report.files_restored,
            }
        ),
        flush=True,
    )


def callback_of(tuner: tune.Tuner) -> SyncCallback:
    """The callback that a restored Tuner has unpickled."""
    (callback,) = (
        callback
        for callback in tuner._local_tuner.get_run_config().callbacks
        if isinstance(callback, SyncCallback)
    )
    return callback


if __name__ == "__main__":
    # As itself, and not as __main__, so that what is pickled here can be unpickled elsewhere.
    from tests.support import resumable  # noqa: PLW0406

    resumable.main(resumable.Settings(**json.loads(sys.argv[1])))
