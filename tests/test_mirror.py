"""`upload_dir`: real runs on a shared directory, mirrored to S3, restored from the mirror alone."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.s3_server import REGION, S3Server
from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback, SyncConfig, SyncError
from tune_sync_plugin.mirror.state import checkpoints_in, take

pytestmark = pytest.mark.usefixtures("cluster")


def options(link: Link) -> dict[str, Any]:
    return {
        "key": link.s3.access_key,
        "secret": link.s3.secret_key,
        "endpoint_url": f"http://{link.proxy.host}:{link.proxy.port}",
        "client_kwargs": {"region_name": REGION},
    }


def train(config: dict[str, Any]) -> None:
    """Logs, checkpoints, goes on from its checkpoint."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    for step in range(start, config["steps"]):
        with open("log.txt", "a") as log:
            log.write(f"{step}\n")
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            Path(directory, "weights").mkdir()
            Path(directory, "weights", "0.bin").write_bytes(bytes([step]) * config.get("size", 10))
            tune.report(
                {"step": step, "score": -step},
                checkpoint=tune.Checkpoint.from_directory(directory),
            )
        time.sleep(config.get("sleep_s", 0))
        if step == config.get("fails_at") and start == 0:
            raise RuntimeError("as asked")


def tuner(
    storage: Path,
    link: Link,
    prefix: str,
    space: dict[str, Any],
    *,
    trainable: Any = train,
    **settings: Any,
) -> tuple[tune.Tuner, SyncCallback]:
    callback = SyncCallback()
    sync_config = {
        "sync_artifacts": True,
        "sync_period": 1,
        "upload_dir": f"s3://{link.s3.bucket}/{prefix}",
        "storage_options": options(link),
        **settings,
    }
    made = tune.Tuner(
        trainable,
        param_space=space,
        run_config=tune.RunConfig(
            name="exp",
            storage_path=str(storage),
            sync_config=SyncConfig(**sync_config),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[callback],
            verbose=0,
        ),
    )
    return made, callback


def uri(link: Link, prefix: str) -> str:
    """The mirror as Ray itself opens it."""
    path, query, rest = link.s3.uri(prefix, port=link.proxy.port).partition("?")
    return f"{path}/exp{query}{rest}"


def test_the_mirror_alone_restores_the_experiment(
    storage: Path, link: Link, figure: Callable[..., None]
) -> None:
    prefix = link.prefix()
    made, callback = tuner(
        storage, link, prefix, {"x": tune.grid_search([1, 2]), "steps": 6, "fails_at": 3}
    )
    results = made.fit()
    assert len(results.errors) == 2
    mirror = callback.report.mirror
    assert mirror is not None
    assert not mirror.failures
    assert not mirror.warnings
    assert "mirror s3://" in callback.report.summary()
    stored = link.s3.keys(prefix)
    shutil.rmtree(storage / "exp")  # nothing but the mirror is left

    again = tune.Tuner.restore(
        uri(link, prefix), trainable=train, restart_errored=False, resume_errored=True
    )
    results = again.fit()
    assert not results.errors
    for result in results:
        assert [row["step"] for row in result.metrics_dataframe.to_dict("records")] == [*range(6)]
        with result.checkpoint.as_directory() as directory:
            assert Path(directory, "step").read_text() == "5"
    logs = [link.s3.get(key).decode() for key in link.s3.keys(prefix) if key.endswith("log.txt")]
    assert logs == ["".join(f"{n}\n" for n in range(6))] * 2
    checkpoints = {key.split("/")[3] for key in stored if "/checkpoint_" in key}
    assert checkpoints == {"checkpoint_000002", "checkpoint_000003"}
    figure(
        "experiment mirrored and restored from the mirror",
        written=sum(stored.values()),
        stored=sum(stored.values()),
    )


@pytest.mark.slow
def test_the_mirror_holds_what_the_storage_path_does(storage: Path, link: Link) -> None:
    prefix = link.prefix()
    made, callback = tuner(storage, link, prefix, {"x": tune.grid_search([1, 2, 3]), "steps": 3})
    results = made.fit()
    assert not results.errors
    here = {
        str(path.relative_to(storage)): path.read_bytes()
        for path in storage.rglob("*")
        if path.is_file()
    }
    there = {key[len(prefix) + 1 :]: link.s3.get(key) for key in link.s3.keys(prefix)}
    ours = {name for name in here if name.startswith("exp/.tune_sync/mirror-")}
    marker = {"exp/.validate_storage_marker"}
    assert there == {name: here[name] for name in here.keys() - ours - marker}
    # What the state names is what Tune keeps.
    state = take(str(storage / "exp"), str(storage / "copy"))
    assert state is not None
    assert state.checkpoints == {
        str(path.relative_to(storage / "exp")) for path in (storage / "exp").glob("*/checkpoint_*")
    }
    assert len(state.checkpoints) == 6
    (key,) = (key for key in there if "experiment_state" in key)
    assert set(checkpoints_in(there[key])) == state.checkpoints
    assert callback.report.mirror is not None
    assert callback.report.mirror.checkpoints_deleted <= 3


