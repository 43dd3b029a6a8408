"""Moves the planned files: bounded concurrency, one deadline, retries with backoff and jitter.

Threads do the waiting, the caller's thread does the bookkeeping: outcomes are yielded one by one as
they come, so that the caller can record each before the next one may be lost.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tune_sync_plugin.engine.plan import Reason, Record, Upload
from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import SourceChangedError, is_retryable

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 10.0
# How long storage may fail every single request before the sync stops trying: longer than the
# outages that object stores have and than a gateway's restart.
_OUTAGE_S = 120.0
# So many files refused for good and none accepted: the rest would fare no better.
_REFUSALS = 32


class Outcome(NamedTuple):
    """What became of one planned upload. Exactly one of the last four is set."""

    upload: Upload
    stored: Record | None = None
    same: Record | None = None
    deferred: str | None = None
    error: BaseException | None = None


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


def transfer(
    uploads: Sequence[Upload],
    storage: Storage,
    run_id: str,
    scanned_ns: int,
    limits: Limits,
) -> Iterator[Outcome]:
    """Carry out ``uploads``; yields each one's outcome, in the order in which they end.

    At the deadline it stops waiting: uploads under way and those not begun come out with a
    ``TimeoutError``. Their threads can't be ended from here; whoever owns the process ends it.
    """
    todo = iter(uploads)
    lock = threading.Lock()
    done: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    pending = {upload.entry.path: upload for upload in uploads}
    started: set[str] = set()
    health = _Health(limits)

    def work() -> None:
        while True:
            with lock:
                upload = next(todo, None)
                if upload is None or health.given_up:
                    return
                started.add(upload.entry.path)
            done.put(_upload(upload, storage, run_id, scanned_ns, limits, health))

    for _ in range(min(limits.concurrency, len(uploads))):
        # Daemons: a hung upload must not keep the process from ending.
        threading.Thread(target=work, name="tune_sync_transfer", daemon=True).start()

    while pending:
        remaining = limits.deadline - limits.clock()
        if remaining <= 0:
            # What has ended by now still counts; nothing more is begun.
            health.given_up = "the sync ran out of time"
        try:
            # The short wait is for threads that stopped because storage is out of reach.
            outcome = done.get(timeout=max(0.0, min(remaining, 1.0)))
        except queue.Empty:
            if remaining <= 0:
                break
            with lock:
                idle = not started & pending.keys()
            if health.given_up and idle:
                break
            continue
        del pending[outcome.upload.entry.path]
        yield outcome

    for path, upload in pending.items():
        if limits.clock() >= limits.deadline:
            what = "still under way" if path in started else "not begun"
            error: BaseException = TimeoutError(f"{what} when sync_timeout ran out")
        else:
            error = ConnectionError(f"not tried: {health.given_up}")
        yield Outcome(upload, error=error)


class _Health:
    """What all transfers of one sync know of the storage together."""

    def __init__(self, limits: Limits) -> None:
        self._clock = limits.clock
        self._last_success = limits.clock()
        self._any_success = False
        self._refusals = 0
        self.given_up: str | None = None

    def succeeded(self) -> None:
        self._last_success = self._clock()
        self._any_success = True

    def refused(self, error: BaseException) -> None:
        self._refusals += 1
        if not self._any_success and self._refusals >= _REFUSALS:
            self.given_up = f"storage refused {self._refusals} files and took none; last: {error}"

    def may_retry(self) -> bool:
        outage = self._clock() - self._last_success
        if outage > _OUTAGE_S:
            self.given_up = f"storage has answered nothing but errors for {outage:.0f} s"
        return not self.given_up


def _upload(
    upload: Upload,
    storage: Storage,
    run_id: str,
    scanned_ns: int,
    limits: Limits,
    health: _Health,
) -> Outcome:
    backoff = _FIRST_BACKOFF_S
    while True:
        try:
            with Source(upload.entry) as source:
                racy = source.fingerprint.is_racy(scanned_ns)
                if upload.reason is Reason.UNPROVEN and source.digest() == upload.digest:
                    record = Record(source.fingerprint, upload.digest if racy else None)
                    return Outcome(upload, same=record)
                # What is hashed is what is sent: the file may be written to at the same time.
                source.hashing = racy
                storage.write(upload.entry.path, source, run_id)
                record = Record(source.fingerprint, source.sent_digest)
            health.succeeded()
            return Outcome(upload, stored=record)
        except SourceChangedError as error:
            return Outcome(upload, deferred=str(error))
        # All: an asyncio.CancelledError or a Rust client's panic would end the thread silently.
        except BaseException as error:
            if not is_retryable(error):
                health.refused(error)
                return Outcome(upload, error=error)
            pause = backoff * random.uniform(0.5, 1.0)
            if limits.clock() + pause >= limits.deadline or not health.may_retry():
                return Outcome(upload, error=error)
            time.sleep(pause)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)
