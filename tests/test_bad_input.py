"""What a user gets wrong, and what the world gets wrong for him: one clear word, nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.s3_server import S3Server
from tests.support.scenarios import Link, fit, report
from tests.test_tune_modes import run_config
from tune_sync_plugin import SyncCallback, SyncConfig, tune_internals

pytestmark = pytest.mark.usefixtures("cluster")


def train(config: dict[str, Any]) -> None:
    for step in range(3):
        Path(f"file_{step}.txt").write_text(str(step))
        report({"step": step})


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What this package logged as a warning or worse."""
    return [r.message for r in caplog.records if r.name.startswith("tune_sync_plugin")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda uri, s3: "foo://bucket/x", "foo://bucket/x"),
        (lambda uri, s3: uri.replace(s3.bucket, "no-such-bucket"), "no-such-bucket"),
        (lambda uri, s3: uri.replace(s3.secret_key, "wrong"), "ACCESS_DENIED"),
    ],
    ids=["unknown scheme", "missing bucket", "wrong credential"],
)
def test_a_storage_path_that_cannot_work_fails_before_training(
    s3: S3Server, wrong: Any, message: str
) -> None:
    """Ray itself probes the storage path when the Tuner is made: nobody waits for nothing."""
    callback = SyncCallback()
    with pytest.raises(Exception, match=message) as raised:
        tune.Tuner(
            train,
            run_config=tune.RunConfig(
                storage_path=wrong(s3.uri("prefix"), s3), callbacks=[callback]
            ),
        )
    assert s3.secret_key not in str(raised.value)


def test_a_nonsense_ray_config_fails_before_training(storage: Path) -> None:
    callback = SyncCallback()
    tuner = tune.Tuner(
        train, run_config=run_config(storage, callback, sync_config=tune.SyncConfig(sync_period=-5))
    )
    with pytest.raises(ValueError, match=r"SyncConfig\.sync_period .* not -5"):
        tuner.fit()
    assert not list(storage.glob("exp/*/result.json"))