@pytest.fixture
def own_link(tmp_path: Path) -> Iterator[Link]:
    """A server with keys that no other test has left anywhere."""
    with (
        S3Server.start(tmp_path / "s3") as server,
        Proxy.start(server.host, server.port) as proxy,
    ):
        yield Link(server, proxy)


def test_neither_secret_is_anywhere(
    storage: Path, own_link: Link, cluster: LocalCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    link = own_link
    prefix = link.prefix()
    made, callback = tuner(storage, link, prefix, {"x": 1, "steps": 2})
    assert not made.fit().errors
    assert callback.report.mirror is not None
    assert callback.report.mirror.states
    printed = "".join(capfd.readouterr())
    secrets = [link.s3.access_key, link.s3.secret_key]
    assert not [secret for secret in secrets if secret in printed]
    places = [storage, *cluster.temp_dirs]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert any("tuner.pkl" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    for key in link.s3.keys(prefix):
        assert link.s3.secret_key.encode() not in link.s3.get(key), key


@pytest.mark.slow
def test_a_restored_experiment_says_which_options_it_lacks(
    storage: Path, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.config import conf

    prefix = link.prefix()
    made, _ = tuner(storage, link, prefix, {"x": 1, "steps": 4, "fails_at": 1})
    made.fit()
    again = tune.Tuner.restore(str(storage / "exp"), trainable=train, resume_errored=True)
    with pytest.raises(SyncError, match=r"endpoint_url, key, secret.*never saved.*FSSPEC_S3="):
        again.fit()
    assert "checkpoint_000003" not in str(link.s3.keys(prefix))
    monkeypatch.setitem(conf, "s3", options(link))  # as fsspec reads it from the environment
    again = tune.Tuner.restore(str(storage / "exp"), trainable=train, resume_errored=True)
    assert not again.fit().errors
    assert "checkpoint_000003" in str(link.s3.keys(prefix))


BAD = {
    "wrong secret": ({"secret": "wrong"}, "Correct the access key and the secret"),
    "wrong endpoint": ({"endpoint_url": "http://127.0.0.1:9"}, "Is the endpoint right"),
    "no such option": ({"nonsense": 1}, "storage_options"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_the_driver_can_not_reach_ends_it_before_training(
    storage: Path, link: Link, bad: str
) -> None:
    changed, advice = BAD[bad]
    prefix = link.prefix()
    made, _ = tuner(
        storage, link, prefix, {"x": 1, "steps": 2}, storage_options={**options(link), **changed}
    )
    begun = time.monotonic()
    with pytest.raises(SyncError, match=advice) as raised:
        made.fit()
    assert link.s3.secret_key not in str(raised.value)
    assert time.monotonic() - begun < 60
    assert not list(storage.rglob("log.txt"))


def test_a_missing_bucket_and_a_missing_library(storage: Path, link: Link) -> None:
    prefix = link.prefix()
    # This server would make it: as AWS answers.
    link.proxy.add_rule(rf"{prefix}/", "status:404:NoSuchBucket", method="PUT")
    for url, advice in (
        (f"s3://{link.s3.bucket}/{prefix}", "Create the bucket"),
        ("oci://bucket/a", "pip install"),
        ("nonsense://a", "Correct upload_dir"),
    ):
        given = options(link) if url.startswith("s3") else None
        made, _ = tuner(
            storage, link, prefix, {"x": 1, "steps": 1}, upload_dir=url, storage_options=given
        )
        with pytest.raises(SyncError, match=advice):
            made.fit()


def test_only_a_directory_can_be_mirrored(link: Link) -> None:
    made, _ = tuner(Path("/"), link, link.prefix(), {"x": 1, "steps": 1})
    made._local_tuner._run_config.storage_path = link.s3.uri(link.prefix())
    with pytest.raises(SyncError, match="storage_path that is a directory"):
        made.fit()
