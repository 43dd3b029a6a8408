"""Concurrency, retries, deadlines and giving up."""

from __future__ import annotations

import asyncio
import errno
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.fakes import Around, Counting, Failing, Hanging, Meeting, tree
from tests.engine.support import fill, sync_dir, uploads_of
from tune_sync_plugin.engine import pool
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.pool import Limits
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.transfer import Outcome, Transfer
from tune_sync_plugin.errors import SourceError, is_retryable

FAR = 1e9


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the engine would have slept between attempts."""
    slept: list[float] = []
    monkeypatch.setattr(pool.time, "sleep", slept.append)
    yield slept
    monkeypatch.undo()


@pytest.fixture
def there(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path / "storage"))


def run(
    root: Path, storage: Storage, *, concurrency: int = 4, limits: Limits | None = None
) -> dict[str, Outcome]:
    uploads = uploads_of(root)
    limits = limits or Limits(concurrency, time.monotonic() + 60)
    found = list(Transfer(storage, "run", time.time_ns())(uploads, limits))
    outcomes = {outcome.upload.entry.path: outcome for outcome in found}
    assert len(found) == len(outcomes) == len(uploads), "one outcome each"
    for outcome in found:
        assert sum(fact is not None for fact in outcome[1:5]) == 1
    return outcomes


def failed(outcomes: dict[str, Outcome]) -> dict[str, type[BaseException]]:
    return {path: type(o.error) for path, o in outcomes.items() if o.error is not None}


def many(root: Path, count: int) -> Path:
    return fill(root, {f"{n:03}": b"%d" % n for n in range(count)})


def test_nothing_to_do(there: LocalStorage) -> None:
    assert list(Transfer(there, "run", 0)([], Limits(4, FAR))) == []


def test_as_many_at_once_as_allowed(root: Path, there: LocalStorage) -> None:
    """Three writes wait for each other: with fewer at once this would not end well."""
    outcomes = run(many(root, 9), Meeting(there, 3, patience_s=20), concurrency=3)
    assert failed(outcomes) == {}


def test_never_more_at_once_than_allowed(root: Path, there: LocalStorage) -> None:
    storage = Counting(Meeting(there, 3, patience_s=20))
    run(many(root, 60), storage, concurrency=3)
    assert storage.busiest == 3
    one = Counting(there)
    run(root, one, concurrency=1)
    assert (one.busiest, len(one.writes)) == (1, 60)


def test_outcomes_come_as_they_happen(root: Path, there: LocalStorage) -> None:
    """So that each can be recorded before the next one may be lost."""
    storage = Hanging(there, {"001"})
    uploads = uploads_of(many(root, 2))
    outcomes = Transfer(storage, "run", 0)(uploads, Limits(2, time.monotonic() + 60))
    assert next(outcomes).upload.entry.path == "000"
    storage.release()
    assert next(outcomes).stored


# -- errors that pass ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("reset"),
        TimeoutError("slow"),
        OSError("When uploading part for key 'k': AWS Error SLOW_DOWN: HTTP status 503"),
        OSError("HTTP status 500"),
        OSError(errno.EIO, "Input/output error"),
        FileNotFoundError(errno.ENOENT, "the directory vanished"),
        RuntimeError("of a kind nobody knows"),
        asyncio.CancelledError(),
    ],
    ids=repr,
)
def test_fails_three_times_then_works(
    root: Path, there: LocalStorage, pauses: list[float], error: BaseException
) -> None:
    fill(root, {"a": b"1"})
    storage = Failing(there, lambda path: error, times=3)
    assert failed(run(root, storage)) == {}
    assert storage.attempts["a"] == 4
    assert tree(root.parent / "storage") == {"a": b"1"}
    assert len(pauses) == 3


def test_backoff_grows_has_jitter_and_a_ceiling(
    root: Path, there: LocalStorage, pauses: list[float]
) -> None:
    fill(root, {"a": b"1"})
    run(root, Failing(there, lambda path: ConnectionError(), times=12))
    full = [min(0.5 * 2**n, 10.0) for n in range(12)]
    assert all(limit / 2 <= pause <= limit for pause, limit in zip(pauses, full, strict=True))
    assert len({pause / limit for pause, limit in zip(pauses, full, strict=True)}) > 1


def test_a_retry_reads_the_file_from_its_start(
    root: Path, there: LocalStorage, pauses: list[float]
) -> None:
    fill(root, {"a": b"0123456789"})

    class BreaksHalfway(Around):
        broken = False

        def write(self, path: str, source: object, run_id: str) -> None:
            if not self.broken:
                self.broken = True
                next(source.chunks())  # type: ignore[attr-defined]
                raise ConnectionError("halfway")
            super().write(path, source, run_id)  # type: ignore[arg-type]

    assert failed(run(root, BreaksHalfway(there))) == {}
    assert tree(root.parent / "storage") == {"a": b"0123456789"}


def test_no_retry_that_would_end_after_the_deadline(
    root: Path, there: LocalStorage, pauses: list[float]
) -> None:
    fill(root, {"a": b"1"})
    storage = Failing(there, lambda path: ConnectionError("still down"))
    outcomes = run(root, storage, limits=Limits(1, 0.2, clock=lambda: 0.0))
    assert storage.attempts["a"] == 1
    assert str(outcomes["a"].error) == "still down"
    assert pauses == []


# -- errors that stay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Access Denied"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENAMETOOLONG, "File name too long"),
        OSError(errno.EISDIR, "Is a directory"),
        OSError("AWS Error ACCESS_DENIED during PutObject operation: Access Denied."),
        OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation"),
        OSError("AWS Error UNKNOWN (HTTP status 403) during PutObject operation"),
        FileNotFoundError("The specified bucket does not exist"),
        SourceError("reading a failed: Input/output error"),
        NotImplementedError("read-only file system"),
        ValueError("a name this storage can't hold"),
    ],
    ids=repr,
)
def test_fatal_errors_fail_at_once_and_the_others_still_go(
    root: Path, there: LocalStorage, pauses: list[float], error: Exception
) -> None:
    many(root, 5)
    storage = Failing(there, lambda path: error, affects={"002"}.__contains__)
    outcomes = run(root, storage, concurrency=1)
    assert failed(outcomes) == {"002": type(error)}
    assert outcomes["002"].error is error
    assert storage.attempts["002"] == 1
    assert sorted(tree(root.parent / "storage")) == ["000", "001", "003", "004"]
    assert pauses == []


def test_a_key_that_reads_like_an_error_is_none() -> None:
    assert is_retryable(OSError("When uploading key 'AccessDenied/403.txt': connection reset"))


def test_storage_that_refuses_everything_is_left_alone(
    root: Path, there: LocalStorage, pauses: list[float]
) -> None:
    storage = Failing(there, lambda path: PermissionError(13, "Access Denied"))
    outcomes = run(many(root, 100), storage, concurrency=1)
    kinds = list(failed(outcomes).values())
    assert kinds.count(PermissionError) == pool._REFUSALS
    assert kinds.count(ConnectionError) == 100 - pool._REFUSALS
    message = str(outcomes["099"].error)
    assert message.startswith("not tried: storage refused 32 files")
    assert "Access Denied" in message


def test_storage_that_takes_some_gets_all(root: Path, there: LocalStorage) -> None:
    storage = Failing(there, lambda path: PermissionError(13, "no"), affects=lambda p: p != "000")
    outcomes = run(many(root, 100), storage, concurrency=1)
    assert sum(storage.attempts.values()) == 100
    assert set(failed(outcomes).values()) == {PermissionError}


def test_a_total_outage_gives_up(
    root: Path, there: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count()
    monkeypatch.setattr(pool.time, "sleep", lambda pause: None)
    storage = Failing(there, lambda path: ConnectionError("unreachable"))
    # Each look at the clock costs a second, and the deadline is for ever away.
    limits = Limits(2, FAR, clock=lambda: float(next(now)))
    outcomes = run(many(root, 50), storage, limits=limits)
    assert set(failed(outcomes).values()) == {ConnectionError}
    assert len(failed(outcomes)) == 50
    messages = [str(outcome.error) for outcome in outcomes.values()]
    assert any("storage has answered nothing but errors for" in message for message in messages)
    assert len(storage.attempts) < 50


def test_an_outage_that_ends_in_time_costs_nothing_but_time(
    root: Path, there: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    lock = threading.Lock()

    def sleep(pause: float) -> None:
        with lock:
            now[0] += pause

    monkeypatch.setattr(pool.time, "sleep", sleep)

    class Down(Around):
        def write(self, path: str, source: object, run_id: str) -> None:
            if now[0] < pool._OUTAGE_S * 0.8:
                raise ConnectionError("503")
            super().write(path, source, run_id)  # type: ignore[arg-type]

    outcomes = run(many(root, 6), Down(there), limits=Limits(2, FAR, clock=lambda: now[0]))
    assert failed(outcomes) == {}


# -- the deadline --------------------------------------------------------------------------------


def test_a_hang_is_named_at_the_deadline_and_the_others_arrive(
    root: Path, there: LocalStorage
) -> None:
    storage = Hanging(there, {"001"})
    started = time.monotonic()
    try:
        outcomes = run(many(root, 8), storage, limits=Limits(2, started + 1.5))
        elapsed = time.monotonic() - started
        arrived = tree(root.parent / "storage")
    finally:
        storage.release()
    assert failed(outcomes) == {"001": TimeoutError}
    assert "still under way" in str(outcomes["001"].error)
    assert len(arrived) == 7
    assert 1.5 <= elapsed < 15


def test_a_try_that_the_deadline_cuts_off_names_why_it_was_needed(
    root: Path, there: LocalStorage
) -> None:
    hanging = Hanging(there, {"000"})
    storage = Failing(hanging, lambda path: ConnectionError("refused once"), times=1)
    try:
        outcomes = run(many(root, 1), storage, limits=Limits(1, time.monotonic() + 1.5))
    finally:
        hanging.release()
    assert failed(outcomes) == {"000": TimeoutError}
    assert "refused once" in str(outcomes["000"].error)


def test_what_was_not_begun_by_the_deadline_says_so(root: Path, there: LocalStorage) -> None:
    storage = Hanging(there, {"000"})
    try:
        outcomes = run(many(root, 3), storage, limits=Limits(1, time.monotonic() + 0.2))
    finally:
        storage.release()
    assert {path: str(outcome.error) for path, outcome in outcomes.items()} == {
        "000": "still under way when sync_timeout ran out",
        "001": "not begun when sync_timeout ran out",
        "002": "not begun when sync_timeout ran out",
    }


def test_nothing_is_begun_after_the_deadline_however_fast_storage_is(
    root: Path, there: LocalStorage
) -> None:
    now = [0.0]

    class Slow(Around):
        def write(self, path: str, source: object, run_id: str) -> None:
            super().write(path, source, run_id)  # type: ignore[arg-type]
            now[0] += 1.0

    many(root, 400)
    outcomes = run(root, Slow(there), limits=Limits(1, 20.0, clock=lambda: now[0]))
    kinds = set(failed(outcomes).values())
    assert kinds == {TimeoutError}
    assert 300 < len(failed(outcomes)) <= 381


def test_a_report_names_the_path_the_operation_and_the_cause(
    root: Path, there: LocalStorage, manifest: Path
) -> None:
    fill(root, {"a": b"1", "sub/hung": b"2", "sub/refused": b"3"})
    hanging = Hanging(there, {"sub/hung"})
    storage = Failing(
        hanging,
        lambda path: PermissionError(
            "Access Denied at https://key:secret@host/b?X-Amz-Signature=abcdef"
        ),
        affects={"sub/refused"}.__contains__,
    )
    try:
        report = sync_dir(root, storage, manifest, timeout_s=1.5)
    finally:
        hanging.release()
    messages = {failure.path: failure for failure in report.failures}
    assert set(messages) == {"sub/hung", "sub/refused"}
    hung, refused = messages["sub/hung"], messages["sub/refused"]
    assert (hung.trial, hung.error) == ("trial_1", "TimeoutError")
    assert f"upload of {there.name}/sub/hung failed" in hung.message
    assert refused.error == "PermissionError"
    assert "Access Denied" in refused.message
    assert "secret" not in refused.message
    assert "abcdef" not in refused.message
    assert (report.timed_out, report.complete, report.files_uploaded) == (True, False, 1)


def test_a_library_s_timeout_is_no_deadline(
    root: Path, there: LocalStorage, manifest: Path, pauses: list[float]
) -> None:
    """The driver kills a task whose sync timed out; one file's refusal is no reason to."""
    fill(root, {"a": b"1"})
    attempts = itertools.count()

    def refuse(path: str) -> Exception:
        return TimeoutError("read timed out") if next(attempts) < 2 else PermissionError(13, "no")

    report = sync_dir(root, Failing(there, refuse), manifest)
    assert (report.timed_out, report.failures[0].error) == (False, "PermissionError")


def test_only_daemon_threads_are_left_behind(root: Path, there: LocalStorage) -> None:
    storage = Hanging(there, {"000"})
    try:
        run(many(root, 1), storage, limits=Limits(1, time.monotonic() + 0.1))
        left = [t for t in threading.enumerate() if t.name.startswith("tune_sync")]
        assert left
        assert all(thread.daemon for thread in left)
    finally:
        storage.release()
