"""The processes that syncs run in: how many, how long, at which priority, and whose they are."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.fake_executor import FakeClock
from tests.support.cluster import LocalCluster
from tune_sync_plugin import SyncCallback, SyncConfig, executor, tasks
from tune_sync_plugin.directories import Run, SyncJob
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.events import Started, Synced
from tune_sync_plugin.executor import RayExecutor
from tune_sync_plugin.runs import RunFacts
from tune_sync_plugin.workers import Workers

HERE, THERE = "here", "there"


class Pool:
    """Workers without processes."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.refuses = False
        self.workers = Workers(self._start, self.stopped.append, HERE, self.clock)

    def _start(self, node_id: str) -> str:
        if self.refuses:
            raise ValueError("no such node")
        self.started.append(node_id)
        return f"{node_id} {len(self.started)}"

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(seconds)):
            self.clock.advance(1)
            self.workers.end_idle()


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_a_node_has_one_ready_however_many_trials_come_to_it(pool: Pool) -> None:
    for _ in range(5):
        pool.workers.warm_up(HERE)
    pool.workers.warm_up(THERE)
    assert pool.started == [HERE, THERE]


def test_warming_up_never_raises(pool: Pool) -> None:
    pool.refuses = True
    pool.workers.warm_up(HERE)
    with pytest.raises(ValueError, match="no such node"):
        pool.workers.take(HERE)


def test_the_same_one_is_lent_again_and_again(pool: Pool) -> None:
    pool.workers.warm_up(HERE)
    for _ in range(10):
        assert pool.workers.has_room(HERE, "trials")
        pool.workers.give_back(pool.workers.take(HERE))
    assert pool.started == [HERE]


def test_another_is_started_when_the_first_is_kept_busy(pool: Pool) -> None:
    first = pool.workers.take(HERE)
    first.runs = True
    assert not pool.workers.has_room(HERE, "trials")
    pool.clock.advance(0.9)
    assert not pool.workers.has_room(HERE, "trials")
    pool.clock.advance(0.2)
    assert pool.workers.has_room(HERE, "trials")
    assert pool.workers.take(HERE) is not first
    assert pool.workers.has_room(THERE, "trials"), "other nodes have nothing to do with it"


def test_no_other_is_started_while_one_starts_unless_that_takes_too_long(pool: Pool) -> None:
    pool.workers.take(HERE)
    assert not pool.workers.has_room(HERE, "trials")
    pool.clock.advance(9)
    assert not pool.workers.has_room(HERE, "trials")
    pool.clock.advance(2)
    assert pool.workers.has_room(HERE, "trials")


def test_each_waits_on_its_own_account(pool: Pool) -> None:
    pool.workers.take(HERE).runs = True
    assert not pool.workers.has_room(HERE, "trials")
    pool.clock.advance(1)
    assert not pool.workers.has_room(HERE, "the experiment")
    assert pool.workers.has_room(HERE, "trials")
    assert not pool.workers.has_room(HERE, "trials"), "from now on it waits anew"


def test_one_that_has_started_is_lent_before_one_that_has_not(pool: Pool) -> None:
    first = pool.workers.take(HERE)
    second = pool.workers.take(HERE)
    pool.workers.give_back(second)
    first.idle_since = pool.clock() + 1
    assert pool.workers.take(HERE) is second


def test_one_that_was_ended_is_not_lent_again(pool: Pool) -> None:
    worker = pool.workers.take(HERE)
    pool.workers.end(worker)
    pool.workers.end(worker)
    assert pool.stopped == [f"{HERE} 1"]
    assert pool.workers.take(HERE) is not worker


def test_what_idles_elsewhere_is_let_go_so_that_its_node_can_be(pool: Pool) -> None:
    pool.workers.warm_up(HERE)
    pool.workers.warm_up(THERE)
    busy = pool.workers.take("elsewhere")
    pool.pass_time(50)
    pool.workers.give_back(pool.workers.take(THERE))
    pool.pass_time(50)
    assert pool.stopped == []
    pool.pass_time(30)
    assert pool.stopped == [f"{THERE} 2"]
    pool.workers.close()
    assert sorted(pool.stopped[1:]) == ["elsewhere 3", f"{HERE} 1"]
    assert busy.actor in pool.stopped


# -- real processes -----------------------------------------------------------------------------


@pytest.fixture
def running(cluster: LocalCluster, storage: Path) -> Iterator[RayExecutor]:
    run = Run(
        pyarrow.fs.LocalFileSystem(), "run", "driver-1", str(storage), "mark", RunFacts("r1", "now")
    )
    (storage / "mark").touch()
    executor = RayExecutor(run, cluster.head_node_id)
    yield executor
    executor.close()


def on(node_id: str, function: Callable[..., Any]) -> Any:
    """What a user's task there returns."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0)(function).options(scheduling_strategy=strategy)
    return ray.get(task.remote(), timeout=60)


def pid_and_priorities(*_: Any) -> tuple[int, int, int]:
    """This process, this thread's priority, and that of a thread it starts."""
    found: list[int] = []

    def look() -> None:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    look()
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return os.getpid(), found[0], found[1]


