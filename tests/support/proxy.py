"""An HTTP proxy in front of a storage server that slows, breaks and counts the traffic.

It runs as a process of its own (this file is also that process's script), so that it never
competes with the test for the GIL. What belongs here: forwarding bytes unchanged, link shaping,
fault rules and accounting. What may not: anything that knows the test's objects or SDKs, and
any import from outside the standard library (the process starts with `python -I`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HOST = "127.0.0.1"
_CHUNK = 64 * 1024
_SOCKET_BUFFER = 128 * 1024  # bytes; what the kernel may hold back from the token bucket
_SEGMENT = 1460  # bytes; with loopback's 64 KiB a client's own kernel takes megabytes at once
_CREDIT_S = 0.02  # how much unused bandwidth may be caught up on
_ERRORS = {403: "AccessDenied", 404: "NoSuchKey", 500: "InternalError", 503: "SlowDown"}
_ACTION = re.compile(r"hang|reset|lose|status:[2-5]\d\d(:\w+)?|delay:\d+(\.\d+)?")
_BROKEN = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


@dataclasses.dataclass
class Record:
    """One request that came in; `status` is None while (or when) no answer went out.

    `body_bytes` is what was handed to the upstream server, so with an SDK's aws-chunked
    encoding it is some bytes more than the object. `action` is the rule's that applied.
    """

    method: str
    path: str
    query: str
    started_s: float
    body_bytes: int = 0
    status: int | None = None
    action: str | None = None


@dataclasses.dataclass(frozen=True)
class Stats:
    """What went through since the start or the last `reset_stats`, in order of arrival."""

    records: list[Record]

    def select(self, method: str | None = None, regex: str = "") -> Stats:
        """Return the part whose method and decoded path + "?" + query match."""
        return Stats(
            [
                record
                for record in self.records
                if method in (None, record.method) and re.search(regex, _target(record))
            ]
        )

    @property
    def requests(self) -> int:
        return len(self.records)

    @property
    def body_bytes(self) -> int:
        return sum(record.body_bytes for record in self.records)


def _target(record: Record) -> str:
    return f"{record.path}?{record.query}" if record.query else record.path


class Proxy:
    """The test's handle on a proxy process.

    Example:
        >>> with Proxy.start(server.host, server.port) as proxy:  # doctest: +SKIP
        ...     proxy.set(bandwidth_bytes_per_s=20e6, latency_s=0.02)
        ...     proxy.add_rule(r"\\.ckpt$", "status:503", method="PUT", times=2)
        ...     upload(server.uri("exp", port=proxy.port))
        ...     assert proxy.stats().select("PUT").requests == 3
    """

    host = HOST

    def __init__(self, process: subprocess.Popen[str], port: int, control_port: int) -> None:
        self._process = process
        self._control_port = control_port
        self.port = port
        self.pid = process.pid

    @classmethod
    def start(cls, upstream_host: str, upstream_port: int) -> Proxy:
        """Start a proxy process that forwards to the given server.

        Raises:
            RuntimeError: The process did not come up; its traceback is on stderr.
        """
        process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__)), upstream_host, str(upstream_port)],
            stdin=subprocess.PIPE,  # its end tells the process that the test is gone
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        if len(ports) != 2:
            process.kill()
            raise RuntimeError(f"the proxy exited with {process.wait()}")
        return cls(process, int(ports[0]), int(ports[1]))

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process and with it all connections; a second call does nothing."""
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def set(self, *, bandwidth_bytes_per_s: float | None = None, latency_s: float = 0.0) -> None:
        """Shape the link, at once and for requests in flight too; no argument unshapes it.

        Args:
            bandwidth_bytes_per_s: What all connections together may send upstream;
                None is unlimited, 0 a link that stands still until the next `set`.
            latency_s: Added once to each request.
        """
        self._call("set", bandwidth=bandwidth_bytes_per_s, latency=latency_s)

    def add_rule(
        self,
        key_regex: str,
        action: str,
        *,
        method: str | None = None,
        times: int | None = None,
        fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Make matching requests fail; the first rule that matches applies.

        Args:
            key_regex: Searched in the decoded path ("/bucket/key") + "?" + decoded query.
            action: `hang` (take the request, never answer), `reset` (RST on the request's
                head), `lose` (forward, then RST instead of the answer), `status:CODE` or
                `status:CODE:NAME` (answer so without asking the server, with NAME as S3's
                error code) or `delay:SECONDS` (then forward).
            method: The only method it applies to; None means any.
            times: After how many requests the rule is used up; None means never.
            fraction: Which share of the requests that match it hits, at random; the others go to
                the rules after it.
            seed: Of that choice: the n-th request that matches is hit or not, whatever it is.

        Raises:
            ValueError: `action`, `key_regex` or `fraction` is malformed.
        """
        if not _ACTION.fullmatch(action):
            raise ValueError(f"action: {action!r}")
        try:
            re.compile(key_regex)
        except re.error as exc:
            raise ValueError(f"key_regex: {exc}") from exc
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction: {fraction!r}")
        self._call(
            "add_rule",
            regex=key_regex,
            action=action,
            method=method,
            times=times,
            fraction=fraction,
            seed=seed,
        )

    def clear_rules(self) -> None:
        """Drop all rules; requests that hang go on hanging until their client gives up."""
        self._call("clear_rules")

    def stats(self) -> Stats:
        """Return all requests so far, those still in flight included."""
        return Stats([Record(**record) for record in self._call("stats")])

    def reset_stats(self) -> None:
        """Forget the requests so far."""
        self._call("reset_stats")

    def _call(self, command: str, **arguments: Any) -> Any:
        with socket.create_connection((HOST, self._control_port), timeout=30) as sock:
            sock.sendall(json.dumps([command, arguments]).encode() + b"\n")
            with sock.makefile("rb") as answer:
                return json.loads(answer.read())


# Below: what runs in the proxy's own process.


@dataclasses.dataclass
class _Rule:
    regex: str
    action: str
    method: str | None
    times: int | None
    fraction: float
    seed: int

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def applies(self, record: Record) -> bool:
        """Whether the rule hits this request; counts it when so."""
        if self.times == 0 or self.method not in (None, record.method):
            return False
        if not re.search(self.regex, _target(record)):
            return False
        if self._random.random() >= self.fraction:
            return False
        if self.times is not None:
            self.times -= 1
        return True


class _TokenBucket:
    """One budget of bytes per second, handed out in order of arrival."""

    def __init__(self) -> None:
        self._rate: float | None = None
        self._free_at_s = 0.0
        self._changed = asyncio.Event()

    def set_rate(self, rate: float | None) -> None:
        self._rate = rate
        self._free_at_s = 0.0
        self._changed.set()
        self._changed = asyncio.Event()

    def chunk(self) -> int:
        """How much to read at once so that no connection takes more than 20 ms of the link."""
        return _CHUNK if self._rate is None else min(_CHUNK, max(512, int(self._rate / 50)))

    async def take(self, count: int) -> None:
        while self._rate == 0:
            await self._changed.wait()
        if self._rate is None:
            return
        now_s = asyncio.get_running_loop().time()
        self._free_at_s = max(now_s - _CREDIT_S, self._free_at_s) + count / self._rate
        if self._free_at_s <= now_s:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self._free_at_s - now_s)


@dataclasses.dataclass(frozen=True)
class _Head:
    """The start line and headers of a message: verbatim and taken apart."""

    raw: bytes
    start: list[str]
    headers: dict[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> _Head:
        raw = await reader.readuntil(b"\r\n\r\n")
        start, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        pairs = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        return cls(raw, start.split(" ", 2), headers)

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"

    @property
    def expects_continue(self) -> bool:
        return self.headers.get("expect", "").lower() == "100-continue"


async def _body(
    head: _Head, reader: asyncio.StreamReader, size: Callable[[], int], *, response: bool
) -> AsyncIterator[tuple[bytes, int]]:
    """Yield a message's body as (bytes on the wire, how many of them are content)."""
    if head.chunked:
        content = 1
        while content:
            line = await reader.readuntil(b"\r\n")
            yield line, 0
            left = content = int(line.split(b";")[0], 16)
            while left:
                data = await reader.read(min(left, size()))
                if not data:
                    raise asyncio.IncompleteReadError(b"", left)
                left -= len(data)
                yield data, len(data)
            # The CRLF after a chunk, or the trailers up to an empty line after the last.
            line = await reader.readuntil(b"\r\n")
            while not content and line != b"\r\n":
                yield line, 0
                line = await reader.readuntil(b"\r\n")
            yield line, 0
        return
    if response and "content-length" not in head.headers:
        while data := await reader.read(size()):
            yield data, len(data)
        return
    left = int(head.headers.get("content-length", 0))
    while left:
        data = await reader.read(min(left, size()))
        if not data:
            raise asyncio.IncompleteReadError(b"", left)
        left -= len(data)
        yield data, len(data)


def _abort(writer: asyncio.StreamWriter, *, reset: bool = False) -> None:
    """Drop a connection and what is buffered for it, with an RST if asked."""
    if reset and not writer.transport.is_closing():
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _succeeded(task: asyncio.Future[None]) -> bool:
    return task.done() and task.exception() is None


class _Upstream:
    """The server-side connection that belongs to one client connection."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the open connection, anew when the server has closed an idle one."""
        if self.writer is None or self.reader.at_eof() or self.writer.is_closing():
            self.close()
            self.reader, self.writer = await asyncio.open_connection(*self._address, limit=_CHUNK)
            self.writer.transport.set_write_buffer_limits(high=_CHUNK)
        return self.reader, self.writer

    def close(self) -> None:
        if self.writer is not None:
            _abort(self.writer)


class _Server:
    """Forwards requests and obeys the control port."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._bucket = _TokenBucket()
        self._latency_s = 0.0
        self._rules: list[_Rule] = []
        self._records: list[Record] = []

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command, arguments = json.loads(await reader.readline())
        answer: Any = None
        if command == "set":
            self._bucket.set_rate(arguments["bandwidth"])
            self._latency_s = arguments["latency"]
        elif command == "add_rule":
            self._rules.append(_Rule(**arguments))
        elif command == "clear_rules":
            self._rules.clear()
        elif command == "reset_stats":
            self._records.clear()
        else:
            answer = [dataclasses.asdict(record) for record in self._records]
        writer.write(json.dumps(answer).encode())
        await writer.drain()
        writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one client connection until either side ends it."""
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio only sets upstream's
        writer.transport.set_write_buffer_limits(high=_CHUNK)
        upstream = _Upstream(self._upstream)
        try:
            while await self._request(reader, writer, upstream):
                pass
            await writer.drain()
            writer.close()
        except _BROKEN:
            _abort(writer)
        finally:
            upstream.close()

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: _Upstream
    ) -> bool:
        """Handle one request; return whether the connection can take another."""
        head = await _Head.read(reader)
        method, target, _ = head.start
        path, _, query = target.partition("?")
        record = Record(method, unquote(path), unquote(query), time.time())
        self._records.append(record)
        rule = next((rule for rule in self._rules if rule.applies(record)), None)
        record.action = rule.action if rule else None
        kind, _, value = (record.action or "").partition(":")
        if kind == "reset":
            _abort(writer, reset=True)
            return False
        await asyncio.sleep(self._latency_s + (float(value) if kind == "delay" else 0.0))
        if kind == "status":
            return await self._refuse(value, head, reader, writer, record)
        if kind == "hang":
            await self._swallow(head, reader)
            while await reader.read(_CHUNK):
                pass
            return False
        up_reader, up_writer = await upstream.connect()
        await self._bucket.take(len(head.raw))
        up_writer.write(head.raw)
        # Both directions at once: the body may wait for a "100 Continue", and the server may
        # answer before it has taken the body.
        sending = asyncio.ensure_future(self._send(head, reader, up_writer, record))
        answering = asyncio.ensure_future(self._answer(head, up_reader, writer, record))
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done() and head.expects_continue and record.body_bytes == 0:
                return answering.result() and False  # refused: the body will not come
            client_is_there = not reader.at_eof() and reader.exception() is None
            if sending.done() and sending.exception() and client_is_there:
                await asyncio.wait({answering}, timeout=5)  # the server may have said why
            else:
                await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_EXCEPTION)
            if sending.done() and (error := sending.exception()) and not answering.done():
                raise error
            return answering.result() and _succeeded(sending) and not head.closes
        finally:
            sending.cancel()
            answering.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)

    async def _send(
        self,
        head: _Head,
        reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        record: Record,
    ) -> None:
        async for data, content in _body(head, reader, self._bucket.chunk, response=False):
            await self._bucket.take(len(data))
            up_writer.write(data)
            await up_writer.drain()
            record.body_bytes += content

    async def _answer(
        self,
        request: _Head,
        up_reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        record: Record,
    ) -> bool:
        """Forward the answer, interim ones too; return whether the server keeps listening."""
        status = 100
        while status < 200:
            head = await _Head.read(up_reader)
            status = int(head.start[1])
            if record.action == "lose" and status >= 200:
                _abort(writer, reset=True)
                return False
            writer.write(head.raw)
            await writer.drain()
        record.status = status
        if request.start[0] == "HEAD" or status in (204, 304):
            return not head.closes
        async for data, _ in _body(head, up_reader, lambda: _CHUNK, response=True):
            writer.write(data)
            await writer.drain()
        return not head.closes and (head.chunked or "content-length" in head.headers)

    async def _refuse(
        self,
        answer: str,
        head: _Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        record: Record,
    ) -> bool:
        """Answer with a status as S3 would; a client that asked first keeps its body."""
        keep = not (head.expects_continue or head.closes)
        if keep:
            await self._swallow(head, reader)
        number, _, name = answer.partition(":")
        status = int(number)
        code = name or _ERRORS.get(status, "InjectedError")
        text = f"<Error><Code>{code}</Code><Message>injected by the test</Message></Error>"
        body = b"" if head.start[0] == "HEAD" or status in (204, 304) else text.encode()
        lines = [f"HTTP/1.1 {status} {code}", "Content-Type: application/xml"]
        if status not in (204, 304):
            lines.append(f"Content-Length: {len(body)}")
        lines.append(f"Connection: {'keep-alive' if keep else 'close'}")
        record.status = status
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        return keep

    async def _swallow(self, head: _Head, reader: asyncio.StreamReader) -> None:
        async for data, _ in _body(head, reader, self._bucket.chunk, response=False):
            await self._bucket.take(len(data))


async def _main(upstream_host: str, upstream_port: str) -> None:
    server = _Server((upstream_host, int(upstream_port)))
    listener = socket.create_server((HOST, 0), backlog=512)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)  # inherited
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
    await asyncio.start_server(server.serve, sock=listener, limit=_CHUNK)
    control = await asyncio.start_server(server.control, HOST, 0)
    print(listener.getsockname()[1], control.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
