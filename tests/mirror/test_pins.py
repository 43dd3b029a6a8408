"""Pinned checkpoints outlive Tune's own, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tune_sync_plugin.mirror.pins import Pins

NAME = "trial/checkpoint_000001"


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    for name in ("model.bin", "shards/0.bin", "shards/1.bin"):
        path = tmp_path / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_pin_outlives_the_checkpoint_and_costs_no_copy(experiment: Path) -> None:
    pins = Pins(str(experiment))
    before = contents(experiment / NAME)
    assert pins.pin(NAME)
    assert os.stat(experiment / NAME / "model.bin").st_nlink == 2
    shutil.rmtree(experiment / NAME)
    assert pins.is_deleted(NAME)
    assert contents(experiment / pins.path(NAME)) == before
    assert Pins(str(experiment)).names() == pins.names() == {NAME}
    pins.release(NAME)
    assert pins.names() == Pins(str(experiment)).names() == set()
    assert not (experiment / ".tune_sync" / "pins").exists()


def test_what_is_gone_is_not_pinned(experiment: Path) -> None:
    shutil.rmtree(experiment / NAME)
    pins = Pins(str(experiment))
    assert not pins.pin(NAME)
    assert pins.names() == set()


def test_what_is_being_deleted_is_not_pinned(experiment: Path) -> None:
    def goes_on(seconds: float) -> None:
        (experiment / NAME / "shards" / "1.bin").unlink()

    pins = Pins(str(experiment), sleep=goes_on)
    time.sleep(0.02)  # the file system's clock ticks
    (experiment / NAME / "shards" / "0.bin").unlink()  # the first of it is gone already
    assert not pins.pin(NAME)
    assert pins.names() == set()
    assert not contents(experiment / ".tune_sync")


def test_a_file_that_was_deleted_long_ago_keeps_nothing_back(experiment: Path) -> None:
    time.sleep(0.02)
    (experiment / NAME / "shards" / "0.bin").unlink()
    waited: list[float] = []
    pins = Pins(str(experiment), sleep=waited.append)
    assert pins.pin(NAME)
    assert waited
    assert set(contents(experiment / pins.path(NAME))) == {"model.bin", "shards/1.bin"}


def test_what_is_whole_is_pinned_at_once(experiment: Path) -> None:
    def never(seconds: float) -> None:
        raise AssertionError("there is nothing to wait for")

    assert Pins(str(experiment), sleep=never).pin(NAME)


def test_without_hard_links_it_stays_where_it_is(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*arguments: object, **options: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    pins = Pins(str(experiment))
    assert pins.pin(NAME)
    assert pins.path(NAME) == NAME
    assert not (experiment / ".tune_sync" / "pins" / NAME).exists()
    pins.release(NAME)
    assert (experiment / NAME / "model.bin").exists()


def test_several_threads_pin_the_same(experiment: Path) -> None:
    pins = Pins(str(experiment))
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: pins.pin(NAME), range(32)))
    assert pins.path(NAME) != NAME
    assert contents(experiment / pins.path(NAME)) == contents(experiment / NAME)
    assert [path.name for path in (experiment / ".tune_sync" / "pins").iterdir()] == ["trial"]


def test_half_a_pin_of_a_killed_process_goes(experiment: Path) -> None:
    half = experiment / ".tune_sync" / "pins" / ".1a2b.part"
    half.mkdir(parents=True)
    (half / "model.bin").touch()
    assert Pins(str(experiment)).names() == set()
    assert not half.exists()
