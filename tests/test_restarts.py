"""Trials that start again: what they left is flushed, and back where they go on.

Real nodes with disks of their own, real storage. A trial is moved by taking its node's CPUs away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from tests.support.cluster import LocalCluster
from tests.support.restarts import Place, block, fit, found_at, lines, remove_blockers


@pytest.fixture(autouse=True)
def _no_blockers(cluster: LocalCluster) -> Iterator[None]:
    yield
    remove_blockers(node["NodeID"] for node in ray.nodes())


def check_attempts(place: Place) -> None:
    nodes, _, logs = zip(*(found_at(place, start) for start in (0, 5, 8)), strict=True)
    assert nodes[0] == nodes[2] != nodes[1], "it went on on another node, and came back"
    assert logs[1] == lines(5).decode(), "and found what it had written"
    assert logs[2] == lines(8).decode(), "not what it had left there"


@pytest.mark.parametrize("on_checkpoint", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_a_log_goes_on_on_another_node(
    place: Place, on_checkpoint: bool, figure: Callable[..., None]
) -> None:
    """Without syncs at checkpoints only the flush before the move can have brought the lines."""
    results, callback = fit(
        place, space={"fails_after": [4, 7]}, sync_artifacts_on_checkpoint=on_checkpoint
    )
    assert not results.errors
    assert place.read("log.txt") == lines(10)
    assert place.read("log2.txt") == lines(10)
    check_attempts(place)
    (trial,) = callback.report.trials.values()
    assert not callback.report.failures
    # Two logs, two marks. Then one mark more, and the logs that are not as they were left.
    assert [report.files_restored for report in trial.restored] == [4, 4]
    assert all(report.from_index for report in trial.restored)
    figure(
        f"trial raises twice, moves, on_checkpoint={on_checkpoint}, {place.kind}",
        written=2 * len(lines(10)),
        stored=len(place.read("log.txt") + place.read("log2.txt")),
    )


@pytest.mark.parametrize(
    "start", ["the driver's node", pytest.param("another", marks=pytest.mark.slow)]
)
def test_between_the_drivers_node_and_another(
    storage: Path, start: str, figure: Callable[..., None]
) -> None:
    """On the driver's node ``get_trial_dir()`` is part of the driver's own directory."""
    place = Place.in_directory(storage)
    with LocalCluster(workers=1, head_num_cpus=2) as own:
        other = own.node_ids[0] if start == "the driver's node" else own.head_node_id
        ray.get(block(other).ping.remote())
        results, callback = fit(
            place, space={"fails_after": [4, 7]}, sync_artifacts_on_checkpoint=False
        )
        assert not results.errors
        check_attempts(place)
        assert (found_at(place, 0)[0] == own.head_node_id) == (start == "the driver's node")
    assert place.read("log.txt") == lines(10)
    assert place.read("log2.txt") == lines(10)
    assert not callback.report.failures
    size = 2 * len(lines(10))
    stored = len(place.read("log.txt") + place.read("log2.txt"))
    figure(f"trial raises twice, starts on {start}, moves", written=size, stored=stored)
