"""Every way of running Tune that the callback claims to work with, on a real cluster."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.dirfs
import pyarrow.fs
import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.restarts import TRIAL_CPUS, move_away_when_this_ends, remove_blockers
from tests.support.scenarios import report
from tune_sync_plugin import SyncCallback, SyncConfig, SyncError
from tune_sync_plugin.dispatcher import Dispatcher

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


def train(config: dict[str, Any]) -> None:
    """Appends to a log, checkpoints each step, resumes from its checkpoint."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    for step in range(start, config.get("steps", 3)):
        with open("log.txt", "a") as log:
            log.write(f"{config.get('x', 0)}:{step}\n")
        if step == config.get("fails_at", -1):
            raise RuntimeError("as asked")
        time.sleep(config.get("sleep_s", 0))
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            tune.report(
                {"step": step, "score": config.get("x", 0) * step},
                checkpoint=tune.Checkpoint.from_directory(directory),
            )


class Trainable(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self.x = config["x"]

    def step(self) -> dict[str, Any]:
        with open(f"log_{self.x}.txt", "a") as log:
            log.write(f"{self.x}:{self.iteration}\n")
        return {"score": self.x, "done": self.iteration == 2}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "x").write_text(str(self.x))

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.x = new_config["x"]
        return True

    def cleanup(self) -> None:
        Path(f"cleaned_{self.x}.txt").write_text("written when the trial was over")


def run_config(storage: Path, callback: SyncCallback, **options: Any) -> tune.RunConfig:
    options.setdefault("sync_config", SyncConfig(sync_artifacts=True, sync_period=1))
    return tune.RunConfig(
        name="exp", storage_path=str(storage), callbacks=[callback], verbose=0, **options
    )


def logs(storage: Path) -> dict[str, list[str]]:
    """The lines of each stored log, by the trial directory's name."""
    return {
        path.parent.name: path.read_text().splitlines()
        for path in sorted(storage.glob("exp/*/log*.txt"))
    }


def xs(lines: dict[str, list[str]]) -> dict[int, list[int]]:
    """The logs' steps by the trial's x, which stands in front of each line."""
    return {
        int(log[0].split(":")[0]): [int(line.split(":")[1]) for line in log]
        for log in lines.values()
    }


def test_tune_run(storage: Path) -> None:
    callback = SyncCallback()
    analysis = tune.run(
        train,
        config={"x": tune.grid_search([1, 2])},
        name="exp",
        storage_path=str(storage),
        sync_config=SyncConfig(sync_artifacts=True),
        callbacks=[callback],
        verbose=0,
    )
    assert len(analysis.trials) == 2
    assert xs(logs(storage)) == {1: [0, 1, 2], 2: [0, 1, 2]}
    assert not callback.report.failures


@pytest.mark.parametrize("reuse_actors", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_class_trainables_and_reused_actors(storage: Path, reuse_actors: bool) -> None:
    callback = SyncCallback()
    checkpoints = tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=1)
    results = tune.Tuner(
        Trainable,
        param_space={"x": tune.grid_search(list(range(6)))},
        tune_config=tune.TuneConfig(reuse_actors=reuse_actors, max_concurrent_trials=2),
        run_config=run_config(storage, callback, checkpoint_config=checkpoints),
    ).fit()
    assert not results.errors
    found = {path.parent.name: path.name for path in storage.glob("exp/*/log_*.txt")}
    assert sorted(found.values()) == [f"log_{x}.txt" for x in range(6)]
    assert len(found) == 6, "each trial's log in its own directory, and no other's"
    for path in storage.glob("exp/*/log_*.txt"):
        x = path.name[4:-4]
        assert path.read_text() == f"{x}:0\n{x}:1\n{x}:2\n"
    if not reuse_actors:
        # Written after on_trial_complete, when Tune has long looked away.
        assert len(list(storage.glob("exp/*/cleaned_*.txt"))) == 6
    assert len(callback.report.trials) == 6
    assert not callback.report.failures


def test_function_trainables_with_reused_actors(storage: Path) -> None:
    callback = SyncCallback()
    tune.Tuner(
        train,
        param_space={"x": tune.grid_search(list(range(6)))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2),
        run_config=run_config(storage, callback),
    ).fit()
    assert xs(logs(storage)) == {x: [0, 1, 2] for x in range(6)}


