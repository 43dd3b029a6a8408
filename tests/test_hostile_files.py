"""A trial directory as training code really leaves it, under syncs that never stop: whole runs.

One trial per node appends, rewrites, truncates, replaces and deletes while its directory is synced,
among files that can't be stored at all. What a single sync makes of each is in tests/engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback, SyncConfig
from tune_sync_plugin.engine.index import INDEX

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

CHURNED_FILES, CHURN_ALIVE = 10_000, 100
TRIALS = 2
SYNCS, VERSIONS = 4, 3  # at least, of a trial and of a file, while it is written
SWAPPED_BYTES = 3_000_000
# A file that not even root may read: the kernel says EACCES to whoever opens it for reading.
UNREADABLE = "/proc/sys/net/ipv4/route/flush"
NAMES = ["two words", " lead", "#x", "q?", "100%", "%41", "a+b&c=d", "\U0001f600", "ü", "*[x]", "~"]
HARD_NAMES = ["new\nline", "tab\t"]  # not every object store takes these
BACKSLASH = "back\\slash"  # of which SeaweedFS, not the client, makes two directories
NOT_UTF8 = b"bad\xff"
SKIPPED = {
    "pipe (not a regular file)",
    "door (not a regular file)",
    "loop (link loop)",
    "up (link to a directory)",
    "nowhere (dangling link)",
}


# -- what the trials do ----------------------------------------------------------------------------


def log_bytes(size: int) -> bytes:
    """The first ``size`` bytes of the log that every trial writes."""
    lines = (b"%07d\n" % number for number in range(size // 8 + 1))
    return b"".join(lines)[:size]


def _make_unstorable() -> None:
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind("door")
    os.symlink("loop", "loop")
    os.symlink("..", "up")
    os.symlink("missing", "nowhere")
    os.symlink(UNREADABLE, "closed")
    os.close(os.open(NOT_UTF8, os.O_CREAT))


def _append(step: int) -> None:
    """100 KB, ten times a second."""
    lines = range(step * 12_500, (step + 1) * 12_500)
    with open("log.txt", "ab", buffering=0) as log:
        log.write(b"".join(b"%07d\n" % number for number in lines))
    time.sleep(0.1)


def _rewrite(step: int) -> None:
    """The same bytes in number, in place."""
    mode = "r+b" if step else "wb"
    with open("rewritten.bin", mode) as out:
        out.write(bytes([step % 251]) * 500_000)
    time.sleep(0.02)


def _truncate(step: int) -> None:
    with open("truncated.bin", "ab") as out:
        out.write(bytes([step % 251]) * 400_000)
    time.sleep(0.01)
    os.truncate("truncated.bin", step % 1000)


def _swap(step: int) -> None:
    """Each version of this one is whole and says in each byte which it is."""
    Path("swapped.tmp").write_bytes(bytes([step % 251]) * SWAPPED_BYTES)
    os.replace("swapped.tmp", "swapped.bin")
    time.sleep(0.05)


def _churn(step: int) -> None:
    if step < CHURNED_FILES:
        Path("churn", f"{step}").write_bytes(b"%d" % step)
    else:
        time.sleep(0.01)
    if CHURN_ALIVE <= step < CHURNED_FILES:
        os.unlink(f"churn/{step - CHURN_ALIVE}")
    if step % 50 == 0:
        time.sleep(0.02)


def train(config: dict[str, Any]) -> None:
    """Does all of it at once until the reader has seen enough, then notes what it has left."""
    for name in [*NAMES, *HARD_NAMES, *config["more_names"]]:
        Path(name).write_text(f"{name} of trial {config['x']}")
    os.makedirs("deep/dir")
    Path("deep/dir/empty").touch()
    os.mkdir("churn")
    _make_unstorable()
    over = threading.Event()
    steps: dict[str, int] = {}
    broken: list[str] = []

    def repeat(act: Callable[[int], None]) -> None:
        step = 0
        try:
            while not over.is_set():
                act(step)
                step += 1
                steps[act.__name__] = step
        except BaseException as error:
            broken.append(f"{act.__name__}: {error!r}")

    acts = (_append, _rewrite, _truncate, _swap, _churn)
    writers = [threading.Thread(target=repeat, args=[act]) for act in acts]
    for writer in writers:
        writer.start()
    enough, deadline = Path(config["enough"]), time.monotonic() + 120
    while time.monotonic() < deadline:
        if broken or (enough.exists() and steps["_churn"] >= CHURNED_FILES):
            break
        time.sleep(0.2)
        tune.report({"step": 0})
    over.set()
    for writer in writers:
        writer.join()
    left = {}
    for directory, _, names in os.walk("."):
        for name in names:
            path = os.path.relpath(os.path.join(directory, name), ".")
            if os.path.isfile(path) and name not in ("closed", os.fsdecode(NOT_UTF8)):
                content = Path(path).read_bytes()
                left[path] = (len(content), hashlib.sha256(content).hexdigest())
    tune.report({"step": 1, "left": json.dumps(left), "broken": broken, "steps": steps})


# -- a reader --------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Reads the log and the swapped file from storage over and over, and notes what can't be.

    Makes the file ``enough``, which ends the trials, once all of them have been synced SYNCS times
    and both files have been seen in VERSIONS states: a busy machine takes longer, that is all.
    """

    def __init__(
        self, contents: Callable[[str], Iterator[tuple[str, bytes]]], enough: Path
    ) -> None:
        super().__init__(daemon=True)
        self._contents = contents
        self.callback = SyncCallback()
        self.enough = enough
        self._over = threading.Event()
        self._log = log_bytes(1 << 25)
        self.versions: dict[str, set[int]] = {"log.txt": set(), "swapped.bin": set()}
        self.torn: list[str] = []

    def run(self) -> None:
        while not self._over.wait(0.05):
            for key, content in self._contents("log.txt"):
                self.versions["log.txt"].add(len(content))
                if not self._log.startswith(content):
                    self.torn.append(f"{key}: {len(content)} bytes are no beginning of the log")
            for key, content in self._contents("swapped.bin"):
                self.versions["swapped.bin"].add(content[0] if content else -1)
                if content != content[:1] * SWAPPED_BYTES:
                    self.torn.append(f"{key}: {len(content)} bytes, of {set(content)}")
            syncs = [trial.syncs for trial in self.callback.report.trials.values()]
            if len(syncs) == TRIALS and min(syncs) >= SYNCS and self._versions() >= VERSIONS:
                self.enough.touch()

    def _versions(self) -> int:
        return min(len(seen) for seen in self.versions.values())

    def stop(self) -> None:
        self._over.set()
        self.join(30)
        assert not self.is_alive()


