"""What a sync costs, in requests, bytes, transactions and system calls: never in seconds.

Small sizes of the cases that ``python -m benchmarks`` times; whatever makes one of these numbers
grow makes those times grow.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.support import fill
from tests.support.proxy import Stats
from tests.support.scenarios import Link
from tune_sync_plugin.engine import manifest as manifest_module
from tune_sync_plugin.engine.keeper import Indexing
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.storage import storage_at
from tune_sync_plugin.engine.sync import SyncOptions, sync

MB = 1 << 20
OLD_S = 1_000_000_000

Synced = Callable[..., Stats]


def age(root: Path) -> None:
    """Let the files be older than any sync, so that their times prove them unchanged."""
    for directory, _, names in os.walk(root):
        for name in names:
            os.utime(os.path.join(directory, name), (OLD_S, OLD_S))
    time.sleep(0.05)  # what it leaves is a fresh ctime


@pytest.fixture
def synced(root: Path, manifest: Path, link: Link) -> Synced:
    """Syncs to S3, as a trial's artifacts or the driver's directory; returns what it asked for."""
    prefix = f"costs-{os.urandom(4).hex()}"

    def run(*, indexed: bool = True) -> Stats:
        indexing = Indexing(writer="node-1") if indexed else None
        link.proxy.reset_stats()
        storage = storage_at(link.s3.arrow_fs(link.proxy.port), f"{link.s3.bucket}/{prefix}")
        report = sync([str(root)], storage, str(manifest), indexing=indexing)
        assert report.complete, report.failures
        return link.proxy.stats()

    return run


def kinds(stats: Stats) -> dict[str, int]:
    """Requests by what they are for: the index, a listing, or files."""

    def kind(method: str, path: str, query: str) -> str:
        if "list-type" in query:
            return "list"
        return f"{method} index" if path.endswith("index.json") else method

    return dict(Counter(kind(r.method, r.path, r.query) for r in stats.records))


ONCE = {"list": 1, "GET index": 1, "PUT index": 1}
"""What a trial's first sync asks for besides its files."""


def test_cold_a_request_per_file(root: Path, synced: Synced) -> None:
    files = {f"a/b{n % 3}/c{n % 5}/d/e/{n}": os.urandom(200) for n in range(300)}
    fill(root, files)
    stats = synced()
    assert kinds(stats) == {"PUT": 300, **ONCE}
    assert stats.select("PUT", r"/\d+$").body_bytes == 300 * 200


def test_cold_a_megabyte_is_one_request(root: Path, synced: Synced) -> None:
    fill(root, {f"{n}": os.urandom(MB) for n in range(5)})
    assert kinds(synced()) == {"PUT": 5, **ONCE}


def test_cold_a_large_file_goes_in_parts_of_ten(root: Path, synced: Synced) -> None:
    fill(root, {"a": os.urandom(45 * MB)})
    stats = synced()
    assert kinds(stats) == {"POST": 2, "PUT": 5, **ONCE}
    assert stats.select("PUT", r"/a\?").body_bytes == 45 * MB


def test_nothing_changed_costs_no_request(root: Path, synced: Synced) -> None:
    fill(root, {f"d{n % 7}/{n}": b"%d" % n for n in range(500)})
    age(root)
    synced()
    synced()
    assert kinds(synced()) == {}


def test_one_in_a_hundred_changed_costs_these_and_the_index(root: Path, synced: Synced) -> None:
    fill(root, {f"d{n % 7}/{n}": b"%d" % n for n in range(1000)})
    age(root)
    synced()
    fill(root, {f"d{n % 7}/{n}": b"new" for n in range(0, 1000, 100)})
    assert kinds(synced()) == {"PUT": 10, "PUT index": 1}


def test_a_line_appended_costs_the_line(root: Path, synced: Synced) -> None:
    fill(root, {"log": os.urandom(20 * MB), "other": b"1"})
    age(root)
    synced()
    with (root / "log").open("ab") as log:
        log.write(b"a line\n")
    stats = synced()
    assert sum(kinds(stats).values()) <= 6
    assert stats.body_bytes <= 64 << 10


