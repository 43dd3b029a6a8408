"""What tests share: one cluster of nodes with disks of their own, one S3 server behind a proxy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import s3_server
from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.restarts import Place
from tests.support.s3_server import S3Server
from tests.support.scenarios import Link
from tests.support.servers import Azurite, FakeGcs, WebDav
from tests.support.sftp_server import SftpServer

# gcsfs asks first, by gRPC, what kind of bucket it is. fake-gcs-server does not answer that, and
# gcsfs waits. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(workers=2) as running:
        yield running


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    if reason := s3_server.available():
        pytest.skip(reason)
    with S3Server.start(tmp_path_factory.mktemp("s3")) as server:
        yield server


def _served(server: Any, reason: str | None) -> Iterator[Any]:
    if reason:
        pytest.skip(reason)
    with server() as running:
        yield running


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    yield from _served(lambda: Azurite(tmp_path_factory.mktemp("azurite")), Azurite.available())


@pytest.fixture(scope="session")
def webdav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDav]:
    yield from _served(lambda: WebDav(tmp_path_factory.mktemp("webdav")), WebDav.available())


@pytest.fixture(scope="session")
def fake_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGcs]:
    yield from _served(lambda: FakeGcs(tmp_path_factory.mktemp("gcs")), FakeGcs.available())


@pytest.fixture(scope="session")
def sftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SftpServer]:
    with SftpServer(tmp_path_factory.mktemp("sftp")) as running:
        yield running


@pytest.fixture(scope="session")
def proxy(s3: S3Server) -> Iterator[Proxy]:
    with Proxy.start(s3.host, s3.port) as running:
        yield running


@pytest.fixture
def link(s3: S3Server, proxy: Proxy) -> Iterator[Link]:
    yield Link(s3, proxy)
    proxy.clear_rules()
    proxy.set()


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A directory that all nodes of the cluster share, as a laboratory's NFS would be."""
    path = tmp_path / "storage"
    path.mkdir()
    return path


@pytest.fixture(params=[pytest.param("directory", marks=pytest.mark.exhaustive), "S3"])
def place(request: pytest.FixtureRequest) -> Place:
    """Where an experiment goes, twice: a directory that all nodes share, and S3 by the proxy."""
    if request.param == "S3":
        return Place.on_s3(request.getfixturevalue("link"))
    return Place.in_directory(request.getfixturevalue("storage"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes a row of the failure matrix for the table at the end of the test run.

    Called as ``figure("node killed", written=1000, stored=900, lost="node 1a2b: 4 s")``: bytes that
    the training code wrote, bytes of them that storage holds (count them there, byte for byte), and
    what the report names as lost (bytes, or its words where it can't know).
    """

    def note(event: str, *, written: int, stored: int, lost: Any = 0, more: str = "") -> None:
        line = f"{event}: {written:,} / {stored:,} / {lost}" + (f" ({more})" if more else "")
        request.node.user_properties.append(("figure", line))  # travels between processes

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for found in terminalreporter.stats.values() for r in found]
    lines = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == "figure"
    ]
    if lines:
        terminalreporter.section("bytes written / in storage / reported lost")
        for line in lines:
            terminalreporter.write_line(line)
