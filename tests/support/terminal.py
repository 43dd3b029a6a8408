"""Runs a process whose standard error is a terminal, and says what it showed there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Sequence
from typing import Any

from tests.support.cluster import REPOSITORY


def on_a_terminal(
    command: Sequence[str], *, rows: int = 24, columns: int = 80, **options: Any
) -> tuple[str, subprocess.CompletedProcess[bytes]]:
    """All that a process writes to a terminal of this size, and the process, which has ended.

    Standard output goes there as well, unless ``options``, those of ``subprocess.run``, say
    otherwise.
    """
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
        done = subprocess.run(
            command,
            stderr=theirs,
            env=environment,
            timeout=200,
            check=True,
            **{"stdout": theirs, **options},
        )
    finally:
        os.close(theirs)
        listener.join(10)
        os.close(ours)
    return said.decode(errors="replace"), done