def test_transfers_run_at_a_lower_priority_and_no_task_of_the_users_ever_does(
    running: RayExecutor, cluster: LocalCluster
) -> None:
    node = cluster.node_ids[0]
    _, usual, _ = on(node, pid_and_priorities)
    sync_pid, of_sync, of_transfer = running.result(running.call(node, pid_and_priorities), 60)
    assert usual < of_sync == of_transfer
    running.close()
    for _ in range(5):
        assert on(node, pid_and_priorities)[1:] == (usual, usual)
        assert on(node, pid_and_priorities)[0] != sync_pid
    deadline = time.monotonic() + 30
    while Path(f"/proc/{sync_pid}").exists():
        assert time.monotonic() < deadline, "the process outlives the run"
        time.sleep(0.05)


def hang(path: Path, run: Run) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(300)


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_named_in_our_words(
    running: RayExecutor, cluster: LocalCluster
) -> None:
    said = r"WorkerCrashedError: the process or its node ended: "
    with pytest.raises(RuntimeError, match=said):
        running.result(running.call(cluster.node_ids[0], die), 60)


def test_a_call_that_hangs_is_killed_with_its_process(
    running: RayExecutor, cluster: LocalCluster, storage: Path
) -> None:
    note = storage / "pid"
    call = running.call(cluster.node_ids[0], hang, note)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(TimeoutError):
        running.result(call, 0.1)
    while Path(f"/proc/{note.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def leave_a_thread(run: Run) -> int:
    threading.Thread(target=threading.Event().wait, name="tune_sync_transfer", daemon=True).start()
    return os.getpid()


def pid(run: Run) -> int:
    return os.getpid()


def sync_once(running: RayExecutor, node: str, storage: Path) -> Synced:
    job = SyncJob("t", ("nothing_there",), str(storage / "t"), SyncOptions())
    batch = running.submit(node, [job], 60)
    events: list[Any] = []
    while not (events and isinstance(events[-1], Synced)):
        running.wait([batch], 60)
        events += running.poll(batch)
    assert isinstance(events[0], Started)
    assert events[-1].report.complete, events[-1].report
    return events[-1]


def test_a_process_in_which_something_hangs_is_not_used_again(
    running: RayExecutor, cluster: LocalCluster, storage: Path
) -> None:
    node = cluster.node_ids[0]
    assert sync_once(running, node, storage).reusable
    first = running.result(running.call(node, leave_a_thread), 60)
    assert not sync_once(running, node, storage).reusable
    assert running.result(running.call(node, pid), 60) != first


def test_a_thread_that_is_about_to_end_does_not_count() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, name="tune_sync_transfer", daemon=True)
    thread.start()
    assert not tasks._nothing_hangs()
    go_on.set()
    assert tasks._nothing_hangs()


class Watch(tune.Callback):
    """Notes the pids of the sync workers at each result, and at the end."""

    def __init__(self, callback: SyncCallback) -> None:
        self.callback = callback
        self.early: set[int] = set()
        self.late: set[int] = set()

    def _pids(self) -> set[int]:
        assert self.callback._active
        pool = self.callback._active._executor._workers
        workers = [worker for workers in pool._workers.values() for worker in workers]
        ask = [worker.actor.__ray_call__.remote(lambda _: os.getpid()) for worker in workers]
        return set(ray.get(ask, timeout=60))

    def on_trial_result(self, **info: Any) -> None:
        if not self.early:
            self.early = self._pids()

    def on_experiment_end(self, **info: Any) -> None:
        self.late = self._pids()


def _train(config: dict[str, Any]) -> None:
    # Longer than Ray lets a task's process idle while all CPUs are taken.
    for step in range(6):
        time.sleep(0.6)
        tune.report({"step": step})
    Path("last.txt").write_text("last")


def test_the_last_syncs_of_a_run_find_the_processes_of_the_first(
    cluster: LocalCluster, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    start = executor.start_worker

    def counted(run: bytes, node_id: str) -> Any:
        started.append(node_id)
        return start(run, node_id)

    monkeypatch.setattr(executor, "start_worker", counted)
    callback = SyncCallback()
    watch = Watch(callback)
    tune.Tuner(
        tune.with_resources(_train, {"CPU": 2}),
        param_space={"x": tune.grid_search([1, 2])},
        run_config=tune.RunConfig(
            name="exp",
            storage_path=str(storage),
            sync_config=SyncConfig(sync_artifacts=True),
            callbacks=[callback, watch],
            verbose=0,
        ),
    ).fit()
    assert not callback.report.failures
    assert len(list((storage / "exp").glob("*/last.txt"))) == 2
    assert set(started) == {cluster.head_node_id, *cluster.node_ids[:2]}
    assert watch.early <= watch.late
    assert len(watch.late) == len(started)
    assert callback._active is None
