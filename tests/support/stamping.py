"""A file system that notes each file it publishes: by which task, on which node, and when.

A module of its own since Ray's workers import it: what they need not know is not to be here.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fsspec.implementations.local import LocalFileSystem

_PATH = re.compile(r"/exp/([^/]+)/(.+)$")


@dataclass(frozen=True)
class Stamp:
    """One publishing of a file.

    Attributes:
        trial: The name of the trial's directory.
        path: Below that.
        client: Names the sync, by the run id that the engine gives to each.
        node: Where.
        start: By the wall clock, as ``end``.
    """

    trial: str
    path: str
    client: str
    node: str
    start: float
    end: float


class StampingFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A directory; whoever publishes files there is slowed down and leaves stamps in ``log``."""

    protocol = "stamping"
    cachable = False  # an instance for each that is unpickled

    def __init__(self, log: str, pause_s: float = 0.2, **options: Any) -> None:
        super().__init__(log=log, pause_s=pause_s, **options)
        self._log, self._pause_s = log, pause_s

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        start = time.time()
        time.sleep(self._pause_s)
        super().mv(path1, path2, **options)
        if found := _PATH.search(path2):
            node = ray.get_runtime_context().get_node_id()
            stamp = [found[1], found[2], _sync_id(), node, start, time.time()]
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                os.write(log, json.dumps(stamp).encode() + b"\n")
            finally:
                os.close(log)


def _sync_id() -> str:
    """The run id that whoever called for this write was given, from the call stack."""
    frame = sys._getframe(1)
    while "run_id" not in frame.f_locals:
        assert frame.f_back, "nothing of the engine's is calling"
        frame = frame.f_back
    return str(frame.f_locals["run_id"])


def stamps(log: Path) -> list[Stamp]:
    """What has been noted so far."""
    return [Stamp(*json.loads(line)) for line in log.read_text().splitlines()]