def test_asha(storage: Path) -> None:
    callback = SyncCallback()
    tune.Tuner(
        train,
        param_space={"x": tune.grid_search(list(range(6))), "steps": 8},
        tune_config=tune.TuneConfig(
            scheduler=ASHAScheduler(metric="score", mode="max", max_t=8, grace_period=2)
        ),
        run_config=run_config(storage, callback),
    ).fit()
    steps = xs(logs(storage))
    assert len(steps) == 6
    assert all(len(log) >= 2 for log in steps.values())
    assert max(len(log) for log in steps.values()) >= 8
    assert not callback.report.failures


@pytest.mark.timeout(400)
@pytest.mark.parametrize("reuse_actors", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_pbt_mixes_nothing_up(
    cluster: LocalCluster, storage: Path, reuse_actors: bool, figure: Callable[..., None]
) -> None:
    """Trials pause, go on elsewhere and from each other's checkpoints; their logs stay theirs."""
    callback = SyncCallback()
    iterations = 14 if reuse_actors else 8  # where each pause costs the start of four processes
    scheduler = PopulationBasedTraining(
        metric="score",
        mode="max",
        time_attr="training_iteration",
        perturbation_interval=2,
        hyperparam_mutations={"rate": tune.uniform(0, 1)},
        quantile_fraction=0.5,
        synch=True,
    )
    results = tune.Tuner(
        # One at a time on each node, so that both have some, and a node can be blocked.
        tune.with_resources(_train_pbt, {"CPU": TRIAL_CPUS}),
        param_space={
            "x": tune.grid_search([1, 2, 3, 4]),
            "rate": 0.5,
            "moves_at": [] if reuse_actors else [3],  # reused actors stay where they are
        },
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=reuse_actors),
        run_config=run_config(
            storage,
            callback,
            stop={"training_iteration": iterations},
            # Neither a period nor a checkpoint brings a line in time: only the flush before a move.
            sync_config=SyncConfig(
                sync_artifacts=True, sync_period=300, sync_artifacts_on_checkpoint=False
            ),
        ),
    ).fit()
    remove_blockers(cluster.node_ids)
    assert not results.errors
    assert scheduler._num_perturbations >= iterations // 3
    assert len(callback.report.trials) == 4
    moved = written = stored = 0
    for trial_id in callback.report.trials:
        (directory,) = (path for path in storage.glob(f"exp/*{trial_id}*") if path.is_dir())
        assert {path.name for path in directory.glob("*of_*.txt")} == {
            f"of_{trial_id}.txt",
            f"log2_of_{trial_id}.txt",
        }
        # Each line was reported with its result: the driver knows what must be there, in order.
        rows = [json.loads(row) for row in (directory / "result.json").read_text().splitlines()]
        reported = [row["line"] for row in rows]
        assert len(reported) >= iterations - 4
        assert all(line.split()[0] == trial_id for line in reported)
        for log in (f"of_{trial_id}.txt", f"log2_of_{trial_id}.txt"):
            lines = (directory / log).read_text().splitlines()
            assert lines == reported
        moved += len({line.split()[1] for line in reported}) > 1
        written += sum(len(line) + 1 for line in reported)
        stored += (directory / f"of_{trial_id}.txt").stat().st_size
    if not reuse_actors:  # else it is up to which of its idle actors Ray takes; often some do
        assert moved, "no trial has changed nodes, so this proves nothing"
    assert not callback.report.failures
    assert not callback.report.not_restored
    figure(
        f"PBT, reuse_actors={reuse_actors}",
        written=written,
        stored=stored,
        more=f"{scheduler._num_perturbations} perturbations, {moved} of 4 trials moved",
    )


def _train_pbt(config: dict[str, Any]) -> None:
    trial_id = tune.get_context().get_trial_id()
    node = ray.get_runtime_context().get_node_id()[:8]
    trial_dir = Path(tune.get_context().get_trial_dir())
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    for step in itertools.count(start):
        line = f"{trial_id} {node} {step} {uuid.uuid4().hex}"
        for log in (Path(f"of_{trial_id}.txt"), trial_dir / f"log2_of_{trial_id}.txt"):
            with log.open("a") as out:
                out.write(f"{line}\n")
        if step in config["moves_at"] and trial_id.endswith("_00000"):
            move_away_when_this_ends()
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            tune.report(
                {"line": line, "score": config["x"] + config["rate"] * step},
                checkpoint=tune.Checkpoint.from_directory(directory),
            )


