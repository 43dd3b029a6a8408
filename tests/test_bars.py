"""The bars of a real run on a terminal: artifacts that come back, and the final flush."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.restarts import Place, fit
from tests.support.scenarios import Link

pytestmark = pytest.mark.slow


def drive(storage_path: str) -> None:
    """A run whose only trial fails once, and goes on on another node."""
    place = Place(storage_path, list, lambda name: b"", "S3")
    with LocalCluster(workers=2, log_to_driver=True):
        results, _ = fit(place, space={"fails_after": [1], "steps": 3})
    assert not results.errors


def on_a_terminal(code: str, rows: int, columns: int) -> str:
    """All that a Python process writes to a terminal of this size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))
    said = bytearray()

    def listen() -> None:
        with contextlib.suppress(OSError):  # the end of what is written
            while some := os.read(ours, 65536):
                said.extend(some)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    try:
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=environment,
            stdout=theirs,
            stderr=theirs,
            check=False,
            timeout=200,
        )
    finally:
        os.close(theirs)
        listener.join(10)
        os.close(ours)
    return said.decode(errors="replace")


def test_a_terminal_shows_what_takes_long(link: Link) -> None:
    url = link.s3.uri(link.prefix(), port=link.proxy.port)
    link.proxy.add_rule(r"/(log|\.tune_sync/index)", "delay:1.5")
    said = on_a_terminal(f"from tests.test_bars import drive; drive({url!r})", 24, 100)
    assert "SyncCallback" not in said, "nothing was wrong"
    assert re.search(r"restoring \w{5}_00000: +\d+%", said), said[-5000:]
    assert re.search(r"restoring \w{5}_00000: 100%", said), said[-5000:]
    assert re.search(r"final sync: +\d+%", said), said[-5000:]
