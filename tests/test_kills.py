"""Processes and nodes that die by SIGKILL: what was synced stays, what was not is named.

A cluster of its own, whose worker nodes are killed and replaced.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.restarts import (
    Place,
    fit,
    found_at,
    lines,
    meanwhile,
    move_away_when_this_ends,
    note_start,
    remove_blockers,
    report_step,
    start_step,
    wait_until,
)
from tests.support.scenarios import MB, Link, sync_workers

pytestmark = pytest.mark.slow

# Until the cluster knows of a node's death, and what was asked of it has failed.
DETECTION_S = 20


@pytest.fixture(scope="module")
def _mortal() -> Iterator[LocalCluster]:
    with LocalCluster(workers=2) as running:
        yield running


class Nodes:
    """The worker nodes of a cluster: two that are alive, whatever a test did to them before."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._dead: set[str] = set()

    def kill(self, node_id: str) -> float:
        """Kill the node; returns when, by the wall clock."""
        self._dead.add(node_id)
        self._cluster.kill_node(self._cluster.node_ids.index(node_id) + 1)
        return time.time()

    def alive(self) -> set[str]:
        return set(self._cluster.node_ids) - self._dead

    def with_trials(self) -> set[str]:
        """Those where a trial of the newest run is or was."""
        runs = {
            node: list(disk.glob("session_2*/artifacts/*/exp/working_dirs/*"))
            for node, disk in zip(self._cluster.node_ids, self._cluster.temp_dirs[1:], strict=True)
        }
        newest = max(path.parents[2].name for found in runs.values() for path in found)
        return {
            node
            for node, found in runs.items()
            if any(path.parents[2].name == newest for path in found)
        }

    def restock(self, count: int = 2) -> None:
        """Have so many that are alive. Nodes can be added by the main thread only."""
        while len(self.alive()) < count:
            self._cluster.add_node()


@pytest.fixture(scope="module")
def _nodes(_mortal: LocalCluster) -> Nodes:
    return Nodes(_mortal)


@pytest.fixture
def nodes(_mortal: LocalCluster, _nodes: Nodes) -> Iterator[Nodes]:
    _nodes.restock()
    yield _nodes
    remove_blockers(_mortal.node_ids)


def _note_where() -> None:
    Path("where.txt").write_text(str(Path.cwd()))


# -- the trial's process ------------------------------------------------------------------------


def _train_torn(config: dict[str, Any]) -> None:
    _note_where()
    Path("early.txt").write_text("e" * 1000)
    report_step(0)
    time.sleep(1)
    trial_dir = Path(tune.get_context().get_trial_dir())
    (trial_dir / "late_in_trial_dir.txt").write_text("t" * 1000)
    for number in range(3):
        Path(f"late_{number}.bin").write_bytes(os.urandom(100_000 + number))

    def write() -> None:
        with open("torn.bin", "wb") as out:
            while True:
                out.write(os.urandom(100_000))

    threading.Thread(target=write, daemon=True).start()
    while not (Path("torn.bin").exists() and Path("torn.bin").stat().st_size > 3 * MB):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("nodes")
def test_a_trial_killed_while_it_writes_leaves_every_byte_it_wrote(
    place: Place, figure: Callable[..., None]
) -> None:
    results, callback = fit(place, trainable=_train_torn, space={}, max_failures=0)
    assert len(results.errors) == 1
    stored = place.artifacts()
    directory = Path(stored["where.txt"].decode())
    written = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert len(written["torn.bin"]) > 3 * MB
    assert written.keys() == {"where.txt", "early.txt", "torn.bin"} | {
        f"late_{n}.bin" for n in range(3)
    }
    # Its last block may be torn as well: what counts is what the kernel had been given.
    assert {name: stored.get(name) for name in written} == written
    assert stored["late_in_trial_dir.txt"] == b"t" * 1000
    assert not callback.report.failures
    figure(
        f"trial SIGKILLed mid-write, {place.kind}",
        written=sum(map(len, written.values())) + 1000,
        stored=sum(map(len, stored.values())),
    )


# -- the trial's node ---------------------------------------------------------------------------


