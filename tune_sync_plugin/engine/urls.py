"""From a URL and its options to a file system: any protocol of fsspec's, S3 by what is faster.

Made where it is used, in the task: many clients don't survive being pickled or forked, and what is
not carried around can't be left lying about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MethodType
from typing import Any
from urllib.parse import urlsplit

_S3 = ("s3", "s3a")

# s3fs's names of what pyarrow's S3 file system, and so obstore, can do as well. Whoever asks for
# anything else gets s3fs itself.
_S3_OPTIONS = {
    "key": "access_key",
    "username": "access_key",
    "secret": "secret_key",
    "password": "secret_key",
    "token": "session_token",
    "anon": "anonymous",
    "endpoint_url": "endpoint_override",
}
_S3_CLIENT_OPTIONS = {
    "aws_access_key_id": "access_key",
    "aws_secret_access_key": "secret_key",
    "aws_session_token": "session_token",
    "endpoint_url": "endpoint_override",
    "region_name": "region",
}

# What fsspec's own messages don't always name.
_LIBRARIES = {
    **dict.fromkeys(("sftp", "ssh"), "sshfs"),
    **dict.fromkeys(("webdav", "dav"), "webdav4"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
}
_PATIENCE_S = 10.0
# Of clients that else wait for minutes for a server that does not answer, or only for five seconds.
_SFTP = {"connect_timeout": _PATIENCE_S, "login_timeout": _PATIENCE_S}
_WEBDAV = {"timeout": 60.0}
_OPTIONS: dict[str, dict[str, float]] = {
    "sftp": _SFTP,
    "ssh": _SFTP,
    "webdav": _WEBDAV,
    "dav": _WEBDAV,
}


def filesystem_at(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The file system that a URL is on, and the path there; no request is made but for a region.

    Args:
        url: Of any protocol that fsspec knows, or a path. One of S3 may have pyarrow's query, as in
            ``s3://bucket/dir?region=eu-west-1``. Of WebDAV it is the path below the option
            ``base_url``, as in ``webdav://dir``.
        options: fsspec's ``storage_options`` of that protocol.

    Returns:
        A file system that :func:`.storage_at` takes, and the path on it.

    Raises:
        ImportError: A library is missing; the message says how to install it.
        ValueError: The URL, or an option, is not one that the protocol knows.

    Example:
        >>> filesystem_at("memory://results", {})[1]
        '/results'
    """
    from fsspec.core import url_to_fs

    protocol = protocol_of(url)
    if protocol in _S3:
        arrow_options = _for_arrow(options)
        if arrow_options is not None:
            return _arrow_s3(url, arrow_options)
    try:
        filesystem, path = url_to_fs(url, **_OPTIONS.get(protocol, {}) | _completed(options))
        _leave_retries_to_us(filesystem)
        return filesystem, path
    except ImportError as error:
        named = re.search(r"""(?:[Ii]nstall|requires) "?(\w+)""", str(error))
        library = _LIBRARIES.get(protocol) or (named and named[1])
        hint = f"pip install {library}" if library else "install what it needs"
        raise ImportError(
            f"{protocol}:// needs a library that is missing here ({error}): {hint}, on every node, "
            'or name it in the runtime_env: ray.init(runtime_env={"pip": [...]})'
        ) from error
    except TypeError as error:  # of the file system's constructor
        said = _without_values(str(error), options)
        raise ValueError(f"storage_options of {protocol}://: {said}") from None
    except ValueError as error:
        raise ValueError(_without_values(str(error), options)) from None


def _completed(options: Mapping[str, Any]) -> dict[str, Any]:
    auth = options.get("auth")  # from JSON, as in FSSPEC_WEBDAV, where there are no tuples
    return {**options, **({"auth": tuple(auth)} if isinstance(auth, list) else {})}


def _without_values(text: str, options: Any) -> str:
    """An error about options may show them, and they may be secrets."""
    if isinstance(options, Mapping):
        options = options.values()
    elif not isinstance(options, list | tuple):
        return text.replace(options, "***") if isinstance(options, str) and options else text
    for option in options:
        text = _without_values(text, option)
    return text


def _leave_retries_to_us(filesystem: Any) -> None:
    """Have a client report an error at once that it else hides for a minute or so.

    The engine tries again by itself, and knows which errors are worth it; a preflight's ten seconds
    would be over before the client says what is wrong. None of them has an option for it.
    """
    kind = type(filesystem)
    if kind.__module__.startswith("adlfs"):
        config = getattr(filesystem.service_client, "_config", None)
        if policy := getattr(config, "retry_policy", None):
            policy.total_retries = 0
    elif kind.__module__.startswith("gcsfs"):
        once = getattr(kind._request, "__wrapped__", None)
        if once:
            filesystem._request = MethodType(once, filesystem)
    elif kind.__module__.startswith("webdav4"):
        filesystem.client.with_retry = lambda call: call()


def protocol_of(url: str) -> str:
    """The URL's protocol; ``file`` for a path.

    Example:
        >>> protocol_of("s3://bucket/a"), protocol_of("/mnt/a")
        ('s3', 'file')
    """
    protocol, separator, _ = url.partition("://")
    return protocol if separator else "file"


def below(url: str, name: str) -> str:
    """The URL of what has that name in the directory that a URL is of.

    Example:
        >>> below("s3://bucket/a/?region=eu-west-1", "exp")
        's3://bucket/a/exp?region=eu-west-1'
    """
    path, question, query = url.partition("?")
    if not path.endswith(("://", ":///")):
        path = f"{path.rstrip('/')}/"
    return f"{path}{name}{question}{query}"


def without_secrets(url: str) -> str:
    """The URL as it may be shown: no user, no password, no query.

    Example:
        >>> without_secrets("sftp://me:secret@host:22/a?key=b")
        'sftp://host:22/a'
    """
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _for_arrow(options: Mapping[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in _S3_OPTIONS:
            found[_S3_OPTIONS[name]] = value
        elif name == "client_kwargs" and set(value) <= set(_S3_CLIENT_OPTIONS):
            found |= {_S3_CLIENT_OPTIONS[inner]: given for inner, given in value.items()}
        else:
            return None
    return {name: value for name, value in found.items() if value not in (None, "")}


def _arrow_s3(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    from pyarrow import fs as arrow

    if "?" in url or not options:
        if options:
            raise ValueError("options are in the URL's query or in storage_options, not both")
        return arrow.FileSystem.from_uri(url.replace("s3a://", "s3://", 1))  # type: ignore[no-any-return]
    path = url.partition("://")[2]
    if "region" not in options and "endpoint_override" not in options:
        options["region"] = arrow.resolve_s3_region(path.partition("/")[0])
    return arrow.S3FileSystem(**options), path.rstrip("/")
