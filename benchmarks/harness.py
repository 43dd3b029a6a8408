"""The bench: an S3 server behind a proxy, child processes that are measured, interleaved rounds.

What is compared, and what comes out of it, is known to the cases. Nothing here is timed but what a
child does; requests and bytes are counted at the proxy, contents are checked at the server itself.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers import PEERS, command, missing
from tests.support.proxy import Proxy
from tests.support.s3_server import REGION, S3Server
from tune_sync_plugin import SyncConfig

LATENCY_S = 0.02
REPOSITORY = Path(__file__).resolve().parents[1]
# After so many bytes the server starts anew, empty: deleting from it frees no space at once.
_RENEW_BYTES = 6_000_000_000
_PATIENCE_S = 900.0


class ToolError(Exception):
    """A client failed, or left something out; it has no figure then."""


@dataclass(frozen=True)
class Sample:
    """One measured run of one client.

    Attributes:
        wall_s: As seen by the process that called it, or started it if it is a command.
        cpu_s: Of all its threads and processes.
        peak_mb: Resident memory at its highest, 10^6 bytes.
        idle_mb: What it had before, all imports done; 0 for commands.
        requests: That arrived at the proxy meanwhile.
        sent_bytes: Bodies of these.
        proxy_cpu_s: What the proxy itself used. Close to ``wall_s``, the proxy was the limit.
        factor: More than 1: only a part was done, and the whole would take so many times as long.
        extra: What else the client said.
    """

    wall_s: float
    cpu_s: float = 0.0
    peak_mb: float = 0.0
    idle_mb: float = 0.0
    requests: int = 0
    sent_bytes: int = 0
    proxy_cpu_s: float = 0.0
    factor: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


class Child:
    """A process that does one job per line of JSON; ends with its parent."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        try:
            self.idle_mb = float(self._answer(120)["idle_mb"])
        except BaseException:
            self.stop()
            raise

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Have a job done.

        Raises:
            ToolError: It failed, or took longer than anybody would wait.
        """
        assert self._process.stdin
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer(_PATIENCE_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out
        ready, _, _ = select.select([out], [], [], timeout_s)
        line = out.readline() if ready else ""
        answer = json.loads(line) if line else {"error": "no answer"}
        if "error" in answer:
            tail = self._log.read_text(errors="replace")[-1500:]
            raise ToolError(f"{answer['error']}\n{tail}")
        return dict(answer)

    def stop(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


class Bench:
    """Where all cases run; a context manager.

    Args:
        scratch: For trees and manifests; emptied at the end.
        server_directory: For the server's data.
        quick: Whether small sizes and few rounds will do.

    Attributes:
        left_out: Clients that are not on this machine, and why.
    """

    def __init__(self, scratch: Path, server_directory: Path, *, quick: bool) -> None:
        self.scratch = scratch
        self.quick = quick
        self.left_out = {name: why for name in PEERS if (why := missing(name))}
        self._server_directory = server_directory
        self._written = 0
        self._stack = contextlib.ExitStack()
        self._children: dict[str, Child] = {}

    def __enter__(self) -> Bench:
        self.renew()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.quick = False
        self.dismiss()
        self._stack.close()

    def renew(self) -> None:
        """Replace server and proxy by new ones; what was stored is gone."""
        self._stack.close()
        directory = self._server_directory / uuid.uuid4().hex[:8]
        self._stack.callback(shutil.rmtree, directory, ignore_errors=True)
        self.server = self._stack.enter_context(S3Server.start(directory))
        self.proxy = self._stack.enter_context(Proxy.start(self.server.host, self.server.port))
        self._written = 0

    def renew_if_full(self) -> None:
        """Between rounds whose results nobody needs any more: keep the server's disk small."""
        if self._written > _RENEW_BYTES:
            self.renew()

    def pick(self, full: int, quick: int) -> int:
        """A size or a number of rounds."""
        return quick if self.quick else full

    def path(self, name: str) -> Path:
        """A path for a directory or file that does not exist yet."""
        return self.scratch / f"{name}-{uuid.uuid4().hex[:6]}"

    @contextlib.contextmanager
    def directory(self, name: str) -> Iterator[Path]:
        """A new directory that is removed in the end."""
        path = self.path(name)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def job(self, root: Path, prefix: str = "", *, direct: bool = False) -> dict[str, Any]:
        """What clients need to know to bring ``root`` to a prefix, a fresh one by default.

        ``direct`` leaves the proxy out.
        """
        server, port = self.server, self.server.port if direct else self.proxy.port
        prefix = prefix or uuid.uuid4().hex[:8]
        return {
            "root": str(root),
            "prefix": prefix,
            "uri": server.uri(prefix, port=port),
            "endpoint": f"http://{server.host}:{port}",
            "bucket": server.bucket,
            "key": server.access_key,
            "secret": server.secret_key,
            "region": REGION,
            "options": base64.b64encode(pickle.dumps(SyncConfig().options())).decode(),
            "manifest": str(self.path("manifest") / "manifest.sqlite"),
        }

    def measure(self, name: str, job: Mapping[str, Any], *, latency_s: float = LATENCY_S) -> Sample:
        """Have a client do a job once.

        Raises:
            ToolError: It failed.
        """
        child = self._child(name)
        self.proxy.set(latency_s=latency_s)
        self.proxy.reset_stats()
        before_s = _cpu_s(self.proxy.pid)
        answer = child.ask(command(name, dict(job)) if PEERS[name].argv else job)
        stats = self.proxy.stats()
        self._written += stats.body_bytes
        return Sample(
            idle_mb=child.idle_mb,
            requests=stats.requests,
            sent_bytes=stats.body_bytes,
            proxy_cpu_s=_cpu_s(self.proxy.pid) - before_s,
            **answer,
        )

    def _child(self, name: str) -> Child:
        if name not in self._children:
            log = self.scratch / f"{name}.log"
            script = str(Path(__file__).with_name("launcher.py"))
            small = [sys.executable, "-I", "-S", script]
            warm = [sys.executable, "-m", "benchmarks.worker", name]
            self._children[name] = Child(small if PEERS[name].argv else warm, log)
        return self._children[name]

    def dismiss(self) -> None:
        """End the clients' processes; the next job starts new ones. A quick run saves that time."""
        while self._children and not self.quick:
            self._children.popitem()[1].stop()

    def check(self, job: Mapping[str, Any]) -> None:
        """Ask the server whether all files of the job's directory are there, by name and size.

        Raises:
            ToolError: Something is missing, or has another size.
        """
        found, start = self.server.keys(f"{job['prefix']}/"), len(job["prefix"]) + 1
        sizes = {key[start:]: size for key, size in found.items()}
        wanted = sizes_below(Path(job["root"]))
        wrong = [path for path, size in wanted.items() if sizes.get(path) != size]
        if wrong:
            raise ToolError(
                f"{len(wrong)} of {len(wanted)} files are not in storage, such as {wrong[0]}"
            )
        # Directory markers and our index are no files of the tree; anything else is a mistake.
        more = [p for p in sizes.keys() - wanted.keys() if p[-1:] not in ("/", "")]
        more = [path for path in more if not path.startswith(".tune_sync/")]
        if len(more) > 0 and any(sizes[path] for path in more):
            raise ToolError(f"{len(more)} objects too many, such as {more[0]}")


def sizes_below(root: Path) -> dict[str, int]:
    """The sizes of all files below a directory, by their paths relative to it."""
    return {
        os.path.relpath(os.path.join(directory, name), root): os.stat(
            os.path.join(directory, name)
        ).st_size
        for directory, _, names in os.walk(root)
        for name in names
    }


def interleaved(rounds: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    """A B C A B C ...; who has fewer rounds is in the first ones only."""
    for number in range(max(rounds.values(), default=0)):
        for name, count in rounds.items():
            if number < count:
                yield number, name


def scaled(sample: Sample, factor: float) -> Sample:
    """A sample of a part, marked with how many such parts the whole has."""
    return replace(sample, factor=factor)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def log(text: str) -> None:
    """Progress, on stderr: stdout has the tables."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
