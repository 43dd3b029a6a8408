"""What a sync task finds out on its node, and what attaching does, without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.fs
import pytest
from ray import tune

from tune_sync_plugin import tune_internals
from tune_sync_plugin.directories import Run, SyncJob, prepare_driver_disk
from tune_sync_plugin.engine.index import OUR_DIRECTORY
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.report import EXPERIMENT, SyncReport
from tune_sync_plugin.runs import RunFacts
from tune_sync_plugin.tasks import _sync_one

MARK = ".validate_storage_marker"


class Node:
    """A node's session directory, a storage, and one trial's job."""

    def __init__(self, path: Path) -> None:
        self.here, self.stored = path / "node" / "run", path / "storage"
        for directory in ("working_dirs/t", "driver_artifacts/t"):
            (self.here / directory).mkdir(parents=True)
        self.stored.mkdir()
        (self.stored / MARK).touch()
        local = pyarrow.fs.LocalFileSystem()
        self.run = Run(local, "run", "driver-1", str(self.stored), MARK, RunFacts("r1", "now"))
        self.job = SyncJob(
            "t",
            ("working_dirs/t",),
            str(self.stored / "t"),
            SyncOptions(),
            drivers_root="driver_artifacts/t",
        )

    def write(self, path: str, text: str) -> None:
        (self.here / path).write_text(text)

    def sync(self, **changes: Any) -> SyncReport:
        return _sync_one(replace(self.job, **changes), self.run, str(self.here), "node-1")

    def names(self) -> set[str]:
        """What is stored of the trial, our own index left out."""
        return {p.name for p in (self.stored / "t").glob("*")} - {OUR_DIRECTORY}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_storage_path_that_is_not_shared_is_an_error_and_not_a_success(node: Node) -> None:
    node.write("working_dirs/t/a.txt", "1")
    (node.stored / MARK).unlink()
    (failure,) = node.sync().failures
    assert failure.error == "FileNotFoundError"
    assert "all nodes mount" in failure.message
    assert str(node.stored) in failure.message
    assert node.names() == set()


def test_the_driver_itself_may_make_the_storage_path(node: Node) -> None:
    (node.stored / MARK).unlink()
    node.write("driver_artifacts/t/result.json", "{}")
    report = node.sync(
        key=EXPERIMENT,
        roots=("driver_artifacts",),
        must_exist=True,
        drivers_root="",
    )
    assert report.complete
    assert report.files_uploaded == 1


def test_a_disk_that_takes_no_notes_does_not_keep_the_state_from_storage(node: Node) -> None:
    (node.here / "tune_sync").touch()  # where the directory of our notes should be
    node.write("driver_artifacts/t/result.json", "{}")
    report = node.sync(
        key=EXPERIMENT,
        roots=("driver_artifacts",),
        drivers_root="",
    )
    assert (report.failures, report.files_uploaded) == ((), 1)
    assert "can't be used" in report.warnings[0]


def test_a_missing_driver_directory_is_a_failure(node: Node) -> None:
    (failure,) = node.sync(key=EXPERIMENT, roots=("nowhere",), must_exist=True).failures
    assert "nowhere" in failure.message


def test_the_trial_directory_is_synced_where_the_driver_does_not(node: Node) -> None:
    node.write("working_dirs/t/a.txt", "1")
    node.write("driver_artifacts/t/b.txt", "1")
    assert node.sync().files_uploaded == 2
    assert node.names() == {"a.txt", "b.txt"}


def test_of_two_files_of_one_name_the_second_is_named(node: Node) -> None:
    node.write("working_dirs/t/a.txt", "first")
    node.write("driver_artifacts/t/a.txt", "second")
    report = node.sync()
    (failure,) = report.failures
    assert (failure.path, failure.error) == ("a.txt", "FileExistsError")
    assert "both have it; only the first one's is sent" in failure.message
    assert (node.stored / "t" / "a.txt").read_text() == "first"


def test_on_the_drivers_disk_it_is_left_to_the_driver(node: Node) -> None:
    prepare_driver_disk(node.run, str(node.here.parent))
    node.write("working_dirs/t/a.txt", "1")
    node.write("driver_artifacts/t/b.txt", "1")
    assert node.sync().files_uploaded == 1
    assert node.names() == {"a.txt"}


def test_what_the_driver_holds_is_not_overwritten(node: Node) -> None:
    prepare_driver_disk(node.run, str(node.here.parent))
    node.write("driver_artifacts/t/plot.png", "the driver's")
    for name in ("plot.png", "result.json", "mine.txt"):
        node.write(f"working_dirs/t/{name}", "the trial's")
    report = node.sync()
    assert {f.path for f in report.failures} == {"plot.png", "result.json"}
    assert node.names() == {"mine.txt"}


def test_a_place_that_the_trial_has_left_fills_gaps_only(node: Node) -> None:
    node.write("working_dirs/t/log.txt", "old")
    node.write("working_dirs/t/only_here.txt", "old")
    (node.stored / "t").mkdir()
    (node.stored / "t" / "log.txt").write_text("newer, from another node")
    report = node.sync(options=SyncOptions(only_missing=True))
    assert (node.stored / "t" / "log.txt").read_text() == "newer, from another node"
    assert (node.stored / "t" / "only_here.txt").read_text() == "old"
    assert [f.path for f in report.failures] == ["log.txt"]
    assert "kept back" in report.failures[0].message


def test_attaching_that_fails_leaves_rays_own_sync_on() -> None:
    class Context:
        sync_config = tune.SyncConfig(sync_artifacts=True)

        @property
        def trial_driver_staging_path(self) -> str:
            raise OSError("the disk is full")

    context = Context()
    with pytest.raises(OSError, match="full"):
        tune_internals.attach(SimpleNamespace(_storage=context))
    assert context.sync_config.sync_artifacts
