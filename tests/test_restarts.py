"""Trials that start again: what they left is flushed, and back where they go on.

Real nodes with disks of their own, real storage. A trial is moved by taking its node's CPUs away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.cluster import LocalCluster
from tests.support.restarts import Place, fit, found_at, lines, remove_blockers


@pytest.fixture(autouse=True)
def _no_blockers(cluster: LocalCluster) -> Iterator[None]:
    yield
    remove_blockers(cluster)


@pytest.mark.parametrize("on_checkpoint", [True, False])
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
    first, second = found_at(place, 0), found_at(place, 5)
    assert first[0] != second[0], "it went on on another node"
    assert second[2] == lines(5).decode(), "and found what it had written"
    (trial,) = callback.report.trials.values()
    assert not callback.report.failures
    assert trial.restored[0].files_restored == 4
    assert trial.restored[0].from_index
    figure(
        f"trial raises twice, moves, on_checkpoint={on_checkpoint}, {place.kind}",
        written=2 * len(lines(10)),
        stored=len(place.read("log.txt") + place.read("log2.txt")),
    )
