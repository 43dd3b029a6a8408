"""A driver is killed and its cluster lives on: what lay on the nodes is synced and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import REPOSITORY, LocalCluster

SCRIPT = """
    import sys, time, tempfile
    from pathlib import Path
    from unittest import mock
    import ray, ray._private.services
    from ray import tune
    from tune_sync_plugin import SyncCallback, SyncConfig

    address, storage, mode = sys.argv[1:]

    def train(config):
        node = ray.get_runtime_context().get_node_id()
        start = 0
        if checkpoint := tune.get_checkpoint():
            with checkpoint.as_directory() as directory:
                start = int(Path(directory, "step").read_text()) + 1
        with open(f"nodes.txt", "a") as out:
            out.write(f"{node} from {start}\\n")
        for step in range(start, 20):
            # Before the report: its checkpoint vouches for the line.
            with open("log.txt", "a") as out:
                out.write(f"{step}\\n")
            with tempfile.TemporaryDirectory() as directory:
                Path(directory, "step").write_text(str(step))
                tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(directory))
            time.sleep(config["sleep_s"])

    with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", str):
        ray.init(address=address, _node_ip_address="127.0.0.1", log_to_driver=False)
    callback = SyncCallback()
    if mode == "first":
        tuner = tune.Tuner(
            tune.with_resources(train, {"CPU": 2}),
            param_space={"sleep_s": 0.5},
            run_config=tune.RunConfig(
                name="exp", storage_path=storage, callbacks=[callback],
                sync_config=SyncConfig(
                    sync_artifacts=True, sync_period=300, sync_artifacts_on_checkpoint=False,
                    experiment_sync_period=0.5,
                ),
            ),
        )
    else:
        tuner = tune.Tuner.restore(
            storage + "/exp", trainable=tune.with_resources(train, {"CPU": 2}),
            resume_unfinished=True, param_space={"sleep_s": 0.01},
        )
    results = tuner.fit()
    print("ENDED", results[0].metrics["step"], results.errors, flush=True)
"""


@pytest.fixture(scope="module")
def own_cluster() -> Iterator[LocalCluster]:
    with LocalCluster(workers=2) as running:
        yield running


def drive(own_cluster: LocalCluster, storage: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            own_cluster.address,
            str(storage),
            mode,
        ],
        cwd=storage,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TUNE_GLOBAL_CHECKPOINT_S": "0.5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def local_log(own_cluster: LocalCluster) -> tuple[int, Path] | None:
    """The number of the node where the trial is, and its log there."""
    for number, directory in enumerate(own_cluster.temp_dirs[1:], 1):
        for path in directory.glob("session_*/artifacts/*/exp/working_dirs/*/log.txt"):
            return number, path
    return None


def test_what_a_killed_driver_left_is_synced_by_the_next_one(
    storage: Path, figure: Callable[..., None], own_cluster: LocalCluster
) -> None:
    first = drive(own_cluster, storage, "first")
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            found = local_log(own_cluster)
            if found and len(found[1].read_text().splitlines()) >= 6:
                break
            time.sleep(0.1)
    finally:
        first.kill()
        output, _ = first.communicate()
    assert found, output
    number, path = found
    lines = path.read_text().splitlines()
    stored = [p.read_text().splitlines() for p in storage.glob("exp/*/log.txt")]
    assert all(len(log) <= 2 for log in stored), "the test must leave something unsynced"

    # The trial goes on elsewhere: its node has no room any more.
    blocker = """
        import sys, time
        from unittest import mock
        import ray, ray._private.services
        with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", str):
            ray.init(address=sys.argv[1], _node_ip_address="127.0.0.1", log_to_driver=False)
        @ray.remote(num_cpus=2, resources={"worker%s" % sys.argv[2]: 1})
        class Blocker:
            def ping(self): pass
        blocker = Blocker.remote()
        ray.get(blocker.ping.remote())
        print("blocked", flush=True)
        time.sleep(600)
    """
    blocking = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(blocker), own_cluster.address, str(number)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert blocking.stdout
        while "blocked" not in (line := blocking.stdout.readline()):
            assert line, "the blocker did not come up"
        output, _ = drive(own_cluster, storage, "second").communicate(timeout=120)
    finally:
        blocking.kill()
        blocking.wait()
    assert "ENDED 19 []" in output, output
    (log,) = (p.read_text().splitlines() for p in storage.glob("exp/*/log.txt"))
    (nodes,) = (p.read_text().splitlines() for p in storage.glob("exp/*/nodes.txt"))
    assert len({line.split()[0] for line in nodes}) == 2, "it went on on another node"
    # The line of the step that the checkpoint did not vouch for any more may be there twice.
    resumed_at = int(nodes[1].split()[-1])
    assert log[: len(lines)] == lines, "every line that was on the node is there"
    assert log[-(20 - resumed_at) :] == [str(step) for step in range(resumed_at, 20)]
    size = path.stat().st_size
    kept = len("\n".join(log[: len(lines)])) + 1
    figure("driver killed, its cluster lives on", written=size, stored=kept)
