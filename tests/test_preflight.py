"""Nodes try the storage before it counts; what one can not do is said, with what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.scenarios import Link
from tests.test_bad_input import BLOCKER
from tests.test_mirror import options, train, tuner
from tune_sync_plugin import SyncError
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.preflight import Finding, Preflight, try_storage, warnings_about


class Root:
    def __init__(self, make: Callable[[], Storage]) -> None:
        self.root = make


# -- one try ----------------------------------------------------------------------------------


def test_a_try_leaves_nothing_behind(tmp_path: Path) -> None:
    error, its_time = try_storage(Root(lambda: LocalStorage(str(tmp_path))))
    assert error is None
    assert abs(its_time - time.time()) < 5
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("raised", "advice"),
    [
        (ImportError("Install adlfs"), "Install it on every node"),
        (PermissionError("HTTP status 403 (AccessDenied)"), "credentials that may write"),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), "Create the bucket"),
        (PermissionError("(SignatureDoesNotMatch)"), "Correct the access key"),
        (ValueError("Protocol not known: x"), "Correct upload_dir"),
    ],
)
def test_each_cause_has_its_advice(raised: Exception, advice: str) -> None:
    def fail() -> Storage:
        raise raised

    error, _ = try_storage(Root(fail))
    assert error is not None
    assert error.startswith(f"opening it failed: {type(raised).__name__}: ")
    assert advice in error
    assert "\n" not in error


def test_the_step_that_fails_is_named(tmp_path: Path) -> None:
    class ReadOnly(LocalStorage):
        def write(self, *arguments: Any) -> None:
            raise PermissionError("HTTP status 403")

    class Keeps(LocalStorage):
        def remove(self, path: str) -> None:
            raise PermissionError("HTTP status 403")

    for kind, step in ((ReadOnly, "writing to"), (Keeps, "deleting from")):
        error, _ = try_storage(Root(lambda kind=kind: kind(str(tmp_path))))  # type: ignore[misc]
        assert error is not None
        assert error.startswith(f"{step} it failed")


# -- clocks ------------------------------------------------------------------------------------


class Answers:
    """Nodes that answer when asked, by their own clocks."""

    def __init__(self, answer: tuple[str | None, float]) -> None:
        self.answer = answer

    def call(self, node_id: str, function: Any, *arguments: Any) -> str:
        return node_id

    def is_ready(self, call: str) -> bool:
        return True

    def result(self, call: str) -> tuple[str | None, float]:
        return self.answer


@pytest.mark.parametrize(
    ("its_time", "ahead_s"), [(1000.0, 0), (1004.9, 0), (1065.0, 60), (940.0, -60), (999.5, 0)]
)
def test_a_clock_is_told_apart_from_a_slow_answer(its_time: float, ahead_s: float) -> None:
    now = iter([1000.0, 1005.0, 1005.0, 1005.0])
    preflight = Preflight(Answers((None, its_time)), clock=lambda: next(now))
    preflight.check("node")
    (finding,) = preflight.poll().values()
    assert finding.ahead_s == ahead_s
    lines = warnings_about("node", finding, "s3://bucket")
    assert len(lines) == (1 if ahead_s else 0)
    assert all(("ahead of" if ahead_s > 0 else "behind") in line for line in lines)


def test_a_node_is_asked_once_and_again_when_it_was_late() -> None:
    class Silent(Answers):
        ready = False
        calls = 0

        def call(self, *arguments: Any) -> str:
            self.calls += 1
            return "call"

        def is_ready(self, call: str) -> bool:
            return self.ready

    now = [0.0]
    silent = Silent((None, 200.0))
    preflight = Preflight(silent, clock=lambda: now[0])
    assert not preflight.is_able("node")
    assert not preflight.is_able("node")
    assert silent.calls == 1
    now[0] = 100.0
    (finding,) = preflight.poll().values()
    assert "no process of ours has started for 100 s" in (finding.error or "")
    assert preflight.poll() == {}
    silent.ready, now[0] = True, 200.0
    assert preflight.poll() == {"node": Finding()}
    assert preflight.is_able("node")


HEAD = "node:__internal_head__"


def _on_the_head(config: dict[str, Any]) -> None:
    train(config)


# -- real nodes --------------------------------------------------------------------------------


@pytest.fixture
def head(link: Link) -> Iterator[LocalCluster]:
    """A node whose processes have credentials, and nothing else."""
    keys = {
        "AWS_ACCESS_KEY_ID": link.s3.access_key,
        "AWS_SECRET_ACCESS_KEY": link.s3.secret_key,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with LocalCluster(workers=0, head_num_cpus=2, env_vars=keys) as running:
        yield running


@pytest.mark.slow
def test_nodes_that_can_not_are_named_and_left_out(
    head: LocalCluster,
    storage: Path,
    link: Link,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    lacking = head.add_node(env_vars={"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""})
    bare = head.add_node(env_vars={"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"})
    prefix = link.prefix()
    without_keys = {k: v for k, v in options(link).items() if k not in ("key", "secret")}
    made, callback = tuner(
        storage,
        link,
        prefix,
        {"x": tune.grid_search([1, 2]), "steps": 8, "sleep_s": 1},
        trainable=tune.with_resources(_on_the_head, {"CPU": 1, HEAD: 0.001}),
        sync_artifacts=False,  # which could not be had from these nodes either
        storage_options=without_keys,
    )
    assert not made.fit().errors
    mirror = callback.report.mirror
    assert mirror is not None
    assert not mirror.failures
    about = {node: [w for w in mirror.warnings if node[:8] in w] for node in (lacking, bare)}
    assert len(mirror.warnings) == 2
    assert "credentials" in about[lacking][0]
    assert "pip install tune-sync-plugin" in about[bare][0]
    for (line,) in about.values():
        assert "\n" not in line
        assert sum(line in message for message in caplog.messages) == 1


def test_a_read_only_bucket_is_named_before_training(
    storage: Path, link: Link, cluster: LocalCluster
) -> None:
    prefix = link.prefix()
    link.proxy.add_rule(rf"{prefix}/", "status:403", method="PUT")
    made, _ = tuner(storage, link, prefix, {"x": 1, "steps": 1})
    with pytest.raises(
        SyncError, match=r"writing to it failed: .*403.* may write, read and delete"
    ):
        made.fit()
    assert not list(storage.rglob("log.txt"))


def test_without_preflight_nothing_is_tried(
    storage: Path, link: Link, cluster: LocalCluster
) -> None:
    prefix = link.prefix()
    made, callback = tuner(storage, link, prefix, {"x": 1, "steps": 2}, preflight=False)
    assert not made.fit().errors
    assert not link.proxy.stats().select(regex="probe-").requests
    assert callback.report.mirror is not None
    assert not callback.report.mirror.failures
