"""Carries a pyarrow S3 file system's options over to the clients that are faster, or can more.

The options are read from the object that Ray made, so that users change nothing. Whatever can't be
carried over faithfully makes :func:`options_of` return ``None``, and pyarrow goes on doing the
work. Credentials stay in this process's memory: nothing here is pickled, logged or written.
"""

from __future__ import annotations

import functools
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import urlsplit

# Requests are retried by us, with everything known of the other files (see pool.py), but for parts
# of a large file: it would have to be sent again from its start for the failure of one.
_PART_RETRIES = 4
_CONNECT_S = 10.0
# What one request of at most a few megabytes may take on a slow link before it counts as hung. The
# clients would wait for less (obstore: 30 s, uploading included) or for ever.
_REQUEST_S = 300.0
# How long credentials are used before they are asked for again, if they don't say it themselves.
_CREDENTIALS_S = 600.0


@dataclass(frozen=True)
class S3Options:
    """How to reach S3 as a pyarrow file system does.

    Attributes:
        region: As AWS names it; empty if not known.
        endpoint: A URL, or empty for AWS itself.
        virtual_host: Whether the bucket's name goes into the host's.
        anonymous: Whether requests are not signed.
        keys: Access key, secret key and session token; empty to find them as AWS's clients do.
        role: ARN, session name, external id and life in seconds of a role to assume, or empty.
        connect_s: Seconds that a connection may take.
        request_s: Seconds that an answer may take.
    """

    region: str
    endpoint: str
    virtual_host: bool
    anonymous: bool
    keys: tuple[str, str, str] | None = field(repr=False)
    role: tuple[str, str, str, int] | None
    connect_s: float
    request_s: float

    @property
    def fixed_keys(self) -> tuple[str, str, str] | None:
        """The keys that requests are signed with, if these are given and stay as they are."""
        return None if self.role else self.keys


def options_of(filesystem: Any) -> S3Options | None:
    """The options of a ``pyarrow.fs.S3FileSystem``, or ``None`` if some can't be carried over."""
    try:
        given: Mapping[str, Any] = filesystem.__reduce__()[1][0]
        has_proxy = bool(given.get("proxy_options", {}).get("host"))
        if given.get("default_metadata") or given.get("tls_ca_file_path") or has_proxy:
            return None
        endpoint = _endpoint(given["endpoint_override"], given["scheme"])
        if _uses_a_proxy(endpoint):
            return None  # of the environment's, which pyarrow would not use
        keys = (given["access_key"], given["secret_key"], given["session_token"])
        role = (
            given["role_arn"],
            given["session_name"],
            given["external_id"],
            given["load_frequency"],
        )
        return S3Options(
            region=given["region"],
            endpoint=endpoint,
            # As pyarrow has it.
            virtual_host=not endpoint or given["force_virtual_addressing"],
            anonymous=given["anonymous"],
            keys=keys if keys[0] else None,
            role=role if role[0] else None,
            connect_s=_positive(given["connect_timeout"], _CONNECT_S),
            request_s=_positive(given["request_timeout"], _REQUEST_S),
        )
    except (TypeError, LookupError, AttributeError):
        return None  # another pyarrow than we know


def _endpoint(override: str, scheme: str) -> str:
    if not override:
        return ""
    return override.rstrip("/") if "://" in override else f"{scheme}://{override.rstrip('/')}"


def _uses_a_proxy(endpoint: str) -> bool:
    url = urlsplit(endpoint or "https://s3.amazonaws.com")
    proxies = urllib.request.getproxies()
    if not (proxies.get(url.scheme) or proxies.get("all")):
        return False
    return not urllib.request.proxy_bypass(url.netloc)


def _positive(seconds: float, default: float) -> float:
    return seconds if seconds > 0 else default


@functools.lru_cache(maxsize=16)
def _session(region: str, process_id: int) -> Any:
    """A botocore session; one per process, since it is made for reading files and the network."""
    import botocore.session

    session = botocore.session.get_session()
    if region:
        session.set_config_variable("region", region)
    return session


