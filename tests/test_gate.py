"""Promises that a driver keeps, and how those who wait are let through if it can't."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import pytest
import ray

from tests.support.restarts import wait_until
from tune_sync_plugin.gate import Gates

pytestmark = pytest.mark.usefixtures("cluster")

# Until a worker process has started, on a busy machine.
PATIENCE_S = 60.0


@ray.remote(num_cpus=0)
def waits(promises: list[ray.ObjectRef], timeout_s: float) -> int:
    """As a trial's attach waits: in another process, for a reference inside an argument."""
    return len(ray.wait(promises, timeout=timeout_s, fetch_local=False)[0])


@pytest.fixture
def gates() -> Iterator[Gates]:
    gates = Gates()
    yield gates
    gates.close()


def is_ready(promise: ray.ObjectRef, timeout_s: float = PATIENCE_S) -> bool:
    return bool(ray.wait([promise], timeout=timeout_s, fetch_local=False)[0])


def test_a_promise_is_pending_until_it_is_kept(gates: Gates) -> None:
    promise, other = gates.promise(), gates.promise()
    gates.open(other)
    assert is_ready(other), "the actor runs"
    assert not is_ready(promise, 1)
    waiting = waits.remote([promise], PATIENCE_S)
    assert not is_ready(waiting, 2)
    gates.open(promise)
    assert ray.get(waiting, timeout=PATIENCE_S) == 1
    assert ray.get(promise, timeout=PATIENCE_S) is None


def test_one_that_is_kept_before_anybody_waits(gates: Gates) -> None:
    promise = gates.promise()
    gates.open(promise)
    assert is_ready(promise)
    assert ray.get(waits.remote([promise], PATIENCE_S)) == 1


def test_keeping_it_twice_changes_nothing(gates: Gates) -> None:
    promise, other = gates.promise(), gates.promise()
    gates.open(promise)
    gates.open(promise)
    assert is_ready(promise)
    assert not is_ready(other, 1)


def test_many_promises_each_kept_alone(gates: Gates) -> None:
    promises = [gates.promise() for _ in range(500)]
    for promise in promises[::2]:
        gates.open(promise)
    ready, pending = ray.wait(promises, num_returns=250, timeout=PATIENCE_S)
    assert set(ready) == set(promises[::2])
    for promise in pending:
        gates.open(promise)
    assert ray.get(promises, timeout=PATIENCE_S) == [None] * 500


def actor_pid(gates: Gates) -> int:
    return ray.get(gates._actor.__ray_call__.remote(lambda actor: os.getpid()))


def _answers(gates: Gates) -> bool:
    with contextlib.suppress(ray.exceptions.RayActorError):
        return actor_pid(gates) > 0
    return False


def test_those_who_wait_when_the_actor_dies_go_on(gates: Gates) -> None:
    promise = gates.promise()
    waiting = waits.remote([promise], PATIENCE_S)
    os.kill(actor_pid(gates), signal.SIGKILL)
    assert ray.get(waiting) == 1
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(promise)
    gates.open(promise)  # nothing happens, and nothing is raised


def test_promises_are_kept_again_after_the_actor_died(gates: Gates) -> None:
    first = gates.promise()
    os.kill(actor_pid(gates), signal.SIGKILL)
    assert is_ready(first)
    wait_until(lambda: _answers(gates))  # what it is asked while it is dying fails as well
    later = gates.promise()
    waiting = waits.remote([later], PATIENCE_S)
    assert not is_ready(later, 2), "the next trial is not restored before its flush"
    gates.open(later)
    assert ray.get(waiting) == 1
    assert ray.get(later) is None


def test_closing_lets_everybody_through(gates: Gates) -> None:
    promises = [gates.promise() for _ in range(3)]
    waiting = waits.remote(promises[:1], PATIENCE_S)
    gates.open(promises[2])
    assert is_ready(promises[2])
    gates.close()
    start = time.monotonic()
    assert ray.get(waiting) == 1
    assert all(map(is_ready, promises))
    assert time.monotonic() - start < PATIENCE_S / 2
    gates.open(promises[0])
    gates.close()