def _train_slowly(config: dict[str, Any]) -> None:
    """Logs each step once its checkpoint counts, so that no line is ever written twice."""
    _note_where()
    start = start_step()
    note_start(start)
    logs = (Path("log.txt"), Path(tune.get_context().get_trial_dir(), "log2.txt"))
    for step in range(start, config["steps"]):
        report_step(step)
        for log in logs:
            with log.open("a") as out:
                out.write(f"{step}\n")
        Path(f"of_{step}.bin").write_bytes(bytes([step]) * 10_000)
        time.sleep(0.4)


def _lost_at(callback: Any) -> tuple[str, int | None]:
    """The one NodeDiedError of the report: its text, and the age of the last sync it names."""
    failures = callback.report.failures
    assert sum(f.error == "NodeDiedError" for f in failures) == 1, failures
    (failure,) = (f for f in failures if f.error == "NodeDiedError")
    found = re.search(r"its last complete sync ended (\d+) s ago", failure.message)
    return failure.message, int(found[1]) if found else None


def test_a_node_that_dies_loses_only_what_it_had_not_synced(
    place: Place, nodes: Nodes, figure: Callable[..., None]
) -> None:
    at_death: dict[str, bytes] = {}
    died: list[float] = []
    synced: list[float] = []

    def kill() -> None:
        wait_until(lambda: place.peek("log.txt"))
        log = Path(place.read("where.txt").decode(), "log.txt")
        seen = [b""]

        def far_ahead() -> bool:
            stored = place.peek("log.txt")
            if stored != seen[0]:
                seen[0] = stored
                synced.append(time.time())
            return len(synced) > 1 and len(log.read_bytes()) >= len(stored) + 8

        wait_until(far_ahead)
        at_death.update(place.artifacts())
        died.append(nodes.kill(found_at(place, 0)[0]))

    with meanwhile(kill):
        results, callback = fit(
            place,
            trainable=_train_slowly,
            space={"steps": 40},
            sync_period=5,
            sync_artifacts_on_checkpoint=False,
        )
    ended = time.time()
    assert not results.errors
    stored = place.artifacts()
    starts = [int(n[11:-4]) for n in stored if re.fullmatch(r"attempt_at_[1-9]\d*\.txt", n)]
    assert len(starts) == 1, (sorted(stored), callback.report.failures)
    (start,) = starts
    node, here, log = found_at(place, start)
    assert node != found_at(place, 0)[0]

    # All that had been synced is back before training goes on, and stays in storage.
    assert set(here) >= at_death.keys() - {"log2.txt"}
    assert log.encode().startswith(at_death["log.txt"])
    for name, content in at_death.items():
        if name != "where.txt":
            assert stored[name].startswith(content), name
    # The log goes on behind what came back: no line of it twice, none of what was synced missing.
    synced_lines = log.encode()
    assert stored["log.txt"] == synced_lines + lines(40, start)
    assert stored["log2.txt"].endswith(lines(40, start))
    lost = start - len(log.splitlines())
    assert lost > 0, "the node took something with it, or this proves nothing"

    message, age_s = _lost_at(callback)
    assert age_s is not None
    # As old as the last sync that we saw, up to the moment when the death was noticed.
    assert died[0] - synced[-1] - 2 <= age_s <= ended - synced[-1] + 2
    (trial,) = callback.report.trials.values()
    assert not trial.not_restored
    assert trial.restored[-1].files_restored == len(here) + (1 if "log2.txt" in at_death else 0)
    written = 2 * len(lines(40)) + 40 * 10_000
    kept = 2 * len(lines(40)) - 2 * (len(lines(40)) - len(stored["log.txt"]))
    kept += sum(len(stored.get(f"of_{n}.bin", b"")) for n in range(40))
    figure(
        f"trial's node killed, resumes elsewhere, {place.kind}",
        written=written,
        stored=kept,
        lost=f"'{message}'",
        more=f"{lost} lines after the last sync",
    )


def _train_big(config: dict[str, Any]) -> None:
    start = start_step()
    _note_where()
    note_start(start)
    if start == 0:
        Path("small.txt").write_text("s" * 1000)
        if config["hold_s"] < 1:  # it goes out in one sync with the large one, which starts at once
            Path("after.txt").write_text("a" * 1000)
        Path("big.bin").write_bytes(os.urandom(config["size"]))
        report_step(0)
        time.sleep(config["hold_s"])
    if not Path("after.txt").exists():
        Path("after.txt").write_text("a" * 1000)
    report_step(1)