# -- the tests -------------------------------------------------------------------------------------


def _fit(storage_path: str, reader: Reader, more_names: Sequence[str] = ()) -> Any:
    reader.start()
    try:
        return tune.Tuner(
            tune.with_resources(train, {"CPU": 2}),  # all of a node's, so that there is one on each
            param_space={
                "x": tune.grid_search(list(range(TRIALS))),
                "enough": str(reader.enough),
                "more_names": list(more_names),
            },
            run_config=tune.RunConfig(
                name="exp",
                storage_path=storage_path,
                sync_config=SyncConfig(sync_artifacts=True, sync_period=0.3),
                callbacks=[reader.callback],
                verbose=0,
            ),
        ).fit()
    finally:
        reader.stop()


def _check(
    results: Any,
    cluster: LocalCluster,
    reader: Reader,
    stored_of: Callable[[str], dict[str, bytes]],
) -> tuple[int, int, str]:
    """Bytes written and in storage, and what the report names, once all of it is as it must be."""
    assert not results.errors
    callback = reader.callback
    written = kept = 0
    named: set[str] = set()
    ran_on = set()
    for result in results:
        assert not result.metrics["broken"]
        steps = result.metrics["steps"]
        assert steps["_churn"] >= CHURNED_FILES, "too slow a machine for the churn to be over"
        trial_id = result.metrics["trial_id"]
        report = callback.report.trials[trial_id]
        (node_id,) = report.last_by_node
        ran_on.add(node_id)
        last = report.last_by_node[node_id]
        assert report.syncs >= SYNCS, "too slow a machine for syncs while it is written"
        left, stored = json.loads(result.metrics["left"]), stored_of(trial_id)
        failed = {failure.path for failure in report.failures}
        assert {"closed", "bad\\xff"} <= failed <= {"closed", "bad\\xff", *HARD_NAMES}
        assert set(last.skipped) == SKIPPED
        named |= failed | {line.rsplit(" (", 1)[0] for line in last.skipped}
        for path, (size, digest) in left.items():
            written += size
            if path in failed:
                assert path in HARD_NAMES
                assert path not in stored
                continue
            assert path in stored, path
            assert len(stored[path]) == size, path
            assert hashlib.sha256(stored[path]).hexdigest() == digest, path
            kept += size
        log, size = stored["log.txt"], steps["_append"] * 100_000
        assert log == log_bytes(size)
        # What is there beyond that was a file once: deleted ones stay, half ones never show.
        for path in stored.keys() - left.keys():
            if path.startswith("churn/"):
                # A file that was deleted: whole, or as it was between its creation and its writing.
                assert stored[path] in (path[6:].encode(), b"")
            else:
                assert path in {INDEX, "swapped.tmp", *tune_files()}, path
    assert ran_on == set(cluster.node_ids[:2])
    assert not callback.report.experiment.failures
    # The reader saw the files grow and change, and never in a state that they were not in.
    assert reader.torn == []
    assert reader.enough.exists(), reader.versions
    return written, kept, ", ".join(sorted(map(repr, named)))


