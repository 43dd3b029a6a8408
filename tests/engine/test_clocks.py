"""Clocks that jump and times that make no sense: a sync skips nothing, the dispatcher is not moved.

The machine's real clock is left alone. Here a wall clock is the real one plus an offset: it says
when a scan starts, and stamps files as the kernel would have, had it been put forward or back.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.engine.fakes import Counting, Watched, tree
from tests.engine.support import fill, sync_dir
from tests.fake_executor import FakeClock, FakeExecutor, Sync
from tune_sync_plugin import dispatcher
from tune_sync_plugin.engine import scan as scan_module
from tune_sync_plugin.engine import sync as sync_module
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.scan import Fingerprint, Scan
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.report import SyncReport

_CLOCK_REALTIME_COARSE = 5  # Linux's; Python does not name it
NS = 10**9
HOUR = 3600 * NS
NAMES = ["a", "b"]
# Before 1970, at its beginning, long ago, in a hundred years; whole seconds and not.
TIMES = [-HOUR, -1, 0, 1, NS, 10**18, 10**18 + 7, 4 * 10**18, 4 * 10**18 + 7]


class WallClock:
    """The machine's clock, as this test moves it.

    Args:
        coarse: Whether the file system keeps whole seconds only, as ext3 and HFS+ do.
    """

    def __init__(self, *, coarse: bool = False) -> None:
        self._coarse = coarse
        self._jumps = [(_tick_ns(), 0)]  # from when on, and by how much it is off in total

    def now_ns(self) -> int:
        return self._shown(time.time_ns())

    def jump(self, by_ns: int) -> None:
        # What was written before keeps the old clock's stamp, so that tick must be over.
        before = _tick_ns()
        while (now := _tick_ns()) == before:
            time.sleep(0.001)
        self._jumps.append((now, self._jumps[-1][1] + by_ns))

    def _shown(self, real_ns: int) -> int:
        """What this clock shows, or stamped, at that time of the real one.

        Times outside of the test's are none of the kernel's: somebody set them, and they stand.
        """
        if not self._jumps[0][0] <= real_ns <= time.time_ns():
            return real_ns
        return real_ns + next(off for since, off in reversed(self._jumps) if since <= real_ns)

    def _stamped(self, real_ns: int) -> int:
        shown = self._shown(real_ns)
        return shown // NS * NS if self._coarse else shown

    @contextlib.contextmanager
    def rules(self) -> Iterator[WallClock]:
        """Make the engine see this clock."""
        exact = Fingerprint.of

        def of(status: os.stat_result) -> Fingerprint:
            size, mtime_ns, ctime_ns, inode = exact(status)
            return Fingerprint(size, self._stamped(mtime_ns), self._stamped(ctime_ns), inode)

        def begin() -> Scan:
            return Scan(started_ns=self.now_ns())

        with (
            mock.patch.object(Fingerprint, "of", staticmethod(of)),
            mock.patch.object(scan_module, "Scan", begin),
        ):
            yield self


def _tick_ns() -> int:
    """The time that the kernel stamps files with, which lags behind by up to a tick."""
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


class JumpingClock(RuleBasedStateMachine):
    """Writes, jumps, set times and syncs in any order; storage must have what the disk has."""

    coarse = False

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="tune_sync_clocks-"))
        self.root = self.base / "trial"
        self.root.mkdir()
        self.clock = WallClock(coarse=self.coarse)
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self.clock.rules())

    def teardown(self) -> None:
        self.sync()
        self._stack.close()
        shutil.rmtree(self.base)

    @rule(name=st.sampled_from(NAMES), content=st.binary(min_size=2, max_size=3))
    def write(self, name: str, content: bytes) -> None:
        (self.root / name).write_bytes(content)

    @rule(name=st.sampled_from(NAMES), restore_mtime=st.booleans())
    def rewrite_same_size(self, name: str, restore_mtime: bool) -> None:
        file = self.root / name
        if file.exists():
            before = file.stat()
            content = bytes(byte ^ 1 for byte in file.read_bytes())
            with file.open("r+b") as out:
                out.write(content)
            if restore_mtime:
                os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    @rule(name=st.sampled_from(NAMES), mtime_ns=st.sampled_from(TIMES))
    def set_time(self, name: str, mtime_ns: int) -> None:
        if (self.root / name).exists():
            os.utime(self.root / name, ns=(0, mtime_ns))

    @rule(name=st.sampled_from(NAMES), by_ns=st.sampled_from([-HOUR, HOUR]))
    def set_time_around_now(self, name: str, by_ns: int) -> None:
        if (self.root / name).exists():
            mtime_ns = self.clock.now_ns() + by_ns
            os.utime(self.root / name, ns=(0, mtime_ns))

    @rule()
    def jump_back(self) -> None:
        self.clock.jump(-HOUR)

    @rule()
    def jump_forward(self) -> None:
        self.clock.jump(HOUR)

    @rule()
    def sync(self) -> None:
        report = sync_dir(
            self.root, LocalStorage(str(self.base / "storage")), self.base / "m.sqlite"
        )
        assert report.complete, report.failures
        assert tree(self.base / "storage") == tree(self.root)


class CoarseJumpingClock(JumpingClock):
    """The same where files are stamped with whole seconds.

    The clock is put forward only when everything is synced. Otherwise it could come back to the
    very second of an earlier version, see a rewrite of the same size, and have left that second
    again before the next sync: no ``stat`` can tell those two apart.
    """

    coarse = True

    @rule()
    def jump_forward(self) -> None:
        self.sync()
        super().jump_forward()
        self.sync()  # from now on the files' times count as past


_settings = settings(
    max_examples=100,
    stateful_step_count=15,
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestJumps = JumpingClock.TestCase
TestJumps.settings = _settings
TestCoarseJumps = CoarseJumpingClock.TestCase
TestCoarseJumps.settings = _settings


# -- one by one ------------------------------------------------------------------------------------


def _rewrite(file: Path, content: bytes) -> None:
    with file.open("r+b") as out:
        out.write(content)


@pytest.mark.parametrize("by_ns", [-HOUR, HOUR])
def test_a_rewrite_after_a_jump_is_seen(root: Path, manifest: Path, by_ns: int) -> None:
    there = root.parent / "storage"
    fill(root, {"a": b"1", "b": b"2"})
    with WallClock().rules() as clock:
        sync_dir(root, LocalStorage(str(there)), manifest)
        clock.jump(by_ns)
        _rewrite(root / "a", b"3")
        sync_dir(root, LocalStorage(str(there)), manifest)
    assert tree(there) == {"a": b"3", "b": b"2"}


def test_a_second_that_comes_again_is_not_trusted(root: Path, manifest: Path) -> None:
    """A record from when the file's time was past is no proof once that time is now."""
    there = root.parent / "storage"
    with WallClock(coarse=True).rules() as clock:
        if time.time() % 1 > 0.5:  # so that both versions are of one second
            time.sleep(0.6)
        fill(root, {"a": b"1"})
        clock.jump(HOUR)
        sync_dir(root, LocalStorage(str(there)), manifest)
        clock.jump(-HOUR)
        _rewrite(root / "a", b"2")
        sync_dir(root, LocalStorage(str(there)), manifest)
    assert tree(there) == {"a": b"2"}


