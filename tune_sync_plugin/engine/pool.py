"""Runs many small jobs against a storage: bounded, retried with backoff and jitter, one deadline.

Threads do the waiting, the caller's thread does the bookkeeping: results are yielded one by one as
they come, so that the caller can record each before the next one may be lost. What a job is (an
upload, a download, a comparison) is not known here.
"""

from __future__ import annotations

import functools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tune_sync_plugin.errors import SourceError, describe, is_retryable

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 10.0
# How long storage may fail every single request before we stop trying: longer than the outages
# that object stores have and than a gateway's restart.
_OUTAGE_S = 120.0
# So many files refused for good and none accepted: the rest would fare no better.
_REFUSALS = 32

# What has become of a job that was not begun: 0.
_STARTED, _DONE = 1, 2

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Limits:
    """How hard and how long to try.

    Attributes:
        concurrency: Files on their way at once.
        deadline: On ``clock``'s scale, when to stop.
        clock: Seconds, monotonic.
    """

    concurrency: int
    deadline: float
    clock: Callable[[], float] = time.monotonic

    @classmethod
    def within(cls, seconds: float) -> Limits:
        """For one job that may take so long."""
        return cls(1, time.monotonic() + seconds)


class Health:
    """What all jobs of one run know of the storage together."""

    def __init__(self, limits: Limits) -> None:
        self._clock = limits.clock
        self._last_success = limits.clock()
        self._any_success = False
        self._refusals = 0
        self.given_up: str | None = None

    def succeeded(self) -> None:
        """The storage has just done what it was asked."""
        self._last_success = self._clock()
        self._any_success = True

    def refused(self, error: BaseException) -> None:
        """The storage has refused something for good."""
        self._refusals += 1
        if not self._any_success and self._refusals >= _REFUSALS:
            self.given_up = (
                f"storage refused {self._refusals} files and took none; last: {describe(error)}"
            )

    def may_retry(self) -> bool:
        """Whether there is hope, as far as the other jobs' luck tells."""
        outage = self._clock() - self._last_success
        if outage > _OUTAGE_S:
            self.given_up = f"storage has answered nothing but errors for {outage:.0f} s"
        return not self.given_up


def run(
    jobs: Sequence[T], do: Callable[[T, Health], R], limits: Limits
) -> Iterator[tuple[T, R | BaseException]]:
    """Do all ``jobs``; yields each with its result, or what it failed with, as they end.

    At the deadline it stops waiting: jobs under way and those not begun come out with a
    ``TimeoutError``. Their threads can't be ended from here; whoever owns the process ends it.
    """
    todo = iter(range(len(jobs)))
    lock = threading.Lock()
    done: queue.SimpleQueue[tuple[int, R | BaseException]] = queue.SimpleQueue()
    # One byte a job, since there may be very many.
    states = bytearray(len(jobs))
    left = len(jobs)
    health = Health(limits)
    last_errors: dict[int, BaseException] = {}  # of jobs that are tried once more

    def work() -> None:
        while True:
            with lock:
                over = health.given_up or limits.clock() >= limits.deadline
                number = -1 if over else next(todo, -1)
                if number < 0:
                    return
                states[number] = _STARTED
            failed = functools.partial(last_errors.__setitem__, number)
            done.put((number, _persist(jobs[number], do, limits, health, failed)))

    for _ in range(min(limits.concurrency, len(jobs))):
        # Daemons: a hung request must not keep the process from ending.
        threading.Thread(target=work, name="tune_sync_transfer", daemon=True).start()

    while left:
        remaining = limits.deadline - limits.clock()
        if remaining <= 0:
            # What has ended by now still counts; nothing more is begun.
            health.given_up = "the sync ran out of time"
        try:
            # The short wait is for threads that stopped because storage is out of reach.
            number, result = done.get(timeout=max(0.0, min(remaining, 1.0)))
        except queue.Empty:
            if remaining <= 0:
                break
            with lock:
                idle = _STARTED not in states
            if health.given_up and idle:
                break
            continue
        states[number] = _DONE
        left -= 1
        yield jobs[number], result

    for number, state in enumerate(states):
        if state == _DONE:
            continue
        if limits.clock() >= limits.deadline:
            what = "still under way" if state == _STARTED else "not begun"
            before = last_errors.get(number)
            why = f"; the try before failed: {describe(before)}" if before else ""
            yield jobs[number], TimeoutError(f"{what} when sync_timeout ran out{why}")
        else:
            yield jobs[number], ConnectionError(f"not tried: {health.given_up}")


def once(do: Callable[[], R], limits: Limits) -> R:
    """One job, with the same patience.

    Raises:
        TimeoutError: It did not end before the deadline.
        BaseException: Whatever it failed with for good.
    """
    ((_, result),) = run([None], lambda _, health: do(), limits)
    if isinstance(result, BaseException):
        raise result
    return result


def _persist(
    job: T,
    do: Callable[[T, Health], R],
    limits: Limits,
    health: Health,
    failed: Callable[[BaseException], None],
) -> R | BaseException:
    backoff = _FIRST_BACKOFF_S
    while True:
        try:
            return do(job, health)
        except SourceError as error:
            return error  # the local file's fault, which says nothing about the storage
        # All: an asyncio.CancelledError or a Rust client's panic would end the thread silently.
        except BaseException as error:
            if not is_retryable(error):
                health.refused(error)
                return error
            pause = backoff * random.uniform(0.5, 1.0)
            if limits.clock() + pause >= limits.deadline or not health.may_retry():
                return error
            failed(error)
            time.sleep(pause)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
