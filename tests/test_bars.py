"""The bars of a real run on a terminal: artifacts that come back, and the final flush."""

from __future__ import annotations

import re
import sys

import pytest

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.restarts import Place, fit
from tests.support.scenarios import Link
from tests.support.terminal import on_a_terminal

pytestmark = pytest.mark.slow


def drive(storage_path: str) -> None:
    """A run whose only trial fails once, and goes on on another node."""
    place = Place(storage_path, list, lambda name: b"", "S3")
    with LocalCluster(workers=2, log_to_driver=True):
        results, _ = fit(place, space={"fails_after": [1], "steps": 3})
    assert not results.errors


def test_a_terminal_shows_what_takes_long(link: Link) -> None:
    url = link.s3.uri(link.prefix(), port=link.proxy.port)
    link.proxy.add_rule(r"/(log|\.tune_sync/index)", "delay:1.5")
    code = f"from tests.test_bars import drive; drive({url!r})"
    said, _ = on_a_terminal([sys.executable, "-c", code], columns=100, cwd=REPOSITORY)
    assert "SyncCallback" not in said, "nothing was wrong"
    assert re.search(r"restoring \w{5}_00000: +\d+%", said), said[-5000:]
    assert re.search(r"restoring \w{5}_00000: 100%", said), said[-5000:]
    assert re.search(r"final sync: +\d+%", said), said[-5000:]
