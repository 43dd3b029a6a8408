"""All that the README claims about speed, measured: ``python -m benchmarks [--quick] [CASE ...]``.

Starts a real S3 server on loopback behind a proxy that adds 20 ms to each request, runs the cases,
prints their tables as Markdown, and writes ``results/*.json`` and the plots. What a case does is
said where it is written; here are the arguments, the order and the output.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import plots, results, resync, runs, uploads
from benchmarks.harness import Bench, log
from benchmarks.results import Result
from tests.support.s3_server import available

CASES: dict[str, Callable[[Bench, Mapping[str, Result]], Result]] = {
    "small": uploads.small,
    "deep": uploads.deep,
    "medium": uploads.medium,
    "large": uploads.large,
    "unchanged": resync.unchanged,
    "changed": resync.changed,
    "append": resync.append,
    "driver": runs.driver,
    "blocked": runs.blocked,
    "cpu": uploads.cpu,
    "hooks": runs.hooks,
    "fixed": runs.fixed,
    "memory": resync.memory,
}
_README = Path(__file__).with_name("README.md")
_MARK = "<!-- table -->"
_NOT_FOR_README = "**Quick run: small sizes, few rounds. Not for the README.**\n\n"
# Of /dev/shm, for the server's data: a disk that can't keep up would be what is measured.
_ROOM_BYTES = 12_000_000_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="two minutes, not for the README")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing: tables and plots from results/*.json"
    )
    parser.add_argument("--scratch", type=Path, help="for directories to sync; default: TMPDIR")
    parser.add_argument(
        "--server-dir", type=Path, help="for the server; default: /dev/shm if it has 12 GB"
    )
    options = parser.parse_args()
    if unknown := set(options.case) - CASES.keys():
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if options.table:
        return _publish()
    if reason := available():
        print(reason, file=sys.stderr)
        return 2
    directory = results.DIRECTORY / "quick" if options.quick else results.DIRECTORY
    crashed = _measure(options, directory)
    found = results.read(directory, options.case or CASES)
    print((_NOT_FOR_README if options.quick else "") + _tables(found))
    if options.quick:
        plots.draw(directory)
    elif not options.case:
        _publish()
    return 1 if crashed else 0


def _measure(options: argparse.Namespace, directory: Path) -> list[str]:
    """Run the cases and write their JSON; returns those that could not be run to their end."""
    crashed: list[str] = []
    scratch = options.scratch or Path(tempfile.gettempdir())
    server = options.server_dir or _server_directory(scratch)
    started, done = time.monotonic(), dict[str, Result]()
    where = results.context(quick=options.quick, server_directory=str(server))
    with (
        tempfile.TemporaryDirectory(prefix="tsb", dir=scratch) as here,
        tempfile.TemporaryDirectory(prefix="tsb", dir=server) as data,
        Bench(Path(here), Path(data), quick=options.quick) as bench,
    ):
        for name, why in bench.left_out.items():
            log(f"left out: {name}: {why}")
        for name in options.case or CASES:
            log(f"{name} ...")
            begun = time.monotonic()
            bench.renew()
            try:
                result = CASES[name](bench, done)
            except Exception as error:
                # The other cases' figures are worth having, and this one's absence is told.
                traceback.print_exc()
                result = Result(name, name, failed={name: f"{type(error).__name__}: {error}"})
                crashed.append(name)
                bench.dismiss()
            result.took_s = round(time.monotonic() - begun, 1)
            result.notes += [f"Left out: {peer} ({why})." for peer, why in bench.left_out.items()]
            done[name] = result
            results.write(result, directory, where)
            for row in result.findings:
                verdict = {True: "met", False: "MISSED", None: ""}[row.met]
                log(f"  {name}: {row.what}: {row.measured}, reach {row.reach} {verdict}")
            log(f"{name} took {result.took_s:.0f} s; {time.monotonic() - started:.0f} s in all")
    return crashed


def _server_directory(scratch: Path) -> Path:
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free >= _ROOM_BYTES:
        return memory
    return scratch


def _tables(found: list[dict[str, object]]) -> str:
    parts = [results.table(found), *filter(None, map(results.details, found))]
    if found:
        parts.append(f"Machine: {results.setting(found)}")
    return "\n\n".join(parts)


def _publish() -> int:
    """Write the tables of ``results/`` into the README of the benchmarks, and draw the plots."""
    text = _tables(results.read(results.DIRECTORY, CASES))
    before, first, rest = _README.read_text().partition(_MARK)
    _, second, after = rest.partition(_MARK)
    if not (first and second):
        print(f"{_README} has no two lines {_MARK}", file=sys.stderr)
        return 1
    _README.write_text(f"{before}{_MARK}\n\n{text}\n\n{_MARK}{after}")
    plots.draw(results.DIRECTORY)
    return 0


if __name__ == "__main__":
    sys.exit(main())
