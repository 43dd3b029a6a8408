"""S3 that breaks while the engine syncs to it: what arrives, what is reported, what it costs.

What belongs here: `sync()` on a real S3 server behind a proxy that breaks the traffic, through both
clients that users have. The same storage below a Tune run: test_storage_faults_in_runs.py.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.support import fill, sync_dir
from tests.support.proxy import Stats
from tests.support.retries import TRIES, most_requests, most_writes
from tests.support.scenarios import Link
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.report import SyncReport

# pyarrow does it alone where its options can't be carried over to obstore: rare, and slow here.
CLIENTS = [
    "obstore",
    pytest.param("pyarrow", marks=pytest.mark.exhaustive),
    pytest.param("s3fs", marks=pytest.mark.slow),
]
SMALL, BIG = 1000, 12_000_000  # several parts by all
# The requests for one file if nothing fails. pyarrow begins an upload, sends its parts (of 10 MB)
# and completes it, also for a small file; the others do that only for a big one. Then S3
# is asked what it has, where the client does not pass on what it has said.
NEEDED = {
    "obstore": {SMALL: 1, BIG: 4},
    "pyarrow": {SMALL: 4, BIG: 5},
    "s3fs": {SMALL: 2, BIG: 5},
}
CONCURRENCY = 64  # files on their way at once, by default


class Bench(NamedTuple):
    """A directory to sync, and the prefix it goes to."""

    root: Path
    manifest: Path
    storage: Storage
    prefix: str
    link: Link

    def sync(self, timeout_s: float = 100) -> SyncReport:
        return sync_dir(self.root, self.storage, self.manifest, timeout_s=timeout_s)

    def written(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.root.iterdir()}

    def stored(self) -> dict[str, bytes]:
        return self.link.s3.contents(self.prefix)

    def stats(self) -> Stats:
        return self.link.proxy.stats()


@pytest.fixture
def bench(link: Link, tmp_path: Path) -> Callable[..., Bench]:
    def make(client: str, **options: Any) -> Bench:
        root = tmp_path / "trial"
        root.mkdir()
        prefix, port = link.prefix(), link.proxy.port
        if client == "s3fs":
            filesystem = link.s3.s3fs_fs(port, default_block_size=5 << 20, **options)
        else:
            if client == "pyarrow":
                options["default_metadata"] = {"Content-Type": "text/plain"}
            filesystem = link.s3.arrow_fs(port, **options)
        storage = storage_at(filesystem, f"{link.s3.bucket}/{prefix}")
        return Bench(root, tmp_path / "manifests" / "m", storage, prefix, link)

    return make


def contents(small: int, big: int, seed: int) -> dict[str, bytes]:
    """Files that no two seeds share."""
    source = random.Random(seed)
    files = {f"small_{n}.txt": source.randbytes(SMALL) for n in range(small)}
    return files | {f"big_{n}.bin": source.randbytes(BIG) for n in range(big)}


def sizes(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))


def right(written: dict[str, bytes], stored: dict[str, bytes]) -> int:
    """Bytes of files that are in storage as they were written."""
    return sum(len(data) for path, data in written.items() if stored.get(path) == data)


# -- a share of the requests fails -----------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("fault", "fraction"),
    [("status:503", 0.3), ("status:500", 0.3), ("reset", 0.3), ("lose", 0.2)],
)
def test_everything_arrives_though_requests_fail(
    bench: Callable[..., Bench],
    figure: Callable[..., None],
    client: str,
    fault: str,
    fraction: float,
) -> None:
    _all_arrive_though(bench, figure, client, fault, fraction)


@pytest.mark.slow
def test_everything_arrives_though_answers_are_slow(
    bench: Callable[..., Bench], figure: Callable[..., None]
) -> None:
    _all_arrive_though(bench, figure, "obstore", "delay:10", 0.1)


def _all_arrive_though(
    bench: Callable[..., Bench],
    figure: Callable[..., None],
    client: str,
    fault: str,
    fraction: float,
) -> None:
    place = bench(client)
    files = contents(small=30, big=2, seed=1)
    fill(place.root, files)
    place.link.proxy.add_rule(f"/{place.prefix}/", fault, fraction=fraction, seed=3)
    report = place.sync()
    stored, seen = place.stored(), place.stats()
    assert stored == files
    assert report.complete
    assert report.files_uploaded == len(files)

    # The bound. Each request that failed is sent once more by the client; only if all its tries
    # for one thing fail (so at most every third request that failed, with pyarrow) does the file
    # start anew, after a pause, and costs what had been done for it as well: all but one of the
    # requests it needs, and one that takes back what was begun.
    needed = sum(NEEDED[client][len(data)] for data in files.values())
    failed = sum(record.action is not None for record in seen.records)
    assert failed >= 0.3 * fraction * needed, "the rule did not hit"
    anew = failed // TRIES[client]
    assert seen.requests <= needed + failed + anew * max(NEEDED[client].values())
    figure(
        f"{fault} for {fraction:.0%} of requests, {client}",
        written=sizes(files),
        stored=right(files, stored),
        lost=0,
        more=f"{seen.requests} requests, {failed} of them failed, {needed} without faults",
    )
    place.link.proxy.reset_stats()
    assert place.sync().files_uploaded == place.stats().requests == 0


@pytest.mark.parametrize(
    ("client", "outage_s"),
    [
        ("obstore", 6),
        pytest.param("obstore", 60, marks=pytest.mark.exhaustive),
        pytest.param("pyarrow", 6, marks=pytest.mark.exhaustive),
        pytest.param("s3fs", 6, marks=pytest.mark.slow),
    ],
)
def test_everything_arrives_after_an_outage(
    bench: Callable[..., Bench], figure: Callable[..., None], client: str, outage_s: float
) -> None:
    place = bench(client)
    files = contents(small=30, big=1, seed=2)
    fill(place.root, files)
    place.link.proxy.add_rule("", "reset")
    over = threading.Timer(outage_s, place.link.proxy.clear_rules)
    over.start()
    started = time.monotonic()
    report = place.sync(timeout_s=outage_s + 100)
    took = time.monotonic() - started
    over.join()
    stored, seen = place.stored(), place.stats()
    assert stored == files
    assert report.complete
    assert took >= outage_s, "there was no outage"

    # The bound: all files are on their way at once, each with the engine's and the client's pauses.
    failed = [record for record in seen.records if record.action]
    lasted = failed[-1].started_s - failed[0].started_s
    most = most_requests(client, len(files), lasted)
    assert len(files) <= len(failed) <= most
    # Nor does the end of the outage let loose what had piled up.
    needed = sum(NEEDED[client][len(data)] for data in files.values())
    assert seen.requests - len(failed) == needed
    figure(
        f"outage of {outage_s} s, {client}",
        written=sizes(files),
        stored=right(files, stored),
        lost=0,
        more=f"{len(failed)} requests during it, at most {most}; synced after {took:.0f} s",
    )


# -- one file is refused for good ------------------------------------------------------------------


class Step(NamedTuple):
    """One of the requests that make up an upload, as the proxy can tell it."""

    operation: str
    regex: str
    method: str
    size: int


PART = Step("UploadPart", r"partNumber=", "PUT", BIG)
SMALL_PART = Step("UploadPart", r"partNumber=", "PUT", SMALL)
COMPLETE = Step("CompleteMultipartUpload", r"\?uploadId=", "POST", BIG)
PUT = Step("PutObject", r"\.bin(\?|$)", "PUT", SMALL)


@pytest.mark.parametrize("status", [403, 500])
@pytest.mark.parametrize(
    ("client", "step"),
    [
        ("obstore", PUT),
        ("obstore", PART),
        ("obstore", COMPLETE),
        pytest.param("pyarrow", PART, marks=pytest.mark.exhaustive),
        pytest.param("pyarrow", SMALL_PART, marks=pytest.mark.exhaustive),
        pytest.param("pyarrow", COMPLETE, marks=pytest.mark.exhaustive),
        pytest.param("s3fs", PUT, marks=pytest.mark.slow),
        pytest.param("s3fs", PART, marks=pytest.mark.exhaustive),
        pytest.param("s3fs", COMPLETE, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.operation} {value.size}",
)
def test_a_file_that_is_refused_for_good_is_named_until_it_arrives(
    bench: Callable[..., Bench], figure: Callable[..., None], client: str, step: Step, status: int
) -> None:
    # Two tries of its own, so that it leaves the engine time to try again within the sync.
    options = {"config_kwargs": {"retries": {"total_max_attempts": 2}}} if client == "s3fs" else {}
    place = bench(client, **options)

    def target(seed: int) -> dict[str, bytes]:
        return {"target.bin": random.Random(seed).randbytes(step.size)}

    old = contents(small=5, big=1, seed=3) | target(4)
    fill(place.root, old)
    assert place.sync().complete
    assert place.stored() == old

    new = contents(small=5, big=1, seed=5) | target(6)
    fill(place.root, new)
    place.link.proxy.add_rule(f"/target.*{step.regex}", f"status:{status}", method=step.method)
    place.link.proxy.reset_stats()
    # 500 is tried again within the sync, for as long as it may take; 403 waits for the next.
    timeout_s, syncs = (20, 2) if status == 403 else (4, 1)
    for attempt in range(syncs):
        report = place.sync(timeout_s)
        refused = place.stats().select(step.method, f"/target.*{step.regex}").records
        stored = place.stored()
        # All others are new, and this one is not half of anything.
        assert stored == new | {"target.bin": old["target.bin"]}
        assert not report.complete
        assert report.files_uploaded == (6 if attempt == 0 else 0)
        (failure,) = report.failures
        assert failure.path == "target.bin"
        assert f"{place.link.s3.bucket}/{place.prefix}/target.bin" in failure.message
        assert step.operation in failure.message
        cause = {403: r"ACCESS_DENIED|AccessDenied", 500: r"INTERNAL_FAILURE|InternalError"}
        assert re.search(cause[status], failure.message)
        # More than the client does by itself, and not more than the engine's pauses allow.
        # obstore drops the other part at the first one's refusal, without waiting for its answer.
        assert {record.status for record in refused} - {None} == {status}
        parts = 2 if client != "s3fs" and step is PART else 1
        if status == 403:
            assert 1 <= len(refused) <= parts
        else:
            by_client = {"obstore": 5, "pyarrow": 3, "s3fs": 2}[client] * parts
            assert by_client < len(refused) <= by_client * most_writes(timeout_s)
        others = place.stats().select("PUT", r"/(small|big)_").requests
        assert (others > 0) == (attempt == 0), "what had arrived was sent again"
        place.link.proxy.reset_stats()
    figure(
        f"{step.operation} of a {step.size:,} B file answered {status}, {client}",
        written=sizes(new),
        stored=right(new, stored),
        lost=sum(len(new[failure.path]) for failure in report.failures),
        more="by name; its old version stays whole",
    )

    place.link.proxy.clear_rules()
    report = place.sync()
    assert report.complete
    assert report.files_uploaded == 1
    assert place.stored() == new


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("status:403", r"ACCESS_DENIED|AccessDenied"),
        ("status:404:NoSuchBucket", r"NO_SUCH_BUCKET|NoSuchBucket"),
    ],
)
def test_a_storage_that_refuses_everything_is_asked_once_per_file(
    bench: Callable[..., Bench], figure: Callable[..., None], client: str, answer: str, cause: str
) -> None:
    place = bench(client)
    files = contents(small=200, big=0, seed=6)
    fill(place.root, files)
    place.link.proxy.add_rule("", answer)
    report = place.sync()
    assert {failure.path for failure in report.failures} == files.keys()
    assert all(re.search(cause, failure.message) for failure in report.failures)
    # After 32 refusals (and what was under way then) the rest would fare no better.
    assert place.stats().requests <= 32 + CONCURRENCY
    assert place.stored() == {}
    figure(
        f"{answer} for everything, {client}",
        written=sizes(files),
        stored=0,
        lost=sum(len(files[failure.path]) for failure in report.failures),
        more=f"{place.stats().requests} requests for 200 files",
    )
    place.link.proxy.clear_rules()
    assert place.sync().complete
    assert place.stored() == files