def test_a_credential_that_may_not_write_artifacts(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    refused = [{"key_regex": r"file_\d\.txt", "action": "status:403"}]
    outcome = fit(link, train, by="ours", rules=refused)
    assert outcome.results[0].metrics["step"] == 2
    assert "result.json" in outcome.names()
    assert outcome.callback
    failures = outcome.callback.report.failures
    assert {f.path for f in failures} == {f"file_{n}.txt" for n in range(3)}
    assert all("upload of" in f.message and outcome.prefix in f.message for f in failures)
    # Refused is refused: no retry within a sync, and one line in the log besides the summary.
    tried = outcome.stats.select("POST", r"file_0\.txt").requests
    assert tried <= outcome.callback.report.trials[failures[0].trial].syncs
    assert 1 <= sum("file_" in message for message in ours(caplog)) <= 2
    assert link.s3.secret_key not in caplog.text


def test_a_destination_that_is_in_the_way(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    (storage / "exp").mkdir()
    (storage / "exp" / "mine").write_text("a file where the trial's directory must go")
    callback = SyncCallback()
    tune.Tuner(
        train,
        tune_config=tune.TuneConfig(trial_dirname_creator=lambda trial: "mine"),
        run_config=run_config(storage, callback),
    ).fit()
    assert (storage / "exp" / "mine").read_text().startswith("a file"), "not ours to delete"
    failed = {f.path for f in callback.report.failures}
    assert {"file_0.txt", "file_1.txt", "file_2.txt"} <= failed
    assert any("exp/mine" in message for message in ours(caplog))


def test_an_unusable_manifest_costs_speed_and_nothing_else(
    storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SyncCallback()
    tune.Tuner(_train_in_the_way, run_config=run_config(storage, callback)).fit()
    assert len(list(storage.glob("exp/*/file_*.txt"))) == 3
    assert not callback.report.failures
    assert sum("manifest" in message for message in ours(caplog)) == 1


def _train_in_the_way(config: dict[str, Any]) -> None:
    # Where the manifests go on this node; root may write anywhere, so a file has to stand there.
    (Path.cwd().parent.parent / "tune_sync").write_text("")
    train(config)


def test_a_corrupt_manifest_is_replaced(storage: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = SyncCallback()
    tune.Tuner(
        _train_corrupting,
        run_config=run_config(storage, callback, sync_config=SyncConfig(sync_artifacts=True)),
    ).fit()
    assert len(list(storage.glob("exp/*/file_*.txt"))) == 3
    assert not callback.report.failures
    assert sum("manifest" in message for message in ours(caplog)) == 1


def _train_corrupting(config: dict[str, Any]) -> None:
    train(config)
    import time

    deadline = time.monotonic() + 20
    manifests: list[Path] = []
    while not manifests and time.monotonic() < deadline:
        manifests = list((Path.cwd().parent.parent / "tune_sync").glob("*.sqlite"))
        time.sleep(0.2)
    time.sleep(0.5)  # the sync that made it is over
    for manifest in manifests:
        manifest.write_bytes(b"no database " * 1000)


# As a sitecustomize.py on PYTHONPATH: this package can't be imported.
BLOCKER = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tune_sync_plugin":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def bare_node(cluster: LocalCluster, tmp_path: Path) -> Iterator[str]:
    """A worker node on which this package can't be imported."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    node_id = cluster.add_node(
        resources={"bare": 1}, env_vars={"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    )
    yield node_id
    cluster.kill_node(len(cluster.node_ids))


def test_a_node_without_the_package_keeps_rays_own_sync(
    storage: Path, bare_node: str, caplog: pytest.LogCaptureFixture
) -> None:
    def train_there(config: dict[str, Any]) -> None:
        import pathlib
        import time

        for step in range(3):
            pathlib.Path(f"file_{step}.txt").write_text(str(step))
            tune.report({"step": step})
        time.sleep(1)

    callback = SyncCallback()
    results = tune.Tuner(
        tune.with_resources(train_there, {"CPU": 1, "bare": 1}),
        param_space={"x": tune.grid_search([1, 2])},
        run_config=run_config(storage, callback),
    ).fit()
    assert not results.errors
    assert len(list(storage.glob("exp/*/file_*.txt"))) == 6, "Ray's own sync brought them"
    assert len(callback.report.not_attached) == 2
    assert callback.report.trials == {}
    (message,) = [m for m in ours(caplog) if "attach" in m]
    assert "pip install" in message
    assert "tune_sync_plugin" in message


def test_workers_without_the_package_keep_all_of_rays_own_sync(
    storage: Path, tmp_path: Path
) -> None:
    """A driver that has the package and a Ray that has not: the run is as if it were not there."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    script = textwrap.dedent(
        f"""
        import os, sys
        os.environ["PYTHONPATH"] = {str(tmp_path)!r}  # for the processes that Ray starts
        import ray
        from ray import tune
        from tune_sync_plugin import SyncCallback, SyncConfig

        def train(config):
            open("artifact.txt", "w").write("1")
            tune.report({{"x": 1}})

        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        callback = SyncCallback()
        config = tune.RunConfig(
            name="exp", storage_path={str(storage)!r}, callbacks=[callback], verbose=0,
            sync_config=SyncConfig(sync_artifacts=True),
        )
        results = tune.Tuner(train, run_config=config).fit()
        print("X IS", results[0].metrics["x"], list(callback.report.not_attached.values()))
        """
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    output = process.stdout + process.stderr
    assert "X IS 1" in process.stdout, output
    assert list(storage.glob("exp/experiment_state-*.json"))
    assert list(storage.glob("exp/*/result.json"))
    assert list(storage.glob("exp/*/artifact.txt"))
    assert "pip install" in process.stderr


def test_outside_of_tune_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    callback = SyncCallback()
    callback.setup()
    callback.on_step_end(iteration=0, trials=[])
    assert "no TuneController is calling" in caplog.text
    assert "RunConfig(callbacks=[...])" in caplog.text


@pytest.mark.parametrize("broken", ["session_subdir", "keep_local_results", "call_last"])
def test_a_ray_that_has_changed_keeps_its_own_sync(
    storage: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def gone(*_: Any) -> None:
        raise AttributeError("Ray has no such thing any more")

    monkeypatch.setattr(tune_internals.Storage, broken, gone)
    callback = SyncCallback()
    if broken == "session_subdir":
        monkeypatch.setattr(tune_internals.Storage, broken, property(gone))
    tune.Tuner(train, run_config=run_config(storage, callback)).fit()
    assert "so Ray's own stays on" in caplog.text
    assert len(list(storage.glob("exp/*/file_*.txt"))) == 3
    assert list(storage.glob("exp/experiment_state-*.json"))
    assert callback.report.trials == {}