@pytest.mark.parametrize(
    "mtime_ns", [*TIMES, time.time_ns() + HOUR], ids=[*map(str, TIMES), "in an hour"]
)
def test_files_with_odd_times_arrive_and_go_once(root: Path, manifest: Path, mtime_ns: int) -> None:
    there = root.parent / "storage"
    storage = Counting(LocalStorage(str(there)))
    fill(root, {"a": b"1"})
    os.utime(root / "a", ns=(0, mtime_ns))
    for _ in range(3):
        assert sync_dir(root, storage, manifest).complete
    assert tree(there) == {"a": b"1"}
    # A time that is still to come proves nothing: compared each time, and yet sent once.
    assert storage.writes == ["a"]
    _rewrite(root / "a", b"2")
    os.utime(root / "a", ns=(0, mtime_ns))
    assert sync_dir(root, storage, manifest).complete
    assert tree(there) == {"a": b"2"}


# -- what else keeps time --------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [-3600, 3600])
def test_jumps_do_not_move_the_dispatcher(jump_s: float) -> None:
    steady, wall = FakeClock(), FakeClock()
    executor = FakeExecutor(steady, "A", 1000)
    executor.default = Sync(takes=1)
    reports: list[SyncReport] = []
    under_test = _with_clocks(dispatcher, steady, wall).Dispatcher(
        executor,
        lambda key, node, report: reports.append(report),
        period_s=30,
        timeout_s=1000,
        max_syncs_per_node=2,
    )
    for key in ("kept", "slow"):
        under_test.add_target(key)
        under_test.set_places(key, {"A": key})

    def run(seconds: float) -> None:
        steady.advance(seconds)
        wall.advance(seconds)
        with executor.polling():
            under_test.poll()

    executor.will("slow", Sync(takes=900))
    under_test.request("kept", forced=False)
    under_test.request("slow", forced=False)
    run(0)
    run(5)
    wall.advance(jump_s)
    under_test.request("kept", forced=False)
    run(20)
    assert executor.times("kept") == [0], "sooner than the period, since the clock went forward"
    run(6)
    assert executor.times("kept") == [0, 31], "not when the period was over"
    run(900)
    assert not executor.kills, "what was under way was taken to have run out of time"
    assert [report.failures for report in reports] == [(), (), ()]


def test_jumps_do_not_end_a_sync(root: Path, manifest: Path) -> None:
    """A sync has its ``timeout_s`` by a clock that nobody moves."""
    fill(root, {"a": b"1", "b": b"2"})
    steady, wall = FakeClock(), FakeClock()
    copy = _with_clocks(sync_module, steady, wall)
    storage = Watched(
        LocalStorage(str(root.parent / "storage")), lambda *moment: wall.advance(3600)
    )
    report = copy.sync([str(root)], storage, str(manifest), SyncOptions(timeout_s=60))
    assert report.complete
    assert report.duration_s == 0
    assert tree(root.parent / "storage") == {"a": b"1", "b": b"2"}


def _with_clocks(module: ModuleType, steady: FakeClock, wall: FakeClock) -> ModuleType:
    """A fresh copy of a module, for which these are the machine's clocks: defaults included."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_copy", str(module.__file__))
    assert spec
    assert spec.loader
    copy = importlib.util.module_from_spec(spec)
    clocks = SimpleNamespace(monotonic=steady, time=wall, time_ns=lambda: int(wall.now * NS))
    with mock.patch.dict(sys.modules, {"time": clocks, spec.name: copy}):  # type: ignore[dict-item]
        spec.loader.exec_module(copy)
    return copy