@pytest.mark.parametrize(
    "flush",
    [
        pytest.param(False, id="during a sync", marks=pytest.mark.exhaustive),
        pytest.param(True, id="during the flush"),
    ],
)
def test_a_node_that_dies_while_it_uploads_holds_nothing_up(
    link: Link, nodes: Nodes, flush: bool, figure: Callable[..., None]
) -> None:
    place = Place.on_s3(link)
    sync_timeout = 40
    died: list[float] = []
    size = 60 * MB

    def kill() -> None:
        def under_way() -> bool:
            return link.proxy.stats().select("PUT", r"/big\.bin").body_bytes > MB

        wait_until(lambda: place.peek("small.txt"))
        wait_until(under_way)
        if flush:  # the trial has ended well; its last file is on its way
            wait_until(lambda: b'"step": 1' in place.peek("result.json"))
            wait_until(lambda: place.peek("after.txt"))
        died.append(nodes.kill(found_at(place, 0)[0]))
        # Its processes outlive it by a moment: on a fast link they would end what they are at.
        wait_until(lambda: sync_workers() == [])
        link.proxy.set()

    link.proxy.set(bandwidth_bytes_per_s=2 * MB)
    with meanwhile(kill):
        results, callback = fit(
            place,
            trainable=_train_big,
            space={"size": size, "hold_s": 0.2 if flush else 60},
            max_failures=1,
            sync_period=1,
            sync_timeout=sync_timeout,
        )
    assert time.time() - died[0] < sync_timeout + DETECTION_S
    assert not results.errors
    stored = place.artifacts()
    assert stored["small.txt"] == b"s" * 1000
    assert stored["after.txt"] == b"a" * 1000
    assert "big.bin" not in stored, "half a file would be worse than none"
    message, age_s = _lost_at(callback)
    assert age_s is not None or "never synced" in message
    assert sync_workers() == []
    figure(
        f"node killed {'during the final flush' if flush else 'during a sync'}",
        written=size + 2000,
        stored=sum(len(stored.get(n, b"")) for n in ("small.txt", "after.txt", "big.bin")),
        lost=f"'{message}'",
        more=f"ended {time.time() - died[0]:.0f} s after the death",
    )


def _train_moves(config: dict[str, Any]) -> None:
    start = start_step()
    note_start(start)
    for step in range(start, 6):
        with open("log.txt", "a") as out:
            out.write(f"{step}\n")
        if step == 0:
            Path("needed.bin").write_bytes(b"n" * MB)
        report_step(step)
        if step == 2 and start == 0:
            move_away_when_this_ends()
            raise RuntimeError("as asked")


def test_a_node_that_dies_while_a_trial_attaches_is_one_more_restart(
    link: Link, nodes: Nodes, figure: Callable[..., None]
) -> None:
    place = Place.on_s3(link)
    died: list[float] = []

    def kill() -> None:
        # On its second node the trial waits for a file that does not come, and then that node dies.
        asked = link.proxy.stats
        wait_until(lambda: asked().select("GET", r"/needed\.bin").requests)
        (second,) = nodes.with_trials() - {found_at(place, 0)[0]}
        died.append(nodes.kill(second))
        link.proxy.clear_rules()

    nodes.restock(3)
    link.proxy.add_rule(r"/needed\.bin", "hang", method="GET")
    with meanwhile(kill):
        results, callback = fit(
            place, trainable=_train_moves, space={}, max_failures=3, sync_timeout=120
        )
    assert time.time() - died[0] < 60, "it did not wait for the hanging restore's timeout"
    assert not results.errors
    stored = place.artifacts()
    assert stored["log.txt"] == lines(6)
    assert stored["needed.bin"] == b"n" * MB
    _, here, log = found_at(place, 3)
    assert set(here) == {"log.txt", "needed.bin", "attempt_at_0.txt"}
    assert log.encode() == lines(3)
    assert not callback.report.not_attached
    assert not callback.report.failures, "training had not begun there: nothing can be lost"
    assert not callback.report.not_restored
    figure(
        "node killed during attach",
        written=len(lines(6)) + MB,
        stored=len(stored["log.txt"] + stored["needed.bin"]),
        more=f"ended {time.time() - died[0]:.0f} s after the death",
    )
