"""What Ray's S3 file system was made with reaches the faster clients, option by option.

A server that notes what it is asked takes the same request from pyarrow, obstore and botocore; what
matters of the three must be the same. Roles and profiles are tried on the real server.
"""

from __future__ import annotations

import http.server
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as arrow
import pytest

from tests.support.s3_server import S3Server
from tune_sync_plugin.engine import s3_options
from tune_sync_plugin.engine.arrow_storage import ArrowStorage
from tune_sync_plugin.engine.object_storage import ObjectStorage
from tune_sync_plugin.engine.s3_options import botocore_client, obstore_client, options_of
from tune_sync_plugin.engine.source import Memory
from tune_sync_plugin.engine.storage import storage_at

AWS_VARIABLES = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ENDPOINT_URL")
MINE = {"access_key": "mykey", "secret_key": "mysecret", "region": "us-east-1", "scheme": "http"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials but the test's, and clients of its own."""
    for name in AWS_VARIABLES:
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    for cached in (s3_options._session, s3_options._credentials, obstore_client, botocore_client):
        cached.cache_clear()


@dataclass(frozen=True)
class Asked:
    """What a server can tell of a client's settings by one request."""

    path: str
    host: str
    signed_by: str
    token: str

    @classmethod
    def of(cls, request: http.server.BaseHTTPRequestHandler) -> Asked:
        authorization = request.headers.get("Authorization", "")
        # The key, the day, the region and the service.
        scope = re.search(r"Credential=(\S+?)/\d{8}/([\w-]+)/s3/", authorization)
        return cls(
            request.path.partition("?")[0],
            request.headers["Host"].partition(":")[0],
            "/".join(scope.groups()) if scope else authorization,
            request.headers.get("X-Amz-Security-Token", ""),
        )


class Listener:
    """Takes HEAD requests and notes them."""

    def __init__(self) -> None:
        asked: list[Asked] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                asked.append(Asked.of(self))
                self.send_response(200)
                self.send_header("ETag", '"abc"')
                self.send_header("Content-Length", "3")
                self.send_header("Last-Modified", "Wed, 25 Nov 2026 10:00:00 GMT")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.asked = asked
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def same_from_all(self, filesystem: Any) -> Asked:
        """The request that the three clients make for one object."""
        self.asked.clear()
        filesystem.get_file_info("bucket/pre/a b")
        theirs = self.asked[0]
        self.asked.clear()
        storage = storage_at(filesystem, "bucket/pre")
        assert isinstance(storage, ObjectStorage)
        assert storage.stat("a b")
        botocore_client(options_of(filesystem), 0).head_object(Bucket="bucket", Key="pre/a b")
        assert self.asked == [theirs, theirs]
        return theirs


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener()
    yield server
    server.stop()


def test_keys_region_and_endpoint(listener: Listener) -> None:
    made = arrow.S3FileSystem(
        **MINE | {"region": "eu-north-1"}, endpoint_override=listener.endpoint
    )
    asked = Asked("/bucket/pre/a%20b", "127.0.0.1", "mykey/eu-north-1", "")
    assert listener.same_from_all(made) == asked


def test_an_endpoint_that_is_a_url(listener: Listener) -> None:
    endpoint = f"http://{listener.endpoint}"
    made = arrow.S3FileSystem(**MINE | {"scheme": "https"}, endpoint_override=endpoint)
    assert listener.same_from_all(made).path == "/bucket/pre/a%20b"


def test_as_ray_makes_it_from_a_url(listener: Listener) -> None:
    made, _ = arrow.FileSystem.from_uri(
        f"s3://k:s@bucket/pre?scheme=http&endpoint_override={listener.endpoint}&region=eu-west-1"
    )
    assert listener.same_from_all(made).signed_by == "k/eu-west-1"


def test_a_session_token(listener: Listener) -> None:
    made = arrow.S3FileSystem(**MINE, session_token="tok", endpoint_override=listener.endpoint)
    assert listener.same_from_all(made).token == "tok"


def test_keys_are_not_mixed_with_the_environments_token(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another's")
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")  # which obstore alone looks at
    made = arrow.S3FileSystem(**MINE, endpoint_override=listener.endpoint)
    assert listener.same_from_all(made).token == ""


def test_anonymous(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unwanted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "unwanted")
    made = arrow.S3FileSystem(
        anonymous=True, region="us-east-1", scheme="http", endpoint_override=listener.endpoint
    )
    assert listener.same_from_all(made).signed_by == ""


def test_keys_of_the_environment(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "envkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "envtoken")
    made = arrow.S3FileSystem(
        region="us-east-1", scheme="http", endpoint_override=listener.endpoint
    )
    asked = listener.same_from_all(made)
    assert (asked.signed_by, asked.token) == ("envkey/us-east-1", "envtoken")


def test_keys_of_a_profile(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = d\naws_secret_access_key = d\n"
        "[lab]\naws_access_key_id = labkey\naws_secret_access_key = labsecret\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    made = arrow.S3FileSystem(
        region="us-east-1", scheme="http", endpoint_override=listener.endpoint
    )
    assert listener.same_from_all(made).signed_by == "labkey/us-east-1"


def test_the_environments_endpoint_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow does not follow it, or names it in its options."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = options_of(arrow.S3FileSystem(**MINE | {"scheme": "https"}))
    assert options
    assert "amazonaws.com" in obstore_client(options, "bucket", 0).config["endpoint"]
    assert "amazonaws.com" in botocore_client(options, 0).meta.endpoint_url


def test_virtual_addressing() -> None:
    """The names don't resolve here, so what they are shows in the error."""
    made = arrow.S3FileSystem(
        **MINE, endpoint_override="storage.invalid:9", force_virtual_addressing=True
    )
    options = options_of(made)
    assert options
    assert options.virtual_host
    client = obstore_client(options, "bucket", 0)
    assert client.config["endpoint"] == "http://bucket.storage.invalid:9"
    aws = options_of(arrow.S3FileSystem(**MINE | {"scheme": "https"}))
    assert aws
    assert obstore_client(aws, "bucket", 0).config["endpoint"] == (
        "https://bucket.s3.us-east-1.amazonaws.com"
    )
    dotted = obstore_client(aws, "my.bucket", 0).config
    assert dotted["endpoint"] == "https://s3.us-east-1.amazonaws.com"
    for with_botocore, name in ((options, "bucket.storage.invalid"), (aws, "bucket.s3.")):
        url = botocore_client(with_botocore, 0).generate_presigned_url(
            "head_object", Params={"Bucket": "bucket", "Key": "a"}
        )
        assert name in url


def test_timeouts() -> None:
    """A server that accepts and never answers ends the request, also without any option."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = arrow.S3FileSystem(
            **MINE,
            endpoint_override=f"127.0.0.1:{silent.getsockname()[1]}",
            request_timeout=0.2,
            connect_timeout=1.5,
        )
        options = options_of(made)
        assert options
        assert (options.request_s, options.connect_s) == (0.2, 1.5)
        storage = storage_at(made, "bucket/pre")
        with pytest.raises(OSError, match=r"S3 PutObject of pre/a: .*[Tt]ime"):
            storage.write("a", Memory(b"1"), "run")
    assert getattr(options_of(arrow.S3FileSystem(**MINE)), "request_s", 0) == s3_options._REQUEST_S


@pytest.mark.parametrize(
    "more",
    [
        {"default_metadata": {"ACL": "bucket-owner-full-control"}},
        {"proxy_options": "http://127.0.0.1:3128"},
        {"tls_ca_file_path": "/etc/ssl/own.pem"},
    ],
    ids=["metadata", "proxy", "certificates"],
)
def test_what_cannot_be_carried_over_is_left_to_pyarrow(more: dict[str, Any]) -> None:
    made = arrow.S3FileSystem(**MINE, endpoint_override="127.0.0.1:9", **more)
    assert type(storage_at(made, "bucket/pre")) is ArrowStorage


def test_a_proxy_of_the_environment_that_pyarrow_does_not_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    made = arrow.S3FileSystem(**MINE, endpoint_override="127.0.0.1:9")
    assert type(storage_at(made, "bucket/pre")) is ArrowStorage
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert type(storage_at(made, "bucket/pre")) is ObjectStorage


def test_in_a_training_process_there_is_no_further_client() -> None:
    made = arrow.S3FileSystem(**MINE, endpoint_override="127.0.0.1:9")
    assert type(storage_at(made, "bucket/pre", in_training=True)) is ArrowStorage
    assert type(storage_at(made, "bucket/pre")) is ObjectStorage


def test_no_credentials_at_all_is_left_to_pyarrow() -> None:
    made = arrow.S3FileSystem(region="us-east-1", endpoint_override="127.0.0.1:9")
    assert type(storage_at(made, "bucket/pre")) is ArrowStorage


def test_a_role(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small STS gives out the real server's keys to whoever asks for the role."""
    asked = []

    class Sts(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            body = f"""<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
                <AssumeRoleResult><Credentials><AccessKeyId>{s3.access_key}</AccessKeyId>
                <SecretAccessKey>{s3.secret_key}</SecretAccessKey><SessionToken></SessionToken>
                <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult>
                </AssumeRoleResponse>""".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sts)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "envkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "envsecret")
    made = arrow.S3FileSystem(
        role_arn="arn:aws:iam::123456789012:role/sync",
        session_name="tune",
        external_id="ext",
        region="us-east-1",
        scheme="http",
        endpoint_override=f"{s3.host}:{s3.port}",
    )
    try:
        storage = storage_at(made, f"{s3.bucket}/role")
        assert isinstance(storage, ObjectStorage)
        storage.write("a", Memory(b"1"), "run")
    finally:
        server.shutdown()
        server.server_close()
    assert s3.get("role/a") == b"1"
    pyarrows, ours = (set(request.split("&")) for request in asked)
    assert ours == pyarrows
    assert {"RoleSessionName=tune", "ExternalId=ext", "DurationSeconds=900"} < ours


def test_no_secret_shows(s3: S3Server) -> None:
    options = options_of(s3.arrow_fs())
    assert options
    storage = storage_at(s3.arrow_fs(), f"{s3.bucket}/x")
    for text in (repr(options), repr(storage), str(vars(storage)), storage.name):
        assert s3.secret_key not in text
