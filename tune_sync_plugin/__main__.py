"""The command line: ``python -m tune_sync_plugin verify URL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.errors import describe
from tune_sync_plugin.report import human_bytes
from tune_sync_plugin.verify import verify

_OK, _DIFFERENT, _FAILED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m tune_sync_plugin")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "verify",
        help="compare what storage holds with what was uploaded",
        description="Compares what storage holds with what was uploaded, and with what the run "
        "said when it ended. Exits with 0 if all is there, 1 if something is not (it is named), "
        "2 if that could not be found out.",
        epilog="example: python -m tune_sync_plugin verify s3://bucket/results/exp",
    )
    command.add_argument("url", help="an experiment's directory: a path, or a URL as Ray takes it")
    command.add_argument(
        "--sizes-only", action="store_true", help="compare sizes and don't look at contents"
    )
    command.set_defaults(run=_verify)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except Exception as error:
        print(f"{type(error).__name__}: {describe(error)}", file=sys.stderr)
        return _FAILED


def _verify(options: argparse.Namespace) -> int:
    found = verify(open_url(options.url), contents=not options.sizes_only)
    for difference in found.differences:
        print(difference)
    count = len(found.differences)
    print(
        f"{found.trials} trials, {found.files} files, {human_bytes(found.bytes)}: "
        + ("all there" if not count else f"{count} difference{'s' * (count > 1)}")
        + ("" if found.ended else "; the run has not ended, or was killed")
    )
    return _DIFFERENT if count else _OK


def open_url(url: str) -> Storage:
    """The storage at a path or URL: by pyarrow, as Ray does, or by fsspec.

    Raises:
        FileNotFoundError: A local path does not exist.
        ValueError: Nothing here speaks this kind of URL.
    """
    import os

    import fsspec
    import pyarrow
    from pyarrow import fs

    if "://" not in url:
        if not os.path.isdir(url):
            raise FileNotFoundError(f"there is no directory {url}")
        return storage_at(fs.LocalFileSystem(), os.path.abspath(url))
    try:
        return storage_at(*fs.FileSystem.from_uri(url))
    except pyarrow.ArrowInvalid:
        if url.partition("://")[0] in ("s3", "gs", "abfs", "file"):
            raise  # a mistake in a URL of pyarrow's own kind
    return storage_at(*fsspec.core.url_to_fs(url))


if __name__ == "__main__":
    sys.exit(main())
