"""What stands in for Ray's experiment syncer, called as Ray calls it."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray
from ray import cloudpickle
from ray.train._internal.storage import StorageContext, _FilesystemSyncer

from tests.fake_executor import FakeClock, FakeExecutor, Sync, deferring, failing
from tune_sync_plugin.dispatcher import Dispatcher
from tune_sync_plugin.driver_syncer import DriverSyncer
from tune_sync_plugin.report import EXPERIMENT, ExperimentReport, SyncReport


class Driver:
    """A DriverSyncer over a scripted executor, and the calls that Ray makes of it."""

    def __init__(self, directory: Path, *, period_s: float = 300, timeout_s: float = 20) -> None:
        self.clock = FakeClock()
        self.staging, self.copies = directory / "staging", directory / "copies"
        self.staging.mkdir(exist_ok=True)
        self.executor = FakeExecutor(self.clock, "A", timeout_s=100)
        self.report = ExperimentReport()
        self.dispatcher = Dispatcher(
            self.executor,
            self.report.add,
            period_s=period_s,
            timeout_s=100,
            max_syncs_per_node=2,
            clock=self.clock,
        )
        self.dispatcher.add_target(EXPERIMENT)
        self.dispatcher.set_places(EXPERIMENT, {"A": EXPERIMENT})
        self.rays_own = _FilesystemSyncer(pyarrow.fs.LocalFileSystem(), sync_period=7)
        self.syncer = DriverSyncer(
            self.dispatcher, self.report, self.rays_own, str(self.copies), timeout_s, self.clock
        )

    @property
    def times(self) -> list[float]:
        return self.executor.times(EXPERIMENT)

    def snapshot(self, *, force: bool = False, wait: bool = False) -> bool:
        """As ``sync_up_experiment_state`` does it, without its catching what ``wait`` raises."""
        if force:
            self.syncer.wait()
        launched = self.syncer.sync_up(str(self.staging), "bucket/experiment")
        if wait:
            self.syncer.wait()
        return launched

    def step_end(self, seconds: float = 1) -> None:
        self.clock.advance(seconds)
        self.syncer.step_ended()
        self.dispatcher.poll()


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


class TestSnapshots:
    def test_what_is_synced_is_the_state_as_it_was_then(self, driver: Driver) -> None:
        state = driver.staging / "experiment_state-1.json"
        state.write_text("{1}")
        driver.snapshot()
        state.write_text("{half of 2")
        assert (driver.copies / state.name).read_text() == "{1}"
        inode = (driver.copies / state.name).stat().st_ino
        state.write_text("{2}")
        driver.snapshot()
        assert (driver.copies / state.name).read_text() == "{2}"
        assert (driver.copies / state.name).stat().st_ino != inode, "whoever read it still does"

    def test_a_state_that_cant_be_copied_is_sent_from_where_it_is(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = driver.staging / "experiment_state-1.json"
        state.write_text("{1}")
        driver.snapshot()
        monkeypatch.setattr(shutil, "copy2", full)
        state.write_text("{22}")
        assert driver.snapshot() is True
        assert os.listdir(driver.copies) == [], "an older one would hide it"

    def test_the_first_starts_a_sync_within_the_call(self, driver: Driver) -> None:
        assert driver.snapshot() is True
        assert driver.times == [0]
        assert driver.executor.waits == []

    def test_one_that_the_period_holds_back_counts_as_launched(self, tmp_path: Path) -> None:
        driver = Driver(tmp_path, period_s=10)
        for _ in range(25):
            assert driver.snapshot() is True  # False makes Ray warn of slow syncs
            driver.step_end()
        assert driver.times == [0, 10, 20]

    def test_one_while_a_sync_is_under_way_counts_as_launched(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(takes=5))
        driver.snapshot()
        driver.step_end()
        assert driver.snapshot() is True
        assert driver.times == [0]

    def test_a_forced_one_runs_within_the_period_and_does_not_block(self, driver: Driver) -> None:
        driver.snapshot()
        driver.step_end()
        assert driver.snapshot(force=True) is True
        assert driver.times == [0, 1]
        assert driver.executor.waits == []

    def test_a_forced_one_during_a_sync_runs_after_it_and_does_not_block(
        self, driver: Driver
    ) -> None:
        driver.executor.will(EXPERIMENT, Sync(takes=5))
        driver.snapshot()
        driver.step_end()
        driver.snapshot(force=True)
        assert driver.clock.now == 1
        assert driver.executor.waits == []
        for _ in range(10):
            driver.step_end()
        assert driver.times == [0, 5]

    def test_forced_ones_step_after_step_never_block(self, driver: Driver) -> None:
        driver.executor.default = Sync(takes=0.5)
        for _ in range(5):
            driver.snapshot(force=True)
            driver.step_end()
        assert driver.times == [0, 1, 2, 3, 4]
        assert driver.executor.waits == []

    def test_the_one_after_a_forced_one_is_not_forced(self, driver: Driver) -> None:
        driver.snapshot(force=True)
        driver.step_end()
        driver.snapshot()
        for _ in range(10):
            driver.step_end()
        assert driver.times == [0]

    def test_a_failure_does_not_disturb_a_snapshot(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(report=failing()))
        driver.snapshot()
        driver.step_end()
        assert driver.snapshot(force=True) is True
        assert driver.executor.waits == []


class TestTheLastSnapshot:
    def test_blocks_until_everything_is_there(self, driver: Driver) -> None:
        driver.executor.default = Sync(takes=5)
        driver.snapshot()
        driver.step_end(1)
        driver.snapshot(force=True, wait=True)
        assert driver.times == [0, 5]
        assert driver.clock.now == 10

    def test_blocks_right_after_a_forced_one_of_the_same_length(self, driver: Driver) -> None:
        driver.executor.default = Sync(takes=5)
        driver.snapshot(force=True)
        driver.step_end(1)
        driver.snapshot(force=True, wait=True)
        assert driver.times == [0, 5]
        assert driver.clock.now == 10

    def test_may_come_twice(self, driver: Driver) -> None:
        driver.executor.default = Sync(takes=5)
        driver.snapshot(force=True, wait=True)
        driver.snapshot(force=True, wait=True)
        assert driver.times == [0, 5]
        assert driver.clock.now == 10

    def test_without_anything_to_wait_for_does_not_block(self, driver: Driver) -> None:
        driver.syncer.wait()
        driver.syncer.wait()
        assert driver.executor.waits == []

    def test_raises_what_was_not_synced(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(report=failing("PermissionError", "state.json")))
        with pytest.raises(RuntimeError, match=r"state\.json: PermissionError: as scripted"):
            driver.snapshot(force=True, wait=True)

    def test_raises_what_changed_while_it_was_read(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(report=deferring("result.json")))
        with pytest.raises(RuntimeError, match=r"result\.json: SourceChangedError"):
            driver.snapshot(force=True, wait=True)

    def test_names_three_failures_at_most(self, driver: Driver) -> None:
        names = [f"f{number}" for number in range(5)]
        failures = tuple(f for name in names for f in failing(path=name).failures)
        driver.executor.will(EXPERIMENT, Sync(report=SyncReport(failures=failures)))
        with pytest.raises(RuntimeError) as caught:
            driver.snapshot(force=True, wait=True)
        assert [name in str(caught.value) for name in names] == [True] * 3 + [False] * 2

    def test_does_not_raise_what_failed_before_and_is_there_now(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(report=failing()))
        driver.snapshot()
        driver.step_end()
        driver.snapshot(force=True, wait=True)

    def test_does_not_raise_what_trials_failed_at(self, driver: Driver) -> None:
        driver.report.add("trial", "A", failing())
        driver.snapshot(force=True, wait=True)

    def test_times_out(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(hangs=True))
        with pytest.raises(TimeoutError, match="within 20 s"):
            driver.snapshot(force=True, wait=True)
        assert driver.clock.now == 20

    def test_times_out_when_the_caller_says(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(hangs=True))
        driver.syncer.wait()
        driver.syncer.sync_up("/staging", "bucket/experiment")
        with pytest.raises(TimeoutError, match="within 3 s"):
            driver.syncer.wait(timeout=3)
        assert driver.clock.now == 3


class TestTheTimeLeftForTheFlush:
    def test_is_the_timeout_before_any_wait(self, driver: Driver) -> None:
        assert driver.syncer.time_left() == 20

    def test_counts_from_the_last_wait(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(takes=4))
        driver.snapshot(force=True, wait=True)
        assert driver.syncer.time_left() == pytest.approx(16, abs=0.2)

    def test_is_never_nothing(self, driver: Driver) -> None:
        driver.executor.will(EXPERIMENT, Sync(takes=50))
        with pytest.raises(TimeoutError):
            driver.snapshot(force=True, wait=True)
        assert driver.syncer.time_left() == 10


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(copy.copy, id="copy"),
        pytest.param(lambda syncer: pickle.loads(pickle.dumps(syncer)), id="pickle"),
        pytest.param(lambda syncer: pickle.loads(pickle.dumps(syncer, 2)), id="pickle2"),
        pytest.param(lambda syncer: pickle.loads(cloudpickle.dumps(syncer)), id="cloudpickle"),
    ],
)
class TestCopies:
    def test_are_the_syncer_that_ray_made(
        self, driver: Driver, duplicate: Callable[[Any], Any]
    ) -> None:
        twin = duplicate(driver.syncer)
        assert type(twin) is _FilesystemSyncer
        assert twin.sync_period == 7
        assert twin is not driver.rays_own

    def test_also_in_the_middle_of_a_sync_of_ray_s(
        self, driver: Driver, duplicate: Callable[[Any], Any], tmp_path: Path
    ) -> None:
        (tmp_path / "here").mkdir()
        driver.rays_own.sync_up(str(tmp_path / "here"), str(tmp_path / "there"))
        assert duplicate(driver.syncer).wait() is None
        driver.rays_own.wait()


class TestElsewhere:
    def test_ray_s_storage_context_comes_out_whole(self, driver: Driver, tmp_path: Path) -> None:
        context = StorageContext(str(tmp_path), "experiment")
        context.syncer = driver.syncer
        for twin in (copy.deepcopy(context), pickle.loads(cloudpickle.dumps(context))):
            assert type(twin.syncer) is _FilesystemSyncer

    def test_copies_need_nothing_of_this_package(self, driver: Driver, tmp_path: Path) -> None:
        (tmp_path / "std.pkl").write_bytes(pickle.dumps({"syncer": driver.syncer}))
        (tmp_path / "cloud.pkl").write_bytes(cloudpickle.dumps({"syncer": driver.syncer}))
        (tmp_path / "local").mkdir()
        (tmp_path / "local" / "file.txt").write_text("content")
        code = """
