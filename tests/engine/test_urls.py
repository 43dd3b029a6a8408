"""What becomes of an ``upload_dir`` and its ``storage_options``, and of mistakes in them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as arrow

from tests.engine.places import at_url
from tests.engine.support import forget_library
from tests.support.s3_server import HOST, S3Server, free_ports
from tests.support.servers import Azurite, FakeGcs, WebDav
from tests.support.sftp_server import SftpServer
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.urls import below, filesystem_at, protocol_of, without_secrets
from tune_sync_plugin.errors import describe, is_retryable

Given = Mapping[str, Any]
MB = 1 << 20


def options_of(filesystem: Any) -> dict[str, Any]:
    found: dict[str, Any] = filesystem.__reduce__()[1][0]
    return found


# -- S3: fsspec's options in pyarrow's words -----------------------------------------------------

REGION: dict[str, Any] = {"client_kwargs": {"region_name": "eu-west-1"}}
KEYS: dict[str, Any] = {"key": "k", "secret": "s"}


@pytest.mark.parametrize(
    ("given", "became"),
    [
        (KEYS, {"access_key": "k", "secret_key": "s"}),
        ({"username": "k", "password": "s"}, {"access_key": "k", "secret_key": "s"}),
        ({**KEYS, "token": "t"}, {"session_token": "t"}),
        ({"anon": True}, {"anonymous": True}),
        ({"anon": False}, {"anonymous": False}),
        ({**KEYS, "token": None}, {"session_token": ""}),
        ({"endpoint_url": "http://here:1"}, {"endpoint_override": "http://here:1"}),
        ({"client_kwargs": {"region_name": "eu-west-2"}}, {"region": "eu-west-2"}),
        (
            {"client_kwargs": {"endpoint_url": "http://here:1", "region_name": "r"}},
            {"endpoint_override": "http://here:1", "region": "r"},
        ),
        (
            {
                "client_kwargs": {
                    "aws_access_key_id": "k",
                    "aws_secret_access_key": "s",
                    "aws_session_token": "t",
                    "region_name": "r",
                }
            },
            {"access_key": "k", "secret_key": "s", "session_token": "t", "region": "r"},
        ),
    ],
    ids=str,
)
def test_s3_options_one_by_one(given: Given, became: Given) -> None:
    filesystem, path = filesystem_at("s3://bucket/a/b/", {**REGION, **given})
    assert isinstance(filesystem, arrow.S3FileSystem)
    assert path == "bucket/a/b"
    found = options_of(filesystem)
    assert {name: found[name] for name in became} == dict(became)


@pytest.mark.parametrize(
    "other",
    [{"use_ssl": False}, {"profile": "p"}, {"client_kwargs": {"verify": False}}],
    ids=str,
)
def test_what_only_s3fs_can_do_is_done_by_s3fs(other: Given) -> None:
    pytest.importorskip("s3fs")
    filesystem, path = filesystem_at("s3://bucket/a", {**KEYS, **other, "session": None})
    assert filesystem.protocol == ("s3", "s3a")
    assert path == "bucket/a"


def test_a_query_is_pyarrow_s() -> None:
    filesystem, path = filesystem_at("s3a://bucket/a?region=eu-west-3&scheme=http", {})
    assert path == "bucket/a"
    found = options_of(filesystem)
    assert (found["region"], found["scheme"]) == ("eu-west-3", "http")


def test_options_are_in_one_place() -> None:
    with pytest.raises(ValueError, match="not both"):
        filesystem_at("s3://bucket/a?region=eu-west-3", KEYS)


# -- other protocols -----------------------------------------------------------------------------


def test_a_path_and_a_file_url_are_the_same() -> None:
    assert at_url("/mnt/a", {}).name == at_url("file:///mnt/a", {}).name == "local:/mnt/a"


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        filesystem_at("nonesuch://a/b", {})


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match=r"storage_options of webdav://.*nonesuch"):
        filesystem_at("webdav://a", {"base_url": "http://nowhere.invalid", "nonesuch": 1})


def test_an_option_s_value_is_not_shown() -> None:
    auth = {"tune": "SECRET"}  # which httpx does not take, and quotes
    with pytest.raises(ValueError, match="auth") as caught:
        filesystem_at("webdav://a", {"base_url": "http://nowhere.invalid", "auth": auth})
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_options_may_come_from_json() -> None:
    options = {"base_url": "http://nowhere.invalid", "auth": ["tune", "secret"]}
    assert filesystem_at("webdav://a", options)[1] == "a"


@pytest.mark.parametrize(
    ("protocol", "module", "library"),
    [
        ("az", "adlfs", "adlfs"),
        ("abfs", "adlfs", "adlfs"),
        ("gs", "gcsfs", "gcsfs"),
        ("sftp", "sshfs", "sshfs"),
        ("webdav", "webdav4", "webdav4"),
        ("smb", "smbprotocol", "smbprotocol"),
    ],
)
def test_a_missing_library_is_named(
    monkeypatch: pytest.MonkeyPatch, protocol: str, module: str, library: str
) -> None:
    forget_library(monkeypatch, protocol, module)
    with pytest.raises(ImportError, match=f"pip install {library}, on every node") as caught:
        filesystem_at(f"{protocol}://host/a", {})
    assert f"{protocol}:// needs a library" in describe(caught.value)
    assert not is_retryable(caught.value)


@pytest.mark.parametrize(
    ("url", "name", "wanted"),
    [
        ("s3://b/a", "exp", "s3://b/a/exp"),
        ("s3://b/a/", "exp", "s3://b/a/exp"),
        ("s3://b/a?region=r", "exp", "s3://b/a/exp?region=r"),
        ("s3://b/a/?region=r&scheme=http", "exp", "s3://b/a/exp?region=r&scheme=http"),
        ("sftp://me:pw@host:22/a", "exp", "sftp://me:pw@host:22/a/exp"),
        ("/mnt/a", "exp", "/mnt/a/exp"),
        ("memory://", "exp", "memory://exp"),
        ("file:///", "exp", "file:///exp"),
    ],
)
def test_below(url: str, name: str, wanted: str) -> None:
    assert below(url, name) == wanted


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("sftp://me:SECRET@host:22/a", "sftp://host:22/a"),
        ("sftp://me:p@SECRET@host/a", "sftp://host/a"),
        ("s3://AKIA:SECRET@b/a?region=r&token=SECRET", "s3://b/a"),
        ("az://c/a?sig=SECRET", "az://c/a"),
        ("/mnt/a@b?c", "/mnt/a@b?c"),
        ("file:///mnt/a", "file:///mnt/a"),
    ],
)
def test_without_secrets(url: str, wanted: str) -> None:
    assert without_secrets(url) == wanted


def test_protocol_of() -> None:
    assert [protocol_of(url) for url in ("gs://a", "a/b", "/a", "file:///a")] == [
        "gs",
        *["file"] * 3,
    ]


# -- mistakes, asked of real servers -------------------------------------------------------------


def _s3(get: Any) -> tuple[str, dict[str, Any]]:
    server: S3Server = get("s3")
    return f"s3://{server.bucket}/p", server.options()


def _of(name: str) -> Any:
    def made(get: Any) -> tuple[str, dict[str, Any]]:
        server: Azurite | FakeGcs | WebDav | SftpServer = get(name)
        return server.url("p"), server.options()

    return made


SERVERS = {
    "s3": _s3,
    "azure": _of("azurite"),
    "gcs": _of("fake_gcs"),
    "webdav": _of("webdav"),
    "sftp": _of("sftp"),
}
# The password is another one, and the client must not show it.
WRONG = "d3Jvbmctc2VjcmV0"


def _connection(options: Given, **changed: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in options["connection_string"].split(";") if part]
    parts = {name: value for name, _, value in pairs} | changed
    return {"connection_string": ";".join(f"{name}={value}" for name, value in parts.items())}


MISTAKES: dict[str, dict[str, Any]] = {
    "credentials": {
        "s3": lambda url, options: (url, {**options, "secret": WRONG}),
        "azure": lambda url, options: (url, _connection(options, AccountKey=WRONG)),
        "webdav": lambda url, options: (url, {**options, "auth": ("tune", WRONG)}),
        "sftp": lambda url, options: (url, {**options, "password": WRONG}),
    },
    "bucket": {
        "azure": lambda url, options: (url.replace("results", "no-such-bucket"), options),
        "gcs": lambda url, options: (url.replace("results", "no-such-bucket"), options),
    },
    "endpoint": {
        "s3": lambda url, options: (url, {**options, "endpoint_url": _nobody()}),
        "azure": lambda url, options: (
            url,
            _connection(options, BlobEndpoint=f"{_nobody()}/tune"),
        ),
        "gcs": lambda url, options: (url, {**options, "endpoint_url": _nobody()}),
        "webdav": lambda url, options: (url, {**options, "base_url": _nobody()}),
        "sftp": lambda url, options: (f"sftp://tune@{_nobody()[7:]}/p", options),
    },
}


def error_of(do: Callable[[], Any]) -> Exception | None:
    """Of whatever class the client makes it."""
    try:
        do()
    except Exception as error:
        return error
    return None


def _nobody() -> str:
    return f"http://{HOST}:{free_ports(1)[0]}"


@pytest.mark.parametrize("size", [1, 11 * MB], ids=["small", "11 MB"])
@pytest.mark.parametrize(
    ("mistake", "kind"), [(mistake, kind) for mistake in MISTAKES for kind in MISTAKES[mistake]]
)
def test_a_mistake_is_said_at_once_in_one_line(
    request: pytest.FixtureRequest, mistake: str, kind: str, size: int
) -> None:
    url, options = MISTAKES[mistake][kind](*SERVERS[kind](request.getfixturevalue))
    began = time.monotonic()
    error = error_of(lambda: at_url(url, options).write("d/a", Memory(b"x" * size), "run"))
    took_s = time.monotonic() - began
    assert error
    said = f"{type(error).__name__}: {describe(error)}"
    assert is_retryable(error) == (mistake == "endpoint"), said
    assert "\n" not in said
    assert WRONG not in said
    assert len(said) < 400, said
    words = {
        "credentials": r"(?i)denied|authenticat|signature|unauthorized|40[13]",
        "bucket": r"(?i)no-such-bucket|container does not exist|bucket does not exist",
        "endpoint": rf"(?i){HOST}|connect",
    }
    assert re.search(words[mistake], said), said
    assert took_s < 8, said


def test_a_server_that_was_restarted_is_reached_again(tmp_path: Path) -> None:
    """fsspec keeps clients, also those whose connection is gone."""
    (tmp_path / "served").mkdir()
    with SftpServer(tmp_path / "served") as server:
        storage = at_url(server.url("p"), server.options())
        storage.write("a", Memory(b"1"), "run")
        server.disconnect()
        deadline = time.monotonic() + 10
        while error := error_of(lambda: storage.write("a", Memory(b"2"), "run")):
            assert is_retryable(error)
            assert time.monotonic() < deadline
    assert (tmp_path / "served" / "p" / "a").read_bytes() == b"2"
