"""`upload_dir` under strain: checkpoints faster than the link, and drivers that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.proxy import Proxy
from tests.support.restarts import TRIAL_CPUS, wait_until
from tests.support.s3_server import S3Server
from tests.support.scenarios import MB, Link
from tests.test_mirror import options, train, uri
from tune_sync_plugin import SyncCallback, SyncConfig
from tune_sync_plugin.mirror.state import checkpoints_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(600)]


class Reader:
    """Reads the mirror all the time, as somebody who might restore from it any moment.

    Attributes:
        missing: What a state named and was not there, whole.
        states: How many states it saw.
        most: The most checkpoints of one trial that it saw.
    """

    def __init__(self, link: Link, prefix: str, sizes: dict[str, int]) -> None:
        self._client = link.s3.client()
        self._bucket, self._prefix = link.s3.bucket, f"{prefix}/exp/"
        self._sizes = sizes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.missing: list[str] = []
        self.states: set[str] = set()
        self.most = 0

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _keys(self) -> dict[str, int]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        return {
            item["Key"][len(self._prefix) :]: item["Size"]
            for page in pages
            for item in page.get("Contents", ())
        }

    def _state(self, keys: dict[str, int]) -> tuple[str, set[str]]:
        newest = max((key for key in keys if key.startswith("experiment_state-")), default=None)
        if newest is None:
            return "", set()
        found = self._client.get_object(Bucket=self._bucket, Key=self._prefix + newest)
        return found["ETag"], set(checkpoints_in(found["Body"].read()))

    def look(self) -> set[str]:
        """What the state names now."""
        keys = self._keys()
        etag, named = self._state(keys)
        keys = self._keys()
        wrong = [
            f"{name}/{file}"
            for name in named
            for file, size in self._sizes.items()
            if keys.get(f"{name}/{file}") != size
        ]
        if wrong and self._state(keys)[0] == etag:  # else a newer one has come meanwhile
            self.missing += wrong
        if etag:
            self.states.add(etag)
        per_trial: dict[str, set[str]] = {}
        for key in keys:
            parts = key.split("/")
            if len(parts) > 2 and parts[1].startswith("checkpoint_"):
                per_trial.setdefault(parts[0], set()).add(parts[1])
        self.most = max([self.most, *map(len, per_trial.values())])
        return named

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            self.look()


CHECKPOINT_BYTES = 200 * MB


def _train_large(config: dict[str, Any]) -> None:
    content = os.urandom(MB) * (CHECKPOINT_BYTES // MB)
    for step in range(config["steps"]):
        with tempfile.TemporaryDirectory(dir=config["disk"]) as directory:
            Path(directory, "model.bin").write_bytes(content)
            begun = time.perf_counter()
            tune.report(
                {"step": step},
                checkpoint=tune.Checkpoint.from_directory(directory),
            )
            took = time.perf_counter() - begun
        with open("times.txt", "a") as out:
            out.write(f"{took}\n")
        time.sleep(1.0)


def _run_large(
    storage: Path, sync_config: SyncConfig, num_to_keep: int = 2
) -> tuple[SyncCallback, list[float]]:
    callback = SyncCallback()
    results = tune.Tuner(
        tune.with_resources(_train_large, {"CPU": TRIAL_CPUS}),
        param_space={"x": tune.grid_search([1, 2]), "steps": 10, "disk": str(storage.parent)},
        run_config=tune.RunConfig(
            name="exp",
            storage_path=str(storage),
            sync_config=sync_config,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=num_to_keep),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    assert not results.errors
    times = [
        float(line)
        for path in storage.glob("exp/*/times.txt")
        for line in path.read_text().splitlines()
    ]
    assert len(times) == 20
    return callback, times


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that takes gigabytes at once, where there is one; else it is the disk's speed that
    would be measured, and not what a mirror costs."""
    shm = Path("/dev/shm")
    fast = shm.is_dir() and shutil.disk_usage(shm).free > 10 << 30
    path = Path(tempfile.mkdtemp(dir=shm if fast else tmp_path))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def fast_link(fast_disk: Path) -> Iterator[Link]:
    """A server whose disk is not the one that is measured."""
    with (
        S3Server.start(fast_disk / "s3") as server,
        Proxy.start(server.host, server.port) as proxy,
    ):
        yield Link(server, proxy)


_SENDER = """
import os, sys, obstore
from obstore.store import S3Store
os.nice(19)
endpoint, bucket, key, secret = sys.argv[1:]
store = S3Store(
    bucket, endpoint=endpoint, access_key_id=key, secret_access_key=secret, region="us-east-1",
    client_options={"allow_http": True, "timeout": "300s"},
)
content = os.urandom(1 << 20) * 200
while True:
    obstore.put(store, "others/model.bin", content, chunk_size=10 << 20, max_concurrency=3)
"""


@contextlib.contextmanager
def _somebody_sending(link: Link) -> Iterator[None]:
    """The link as full and the server as busy as by a mirror: both share the machine's two cores
    with training here, which no mirror can help."""
    given = (options(link)["endpoint_url"], link.s3.bucket, link.s3.access_key, link.s3.secret_key)
    sender = subprocess.Popen([sys.executable, "-c", _SENDER, *given])
    try:
        yield
    finally:
        sender.kill()
        sender.wait()


