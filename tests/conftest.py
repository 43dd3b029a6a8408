"""What tests share: one cluster of nodes with disks of their own, one S3 server behind a proxy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import s3_server
from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.s3_server import S3Server
from tests.support.scenarios import Link


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