import pickle, sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tune_sync_plugin", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
try:
    import tune_sync_plugin
except ModuleNotFoundError:
    pass
else:
    sys.exit("the test is wrong")
for name in ("std", "cloud"):
    syncer = pickle.load(open(f"{name}.pkl", "rb"))["syncer"]
    print(type(syncer).__name__, syncer.sync_up("local", f"{sys.argv[1]}/{name}"), syncer.wait())
"""
        ran = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "remote")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(ray.__file__).parents[1])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split() == ["_FilesystemSyncer", "True", "None"] * 2
        for name in ("std", "cloud"):
            assert (tmp_path / "remote" / name / "file.txt").read_text() == "content"


class TestEverythingElse:
    def test_is_ray_s(self, driver: Driver, tmp_path: Path) -> None:
        assert driver.syncer.sync_period == 7
        assert driver.syncer.sync_timeout == driver.rays_own.sync_timeout
        (tmp_path / "stored").mkdir()
        (tmp_path / "stored" / "tuner.pkl").write_text("x")
        driver.syncer.sync_down(str(tmp_path / "stored"), str(tmp_path / "local"))
        driver.rays_own.wait()
        assert (tmp_path / "local" / "tuner.pkl").exists()

    def test_that_ray_s_has_not_is_an_attribute_error(self, driver: Driver) -> None:
        with pytest.raises(AttributeError, match="no_such_thing"):
            driver.syncer.no_such_thing  # noqa: B018

    def test_is_quick(self, tmp_path: Path) -> None:
        driver = Driver(tmp_path, period_s=0)
        driver.executor.default = Sync(takes=1e9)
        started = time.perf_counter()
        for _ in range(1000):
            driver.snapshot(force=True)
            driver.step_end(0)
        assert time.perf_counter() - started < 1