def test_a_snapshot_of_the_drivers_directory_costs_what_is_active(
    root: Path, synced: Synced
) -> None:
    """A hundred trials of five files, ten of them active; there is no index."""
    names = ("result.json", "progress.csv", "params.json", "params.pkl", "events.out")
    fill(root, {f"trial_{n:03d}/{name}": b"x" * 100 for n in range(100) for name in names})
    fill(root, {"experiment_state.json": b"1"})
    age(root)
    assert kinds(synced(indexed=False)) == {"PUT": 501}
    for _ in range(2):
        for n in range(10):
            for name in ("result.json", "progress.csv"):
                with (root / f"trial_{n:03d}" / name).open("ab") as file:
                    file.write(b"more\n")
        fill(root, {"experiment_state.json": os.urandom(8)})
        assert kinds(synced(indexed=False)) == {"PUT": 21}


def test_transactions_come_by_the_batch(
    root: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*args: object, **kwargs: object) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)  # type: ignore[call-overload]
        connection.set_trace_callback(statements.append)
        return connection  # type: ignore[no-any-return]

    monkeypatch.setattr(manifest_module.sqlite3, "connect", traced)
    fill(root, {f"{n}": b"%d" % n for n in range(400)})
    storage = LocalStorage(str(tmp_path / "storage"))
    started = time.monotonic()
    assert sync([str(root)], storage, str(manifest), indexing=Indexing()).files_uploaded == 400
    # One in 0.2 s of uploading, and a dozen before and after.
    allowed = 20 + (time.monotonic() - started) / 0.2
    assert sum(statement == "COMMIT" for statement in statements) <= allowed


# -- in a process of its own ---------------------------------------------------------------------

SCRIPT = """
import gc, sys
from tune_sync_plugin.engine.keeper import Indexing
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.sync import sync

def peak():
    return [int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line][0]

root, storage, manifest = sys.argv[1:]
idle = peak()
print("begin", file=sys.stderr, flush=True)
report = sync([root], LocalStorage(storage), manifest, indexing=Indexing(forced=False))
print("end", file=sys.stderr, flush=True)
assert report.complete
print(report.files_uploaded, peak() - idle)
"""


def in_a_process(*arguments: Path, prefix: tuple[str, ...] = ()) -> tuple[int, int]:
    """Files sent, and the peak of memory above idle in KiB."""
    command = [*prefix, sys.executable, "-c", SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sent, kib = done.stdout.split()
    return int(sent), int(kib)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_an_unchanged_file_costs_one_system_call(
    root: Path, manifest: Path, tmp_path: Path
) -> None:
    count = 2000
    fill(root, {f"d{n % 10}/{n}": b"x" for n in range(count)})
    age(root)
    where = (root, tmp_path / "storage", manifest)
    while in_a_process(*where)[0]:
        pass
    log = tmp_path / "strace"
    assert in_a_process(*where, prefix=("strace", "-f", "-o", str(log)))[0] == 0
    calls = log.read_text()
    calls = calls[calls.index('write(2, "begin') : calls.index('write(2, "end')]
    names = Counter(re.findall(r"^\d+ +(\w+)\(", calls, re.MULTILINE))
    stats = sum(n for name, n in names.items() if "stat" in name)
    assert count <= stats <= count + 60
    # Directories are read, and the manifest.
    assert sum(names.values()) - stats <= 400, names


def test_memory_follows_the_number_of_files_and_not_their_bytes(
    root: Path, manifest: Path, tmp_path: Path
) -> None:
    fill(root, {f"{n}": b"x" for n in range(10_000)} | {"big": bytes(100 * MB)})
    sent, kib = in_a_process(root, tmp_path / "storage", manifest)
    assert sent == 10_001
    assert kib < 60 << 10


def test_options_default_to_what_the_settings_do() -> None:
    from tune_sync_plugin.config import SyncConfig

    assert SyncConfig().options().concurrency == SyncOptions().concurrency