def tune_files() -> set[str]:
    """What Tune writes for each trial."""
    return {"params.json", "params.pkl", "progress.csv", "result.json"}


@pytest.mark.exhaustive
def test_hostile_files_in_a_shared_directory(
    storage: Path, tmp_path: Path, cluster: LocalCluster, figure: Callable[..., None]
) -> None:
    def contents(name: str) -> Iterator[tuple[str, bytes]]:
        for path in storage.glob(f"exp/*/{name}"):
            with contextlib.suppress(FileNotFoundError):
                yield str(path), path.read_bytes()

    def stored_of(trial_id: str) -> dict[str, bytes]:
        (trial,) = (path for path in storage.glob("exp/*") if trial_id in path.name)
        files = (Path(top, name) for top, _, names in os.walk(trial) for name in names)
        found = {str(file.relative_to(trial)): file.read_bytes() for file in files}
        return {name: data for name, data in found.items() if "events.out.tfevents" not in name}

    reader = Reader(contents, tmp_path / "enough")
    results = _fit(str(storage), reader, [BACKSLASH])
    written, kept, named = _check(results, cluster, reader, stored_of)
    assert kept == written, "a file system takes every name that is UTF-8"
    figure("hostile files, shared directory", written=written, stored=kept, lost=named)


def test_hostile_files_on_s3(
    link: Link, tmp_path: Path, cluster: LocalCluster, figure: Callable[..., None]
) -> None:
    prefix = link.prefix()
    client = link.s3.client()  # one for all: making one takes longer than a request

    def get(key: str) -> bytes:
        body: bytes = client.get_object(Bucket=link.s3.bucket, Key=key)["Body"].read()
        return body

    def contents(name: str) -> Iterator[tuple[str, bytes]]:
        for key in link.s3.keys(prefix):
            if key.endswith(f"/{name}"):
                yield key, get(key)

    def stored_of(trial_id: str) -> dict[str, bytes]:
        found = {}
        for key in link.s3.keys(f"{prefix}/exp/"):
            trial, _, name = key.removeprefix(f"{prefix}/exp/").partition("/")
            if trial_id in trial and "events.out.tfevents" not in name:
                found[name] = get(key)
        return found

    reader = Reader(contents, tmp_path / "enough")
    results = _fit(link.s3.uri(prefix, port=link.proxy.port), reader)
    written, kept, named = _check(results, cluster, reader, stored_of)
    figure("hostile files, S3", written=written, stored=kept, lost=named)