def test_checkpoints_faster_than_the_link(
    fast_disk: Path, fast_link: Link, figure: Callable[..., None]
) -> None:
    storage, link = fast_disk, fast_link
    prefix = link.prefix()
    plain = {"sync_artifacts": True, "sync_period": 1, "sync_artifacts_on_checkpoint": False}
    link.proxy.set(bandwidth_bytes_per_s=50 * MB)
    with _somebody_sending(link), Reader(link, prefix, {}):
        # As much of the disk in use as with pins: on a RAM disk in a virtual machine, a page that
        # was free costs several times what one costs that a deleted file has just given back.
        _, without = _run_large(storage / "plain", SyncConfig(**plain), num_to_keep=6)
    mirrored = SyncConfig(
        **plain,
        upload_dir=f"s3://{link.s3.bucket}/{prefix}",
        storage_options=options(link),
    )
    with Reader(link, prefix, {"model.bin": CHECKPOINT_BYTES}) as reader:
        callback, times = _run_large(storage / "mirrored", mirrored)
    named = reader.look()
    link.proxy.set()
    mirror = callback.report.mirror
    assert mirror is not None
    assert not callback.report.failures
    assert not reader.missing
    assert len(reader.states) >= 2, "it saw it change, or this proves nothing"
    assert len(named) == 4
    stored = {key.rpartition("/")[0] for key in link.s3.keys(prefix) if "/checkpoint_" in key}
    assert len(stored) <= 2 * 3
    assert mirror.checkpoints_skipped > 0, "the link kept up, so this proves nothing"
    assert not list((storage / "mirrored" / "exp" / ".tune_sync").glob("pins/*"))
    ratio = statistics.median(times) / statistics.median(without)
    figure(
        "200 MB checkpoints at every step over 50 MB/s, num_to_keep=2, two nodes",
        written=20 * CHECKPOINT_BYTES,
        stored=sum(link.s3.keys(prefix).values()),
        more=f"tune.report {ratio:.2f}x of without a mirror "
        f"({statistics.median(times) * 1e3:.0f} ms); {mirror.checkpoints_uploaded} checkpoints "
        f"mirrored, {mirror.checkpoints_skipped} skipped; at most {reader.most} of a trial's at "
        f"once; {mirror.states_passed_over} states passed over",
    )
    restored = tune.Tuner.restore(uri(link, prefix), trainable=_train_large).get_results()
    for result in restored:
        with result.checkpoint.as_directory() as directory:
            assert Path(directory, "model.bin").stat().st_size == CHECKPOINT_BYTES


# -- drivers that are killed ------------------------------------------------------------------


def drive(address: str, storage: str, given: dict[str, Any]) -> None:
    """A driver process: one experiment with a mirror."""
    ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False)
    tune.Tuner(
        train,
        param_space={"x": tune.grid_search([1, 2]), "steps": 60, "sleep_s": 0.2, "size": 100_000},
        run_config=tune.RunConfig(
            name="exp",
            storage_path=storage,
            sync_config=SyncConfig(sync_artifacts=True, sync_period=0.5, **given),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
            callbacks=[SyncCallback()],
            verbose=0,
        ),
    ).fit()


def _start_driver(cluster: LocalCluster, storage: Path, given: dict[str, Any]) -> Any:
    script = f"""
        import json, sys
        import ray._private.services
        ray._private.services.resolve_ip_for_localhost = str  # as LocalCluster does
        from tests.test_mirror_slow import drive
        drive({cluster.address!r}, {str(storage)!r}, json.loads(sys.stdin.read()))
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TUNE_GLOBAL_CHECKPOINT_S": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert driver.stdin is not None
    driver.stdin.write(json.dumps(given))
    driver.stdin.close()
    return driver


MOMENTS = [random.Random(seed).uniform(0.0, 6.0) for seed in range(10)]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(m, id=f"{m:.1f} s", marks=[pytest.mark.exhaustive] if n % 4 else [])
        for n, m in enumerate(MOMENTS)
    ],
)
def test_a_killed_driver_leaves_a_mirror_that_restores(
    cluster: LocalCluster, storage: Path, link: Link, moment: float
) -> None:
    prefix = link.prefix()
    link.proxy.set(bandwidth_bytes_per_s=2 * MB)
    given = {
        "upload_dir": f"s3://{link.s3.bucket}/{prefix}",
        "storage_options": options(link),
    }
    reader = Reader(link, prefix, {"weights/0.bin": 100_000})
    driver = _start_driver(cluster, storage, given)
    try:
        wait_until(reader.look, 90)
        time.sleep(moment)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(1)  # what it had started dies with it
    link.proxy.set()
    named = reader.look()
    assert named
    assert not reader.missing
    again = tune.Tuner.restore(uri(link, prefix), trainable=_one_step())
    results = again.fit()
    assert not results.errors
    for result in results:
        trial = Path(result.path).name
        kept = [int(name[-6:]) for name in named if name.startswith(f"{trial}/")]
        assert result.metrics["started_at"] == (max(kept) + 1 if kept else 0)


def _one_step() -> Callable[[dict[str, Any]], None]:
    """Training of the same name, as Ray asks for, that goes on for one step only."""

    def train(config: dict[str, Any]) -> None:
        start = 0
        if checkpoint := tune.get_checkpoint():
            with checkpoint.as_directory() as directory:
                start = int(Path(directory, "step").read_text()) + 1
                assert Path(directory, "weights", "0.bin").stat().st_size == 100_000
        tune.report({"started_at": start})

    return train