def test_errors_and_retries(storage: Path, tmp_path: Path) -> None:
    callback = SyncCallback()
    results = tune.Tuner(
        train,
        param_space={"x": tune.grid_search([1, 2]), "fails_at": 1},
        run_config=run_config(storage, callback, failure_config=tune.FailureConfig(max_failures=1)),
    ).fit()
    assert len(results.errors) == 2
    # What was written right before the crash is there, from both attempts.
    assert all(1 in log for log in xs(logs(storage)).values())
    assert not callback.report.failures


def test_results_survive_a_restart(storage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's loggers fetch the stored, older result.json over the driver's own on a restart."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")
    callback = SyncCallback()
    results = tune.Tuner(
        _train_fails_once,
        param_space={"flag": str(storage / "failed"), "fails_at": 11, "steps": 12, "sleep_s": 0.3},
        run_config=run_config(
            storage,
            callback,
            sync_config=SyncConfig(sync_period=2),
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()
    assert not results.errors
    (path,) = storage.glob("exp/*/result.json")
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == list(range(12))
    (path,) = storage.glob("exp/*/progress.csv")
    assert len(path.read_text().splitlines()) == 13


def _train_fails_once(config: dict[str, Any]) -> None:
    flag = Path(f"{config['flag']}_{tune.get_context().get_trial_id()}")
    again = flag.exists()
    flag.touch()
    train({**config, "fails_at": -1 if again else config["fails_at"]})


@pytest.mark.parametrize("fail_fast", [True, pytest.param("raise", marks=pytest.mark.exhaustive)])
def test_fail_fast(storage: Path, fail_fast: bool | str) -> None:
    callback = SyncCallback()
    tuner = tune.Tuner(
        train,
        param_space={"x": tune.grid_search([1, 2]), "fails_at": 1},
        run_config=run_config(
            storage, callback, failure_config=tune.FailureConfig(fail_fast=fail_fast)
        ),
    )
    if fail_fast == "raise":
        with pytest.raises(Exception, match="as asked"):
            tuner.fit()
    else:
        tuner.fit()
    assert any(1 in log for log in xs(logs(storage)).values())
    assert "synced" in callback.report.summary()
    assert callback.report.duration_s > 0


def test_restore(storage: Path) -> None:
    callback = SyncCallback()
    tune.Tuner(
        _train_fails_once,
        param_space={
            "x": tune.grid_search([1, 2]),
            "flag": str(storage / "failed"),
            "fails_at": 1,
            "steps": 4,
        },
        run_config=run_config(storage, callback),
    ).fit()
    assert {x: len(log) for x, log in xs(logs(storage)).items()} == {1: 2, 2: 2}
    restored = tune.Tuner.restore(
        str(storage / "exp"), trainable=_train_fails_once, resume_errored=True
    )
    results = restored.fit()
    assert not results.errors
    assert {result.metrics["step"] for result in results} == {3}
    # Whether a trial went on where it had been or on another node: its new lines are there.
    assert all(log[-3:] == [1, 2, 3] for log in xs(logs(storage)).values())


def test_settings_of_the_callback_win(storage: Path) -> None:
    callback = SyncCallback(SyncConfig(sync_artifacts=True, exclude=["**/*.tmp"]))
    tune.Tuner(
        _train_tmp,
        run_config=run_config(storage, callback, sync_config=tune.SyncConfig()),
    ).fit()
    assert {p.name for p in storage.glob("exp/*/*.t??")} == {"kept.txt"}


def _train_tmp(config: dict[str, Any]) -> None:
    Path("kept.txt").write_text("1")
    Path("left.tmp").write_text("1")
    report({"step": 0})


def test_a_plain_ray_config_works_and_artifacts_are_off_by_default(storage: Path) -> None:
    on, off = SyncCallback(), SyncCallback()
    tune.Tuner(
        train,
        run_config=run_config(storage, on, sync_config=tune.SyncConfig(sync_artifacts=True)),
    ).fit()
    assert len(logs(storage)) == 1
    other = storage / "other"
    tune.Tuner(train, run_config=run_config(other, off, sync_config=tune.SyncConfig())).fit()
    assert logs(other) == {}
    assert off.report.trials == {}
    assert list(other.glob("exp/*/result.json"))


@pytest.mark.parametrize(
    "kind",
    [
        "fsspec",
        pytest.param("subtree", marks=pytest.mark.exhaustive),
        pytest.param("dirfs", marks=pytest.mark.exhaustive),
    ],
)
def test_any_file_system(storage: Path, kind: str) -> None:
    local = fsspec.filesystem("file")
    path = str(storage)
    if kind == "fsspec":
        filesystem: Any = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(local))
    elif kind == "subtree":
        filesystem, path = pyarrow.fs.SubTreeFileSystem(path, pyarrow.fs.LocalFileSystem()), "below"
    else:
        dirfs = fsspec.implementations.dirfs.DirFileSystem(path, local)
        filesystem, path = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(dirfs)), "below"
    callback = SyncCallback()
    results = tune.Tuner(
        train,
        run_config=tune.RunConfig(
            name="exp",
            storage_path=path,
            storage_filesystem=filesystem,
            sync_config=SyncConfig(sync_artifacts=True),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    assert not callback.report.failures
    below = storage if kind == "fsspec" else storage / "below"
    assert xs(logs(below)) == {0: [0, 1, 2]}


def test_trials_that_span_nodes(storage: Path, cluster: LocalCluster) -> None:
    """As Ray Train inside Tune: the trial's workers write to the same directory elsewhere."""
    callback = SyncCallback()
    bundles = [{"CPU": 1}, {"CPU": 1}]
    tune.Tuner(
        tune.with_resources(
            _train_spread, tune.PlacementGroupFactory(bundles, strategy="STRICT_SPREAD")
        ),
        run_config=run_config(storage, callback),
    ).fit()
    names = {path.name for path in storage.glob("exp/*/*.rank")}
    assert names == {"0.rank", "1.rank"}
    (trial,) = callback.report.trials.values()
    assert trial.last_by_node.keys() == set(cluster.node_ids[:2])


def _train_spread(config: dict[str, Any]) -> None:
    Path("0.rank").write_text("0")
    trial = Path.cwd().name
    run = Path.cwd().parent.parent
    session = ray._private.worker._global_node.get_session_dir_path()
    below = run.relative_to(session)

    @ray.remote(num_cpus=1)
    def other() -> None:
        here = ray._private.worker._global_node.get_session_dir_path()
        directory = Path(here, below, "working_dirs", trial)
        directory.mkdir(parents=True)
        (directory / "1.rank").write_text("1")

    ray.get(other.remote())
    report({"step": 0})


def test_files_of_other_callbacks_at_the_end_arrive(storage: Path) -> None:
    callback = SyncCallback()
    config = run_config(storage, callback)
    config.callbacks.append(_WritesLate())
    tune.Tuner(train, run_config=config).fit()
    assert (storage / "exp" / "late.txt").read_text() == "written in on_experiment_end"


class _WritesLate(tune.Callback):
    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        staging = trials[0].storage.experiment_driver_staging_path
        Path(staging, "late.txt").write_text("written in on_experiment_end")


class _RaisesAtTheEnd(tune.Callback):
    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        raise RuntimeError("another callback's bug")


def test_another_callback_that_raises_at_the_end_costs_no_file(storage: Path) -> None:
    callback = SyncCallback()
    config = run_config(storage, callback)
    config.callbacks.append(_RaisesAtTheEnd())
    with pytest.raises(RuntimeError, match="another callback's bug"):
        tune.Tuner(Trainable, param_space={"x": 1}, run_config=config).fit()
    # Written after on_trial_complete, so that only the final flush can have brought it.
    assert len(list(storage.glob("exp/*/cleaned_1.txt"))) == 1
    assert callback.report.duration_s > 0


def test_a_trial_may_not_replace_the_drivers_files(storage: Path) -> None:
    callback = SyncCallback()
    results = tune.Tuner(_train_in_rays_names, run_config=run_config(storage, callback)).fit()
    (path,) = storage.glob("exp/*/result.json")
    assert len(path.read_text().splitlines()) == 3
    assert len(results[0].metrics_dataframe) == 3
    assert {f.path for f in callback.report.failures} == {"result.json", "params.json"}
    assert all("rename yours" in f.message for f in callback.report.failures)
    assert list(storage.glob("exp/*/mine.txt"))


def _train_in_rays_names(config: dict[str, Any]) -> None:
    for step in range(3):
        report({"step": step})
    for name in ("result.json", "params.json", "mine.txt"):
        Path(name).write_text("{}")


def test_strict_raises_if_the_flush_itself_fails(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ConnectionError("the cluster is gone")

    callback = SyncCallback(SyncConfig(sync_artifacts=True, strict=True))
    config = run_config(storage, callback)
    monkeypatch.setattr(Dispatcher, "flush", broken)
    with pytest.raises(SyncError, match="the cluster is gone"):
        tune.Tuner(train, run_config=config).fit()


def test_strict_raises_at_the_end_and_only_then(storage: Path) -> None:
    callback = SyncCallback(SyncConfig(sync_artifacts=True, strict=True))
    with pytest.raises(SyncError, match=r"bad\\xff"):
        tune.Tuner(_train_bad_name, run_config=run_config(storage, callback)).fit()
    assert list(storage.glob("exp/*/good.txt"))
    assert [f.path for f in callback.report.failures] == ["bad\\xff"]


def _train_bad_name(config: dict[str, Any]) -> None:
    Path("good.txt").write_text("1")
    with open(b"bad\xff", "w") as out:
        out.write("1")
    report({"step": 0}, checkpoint=True)


def _train_bad_name_for_a_while(config: dict[str, Any]) -> None:
    _train_bad_name(config)
    while not list(Path(config["storage"]).glob("exp/*/good.txt")):
        time.sleep(0.05)
    time.sleep(1)  # until the driver has heard of it: what it hears at the end goes to the summary


def test_without_strict_it_is_only_said(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = SyncCallback()
    config, space = run_config(storage, callback), {"storage": str(storage)}
    tune.Tuner(_train_bad_name_for_a_while, param_space=space, run_config=config).fit()
    warnings = [r.message for r in caplog.records if r.name.startswith("tune_sync_plugin")]
    assert sum("bad\\xff" in message for message in warnings) == 2, "once, and in the summary"
    assert "1 failed" in warnings[-1]


def test_one_callback_serves_several_runs(storage: Path) -> None:
    callback = SyncCallback()
    for name in ("one", "two"):
        tune.Tuner(train, run_config=run_config(storage / name, callback)).fit()
        assert len(callback.report.trials) == 1
        assert xs(logs(storage / name)) == {0: [0, 1, 2]}


def test_two_callbacks_do_the_work_once(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = SyncCallback(), SyncCallback()
    config = run_config(storage, first)
    config.callbacks.append(second)
    tune.Tuner(train, run_config=config).fit()
    assert "more than one SyncCallback" in caplog.text
    assert len(first.report.trials) == 1
    assert second.report.trials == {}


def test_one_interrupt_ends_gracefully_and_flushes(
    storage: Path, figure: Callable[..., None]
) -> None:
    script = textwrap.dedent(
        f"""
        import json, os, ray
        from ray import tune
        from tests.test_tune_modes import run_config, train
        from pathlib import Path
        from tune_sync_plugin import SyncCallback, SyncConfig

        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        callback = SyncCallback()
        config = run_config(
            Path({str(storage)!r}), callback,
            sync_config=SyncConfig(sync_artifacts=True, sync_period=300,
                                   sync_artifacts_on_checkpoint=False),
        )
        tune.Tuner(
            train, param_space={{"steps": 1000, "sleep_s": 0.2}}, run_config=config
        ).fit()
        disk = Path(ray._private.worker._global_node.get_session_dir_path())
        (log,) = disk.glob("artifacts/*/exp/working_dirs/*/log.txt")
        print("WRITTEN", log.stat().st_size, flush=True)
        print("SUMMARY", callback.report.summary(), flush=True)
        """
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": ""}
    environment.pop("RAY_TMPDIR")
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=storage,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 150
        while time.monotonic() < deadline and process.poll() is None:
            if len(list(storage.glob("exp/*/checkpoint_*"))) >= 5:
                break
            time.sleep(0.2)
        # All but the first line was written after the one sync that the period allowed.
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "SUMMARY" in output, output
    assert len(xs(logs(storage))[0]) >= 5
    assert json.loads(next(storage.glob("exp/experiment_state-*.json")).read_text())
    (written,) = (int(line.split()[1]) for line in output.splitlines() if "WRITTEN" in line)
    (stored,) = (path.stat().st_size for path in storage.glob("exp/*/log.txt"))
    assert stored == written
    figure("driver gets SIGINT once", written=written, stored=stored)