@functools.lru_cache(maxsize=16)
def _credentials(options: S3Options, process_id: int) -> Any:
    """botocore's credentials, which renew themselves; ``None`` if there are none."""
    from botocore.credentials import (
        AssumeRoleCredentialFetcher,
        Credentials,
        DeferredRefreshableCredentials,
    )

    session = _session(options.region, process_id)
    given = Credentials(*options.keys) if options.keys else session.get_credentials()
    if options.role is None or given is None:
        return given
    arn, session_name, external_id, life_s = options.role
    arguments: dict[str, Any] = {"DurationSeconds": life_s}
    if session_name:
        arguments["RoleSessionName"] = session_name
    if external_id:
        arguments["ExternalId"] = external_id
    fetcher = AssumeRoleCredentialFetcher(session.create_client, given, arn, arguments)
    return DeferredRefreshableCredentials(fetcher.fetch_credentials, "assume-role")


def _provide(options: S3Options, process_id: int) -> dict[str, Any]:
    """The credentials of this moment, as obstore wants them."""
    if options.fixed_keys:
        access_key, secret_key, token = options.fixed_keys
        expires_at = None
    else:
        now = _credentials(options, process_id).get_frozen_credentials()
        access_key, secret_key, token = now.access_key, now.secret_key, now.token
        expires_at = datetime.now(timezone.utc) + timedelta(seconds=_CREDENTIALS_S)
    return {
        "access_key_id": access_key,
        "secret_access_key": secret_key,
        "token": token or None,
        "expires_at": expires_at,
    }


@functools.lru_cache(maxsize=16)
def obstore_client(options: S3Options, bucket: str, process_id: int) -> Any | None:
    """An ``obstore.store.S3Store``; ``None`` if there are no credentials for it.

    One per process, so that its connections serve all files and all syncs.
    """
    from obstore.store import S3Store

    region = _region(options, process_id)
    endpoint = options.endpoint or _aws(region)
    # A bucket with dots has no certificate of its own.
    virtual_host = options.virtual_host and not ("." in bucket and not options.endpoint)
    if virtual_host:
        endpoint = endpoint.replace("://", f"://{bucket}.", 1)
    # All that obstore would otherwise take from variables that pyarrow does not look at.
    settings: dict[str, Any] = {
        "region": region,
        "endpoint": endpoint,
        "aws_endpoint_url_s3": endpoint,
        "virtual_hosted_style_request": virtual_host,
        "skip_signature": options.anonymous,
        # Contents are checked by the ETags that storage answers with, which costs less.
        "unsigned_payload": True,
    }
    if not options.anonymous:
        # Where keys are given, botocore need not be imported: 0.3 s of a new process's CPU.
        if not options.fixed_keys and _credentials(options, process_id) is None:
            return None
        # Also where keys are given: what else the environment says would be mixed in otherwise.
        settings["credential_provider"] = functools.partial(_provide, options, process_id)
    return S3Store(
        bucket,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=options.connect_s),
            "read_timeout": timedelta(seconds=options.request_s),
            # Of a whole request, a long download's body included; the other two end what hangs.
            "timeout": timedelta(days=1),
        },
        retry_config={
            "max_retries": _PART_RETRIES,
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=2),
            },
        },
        **settings,
    )


def _region(options: S3Options, process_id: int) -> str:
    named = options.region or _session("", process_id).get_config_variable("region")
    return named or "us-east-1"


def _aws(region: str) -> str:
    return f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")


class _Provider:
    """What gives a botocore session its credentials."""

    def __init__(self, credentials: Any) -> None:
        self._credentials = credentials

    def load_credentials(self) -> Any:
        return self._credentials


@functools.lru_cache(maxsize=16)
def botocore_client(options: S3Options, process_id: int) -> Any:
    """A botocore client of S3, for requests that obstore does not know."""
    import botocore
    import botocore.config
    import botocore.session

    config = botocore.config.Config(
        s3={
            "addressing_style": "virtual" if options.virtual_host else "path",
            "payload_signing_enabled": False,
        },
        connect_timeout=options.connect_s,
        read_timeout=options.request_s,
        retries={"total_max_attempts": 1 + _PART_RETRIES, "mode": "standard"},
        max_pool_connections=16,
        signature_version=botocore.UNSIGNED if options.anonymous else None,
        # Checksums of its own kind, which not every store that speaks S3 knows.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    session = botocore.session.get_session()
    if not options.anonymous:
        session.register_component(
            "credential_provider", _Provider(_credentials(options, process_id))
        )
    region = _region(options, process_id)
    # Also where it is AWS itself: botocore would follow AWS_ENDPOINT_URL, which pyarrow does not.
    endpoint = options.endpoint or _aws(region)
    return session.create_client("s3", endpoint_url=endpoint, region_name=region, config=config)
