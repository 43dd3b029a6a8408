"""Tries the storage from each node before it counts: write, read and delete one small object.

What a node can't do is known before its first sync would fail, and said in one line with what to
do. The trial itself runs in a sync worker; here is also who asks, and what is made of the answers.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tune_sync_plugin.engine.index import OUR_DIRECTORY
from tune_sync_plugin.engine.pool import Limits, once
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import describe

LIMIT_S = 10.0
# How long the process for it may take to start on a busy node, before that is worth a warning.
START_S = 60.0
# So far apart clocks are worth a word: files' times are compared with them.
_SKEW_S = 1.0


class HasRoot(Protocol):
    """An experiment, or its mirror."""

    def root(self) -> Storage:
        """The storage at the experiment's directory."""


@dataclass(frozen=True)
class Finding:
    """What one node's trial came to.

    Attributes:
        error: What does not work, and what to do; ``None`` if all does.
        ahead_s: The node's clock is at least so many seconds ahead of the driver's (or, if
            negative, behind); 0 if that can't be told from the time that the answer took.
    """

    error: str | None = None
    ahead_s: float = 0.0


def try_storage(run: HasRoot) -> tuple[str | None, float]:
    """Runs on the node: what does not work, or ``None``; and what its clock says."""
    step = "opening"

    def attempt() -> None:
        nonlocal step
        step = "opening"
        storage = run.root()
        path, content = f"{OUR_DIRECTORY}/probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        step = "writing to"
        storage.write(path, Memory(content), "probe")
        step = "reading from"
        if b"".join(storage.read(path)) != content:
            raise OSError("what was read is not what was written")
        step = "deleting from"
        storage.remove(path)

    try:
        once(attempt, Limits.within(LIMIT_S))
    except BaseException as error:
        return f"{step} it failed: {type(error).__name__}: {describe(error)}. {advice_on(error)}", (
            time.time()
        )
    return None, time.time()


# By the class of an error, or by what clients write of it; the first that fits.
_ADVICE = (
    (r"^(ImportError|ModuleNotFoundError)", "Install it on every node"),
    (r"there is no directory", "Create it, or mount it on this node; all nodes must share it"),
    (
        r"NO_SUCH_BUCKET|NoSuchBucket|bucket does not exist",
        "Create the bucket, or correct its name",
    ),
    (
        r"SignatureDoesNotMatch|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY",
        "Correct the access key and the secret",
    ),
    (
        r"^PermissionError|AccessDenied|ACCESS_DENIED|\b403\b",
        "Give this node credentials that may write, read and delete there, in storage_options or "
        "in its environment",
    ),
    (r"[Cc]redentials", "Give credentials in storage_options, or in this node's environment"),
    (r"^(ValueError|TypeError)", "Correct upload_dir or storage_options"),
    (r"", "Is the endpoint right, and can this node reach it?"),
)


def advice_on(error: BaseException) -> str:
    """What to do about an error of a storage."""
    said = f"{type(error).__name__}: {error}"
    return next(advice for pattern, advice in _ADVICE if re.search(pattern, said))


class Caller(Protocol):
    """Calls functions on nodes; ``executor.RayExecutor`` does."""

    def call(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any: ...
    def is_ready(self, call: Any) -> bool: ...
    def result(self, call: Any) -> Any: ...


class Preflight:
    """Asks each node once. Nothing here blocks.

    Args:
        caller: Calls functions on nodes.
        clock: The time, in seconds since the epoch.
    """

    def __init__(self, caller: Caller, clock: Callable[[], float] = time.time) -> None:
        self._caller = caller
        self._clock = clock
        self._asked: dict[str, tuple[Any, float]] = {}
        self._late: set[str] = set()
        self.findings: dict[str, Finding] = {}

    def check(self, node_id: str) -> None:
        """Have a node try, unless it has."""
        if node_id in self._asked or node_id in self.findings:
            return
        try:
            call = self._caller.call(node_id, try_storage)
        except Exception as error:
            self.findings[node_id] = Finding(describe(error))
            return
        self._asked[node_id] = (call, self._clock())

    def poll(self) -> dict[str, Finding]:
        """What has been found since the last call."""
        found: dict[str, Finding] = {}
        for node_id, (call, asked) in list(self._asked.items()):
            if self._caller.is_ready(call):
                del self._asked[node_id]
                found[node_id] = self.findings[node_id] = self._finding(call, asked)
            elif self._clock() - asked > START_S + LIMIT_S and node_id not in self._late:
                self._late.add(node_id)  # it may still answer
                waited = self._clock() - asked
                found[node_id] = Finding(f"no process of ours has started for {waited:.0f} s there")
        return found

    def _finding(self, call: Any, asked: float) -> Finding:
        try:
            error, its_time = self._caller.result(call)
        except Exception as problem:
            return Finding(describe(problem))
        # Between these two moments of the driver's, the node's clock said this.
        finding = Finding(error)
        now = self._clock()
        if its_time - now > _SKEW_S:
            return replace(finding, ahead_s=its_time - now)
        if asked - its_time > _SKEW_S:
            return replace(finding, ahead_s=its_time - asked)
        return finding

    def is_able(self, node_id: str) -> bool:
        """Whether a node has tried and can; asks it if it never was."""
        self.check(node_id)
        finding = self.findings.get(node_id)
        return finding is not None and finding.error is None


def warnings_about(node_id: str, finding: Finding, where: str) -> list[str]:
    """One line for each thing that is wrong."""
    lines = []
    if finding.error:
        lines.append(f"SyncCallback: node {node_id[:8]} can't use {where}: {finding.error}")
    if finding.ahead_s:
        way = "ahead of" if finding.ahead_s > 0 else "behind"
        lines.append(
            f"SyncCallback: the clock of node {node_id[:8]} is {abs(finding.ahead_s):.0f} s or "
            f"more {way} the driver's. Files' times are compared with it: set it, as by NTP"
        )
    return lines
