"""The command line, ``tune-sync``: arguments, exit codes, and how results and errors are shown.

What a command does is in a module of its name. Whatever goes wrong is one line on stderr that names
what was tried and what to do, without a traceback and without secrets.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tune_sync_plugin import layout
from tune_sync_plugin.cli.best import RESULTS, best_trial
from tune_sync_plugin.cli.doctor import check_cluster, check_here
from tune_sync_plugin.cli.places import Place, last_name, place_at
from tune_sync_plugin.cli.pull import choose, matching_trials, pull
from tune_sync_plugin.cli.status import status
from tune_sync_plugin.cli.texts import cut, lines_about
from tune_sync_plugin.cli.verify import verify
from tune_sync_plugin.errors import SyncError, describe
from tune_sync_plugin.preflight import advice_on
from tune_sync_plugin.progress import Bar, of_pull
from tune_sync_plugin.words import count_of, human_bytes

_OK, _DIFFERENT, _FAILED, _INTERRUPTED = 0, 1, 2, 130

_CODES = """exit codes:
  0    all is well
  1    something is missing, different or not able; it is named
  2    that could not be found out: a wrong URL, no credentials, wrong usage
  130  it was interrupted
"""
_URLS = """URLs: a path, a URL as Ray takes it (s3://bucket/exp?endpoint_override=...), or one of
any protocol of fsspec's, whose options are read from the environment, as in
FSSPEC_S3='{"key": "...", "secret": "..."}'. A query in an S3 URL takes the place of these.
"""

Found = tuple[int, dict[str, Any], list[str]]
"""What a command came to: the exit code, the document for --json, and the lines in its place."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code.

    Raises:
        SystemExit: The arguments are wrong (2), or ``--help`` was asked for (0).
    """
    options = _parser().parse_args(arguments)
    place = place_at(options.url)
    code: int
    try:
        code, document, lines = options.run(place, options)
    except KeyboardInterrupt:
        print(f"tune-sync {options.command}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        said = _one_line(error, place)
        print(f"tune-sync {options.command} {place.name}: {said}", file=sys.stderr)
        code, document, lines = _FAILED, {"error": said}, []
    if options.json:
        document = {"command": options.command, "url": place.name, "exit_code": code, **document}
        lines = [json.dumps(document, indent=1)]
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _one_line(error: Exception, place: Place) -> str:
    said = describe(error).replace(place.url, place.name)
    if isinstance(error, SyncError):
        return said  # they say what to do
    advice = "Correct the URL" if isinstance(error, ValueError) else advice_on(error)
    return f"{said}. {advice}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune-sync",
        description="Looks at experiments of Ray Tune in storage, and brings them back.",
        epilog=f"{_URLS}\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(
        name: str, run: Callable[[Place, argparse.Namespace], Found], what: str, *examples: str
    ) -> argparse.ArgumentParser:
        shown = "".join(f"  tune-sync {name} {example}\n" for example in examples)
        command = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"examples:\n{shown}\n{_URLS}\n{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("url", metavar="URL", help="an experiment's or a trial's directory")
        command.add_argument(
            "--json", action="store_true", help="one JSON document on stdout, and nothing else"
        )
        command.set_defaults(run=run)
        return command

    add(
        "status",
        _status,
        "say what is there, how old it is, and whether it is complete",
        "s3://bucket/results/exp",
        "/mnt/results --json",
    )
    command = add(
        "verify",
        _verify,
        "compare what storage holds with what was uploaded, and with what the run said at its end",
        "s3://bucket/results/exp",
        "/mnt/results/exp --sizes-only",
    )
    command.add_argument(
        "--sizes-only", action="store_true", help="compare sizes and don't look at contents"
    )
    command = add(
        "pull",
        _pull,
        "download an experiment, or parts of it; again, and what is there is not fetched twice",
        "s3://bucket/results/exp",
        "s3://bucket/results/exp ./best --best loss --mode min",
        "s3://bucket/results/exp --trial 'train_1a2b*' --include '**/*.png' --include '**/*.csv'",
    )
    command.add_argument(
        "destination",
        metavar="DEST",
        nargs="?",
        help="a directory; by default one of the URL's last name, in the current one",
    )
    command.add_argument("--trial", metavar="GLOB", help="only trials whose directories match")
    command.add_argument(
        "--include",
        metavar="GLOB",
        action="append",
        default=[],
        help="only these files, relative to the URL (** works); may be given several times",
    )
    command.add_argument(
        "--best", metavar="METRIC", help="only the trial whose last METRIC is the best"
    )
    command.add_argument("--mode", choices=("min", "max"), help="which METRIC is the best")
    command = add(
        "doctor",
        _doctor,
        "write, read and delete a small object, and say what does not work and what to do",
        "s3://bucket/results",
        "s3://bucket/results --address auto",
    )
    command.add_argument(
        "--address", help="try from every node of this Ray cluster ('auto': the one that runs here)"
    )
    return parser


def _status(place: Place, options: argparse.Namespace) -> Found:
    found = status(place.root())
    lines = [line for each in found for line in lines_about(each, place.name)]
    missing = any(each.complete is False for each in found)
    document = {"experiments": [dataclasses.asdict(each) for each in found]}
    return (_DIFFERENT if missing else _OK), document, lines


def _verify(place: Place, options: argparse.Namespace) -> Found:
    found = verify(place.root(), contents=not options.sizes_only)
    count = len(found.differences)
    last = (
        f"{count_of(found.trials, 'trial')}, {count_of(found.files, 'file')}, "
        f"{human_bytes(found.bytes)}: "
        + ("all there" if not count else count_of(count, "difference"))
        + ("" if found.ended else "; the run has not ended, or was killed")
    )
    document = dataclasses.asdict(found)
    document["differences"] = [each._asdict() for each in found.differences]
    return (_DIFFERENT if count else _OK), document, [*map(str, found.differences), last]


def _pull(place: Place, options: argparse.Namespace) -> Found:
    if bool(options.best) != bool(options.mode):
        raise SyncError("--best METRIC and --mode min|max go together: give both, or none")
    storage = place.root()
    destination = options.destination or last_name(storage)
    if not destination:
        raise SyncError("the URL has no last name that could be the directory's: give DEST")
    if storage.name.startswith("local:"):
        _refuse_inside(destination, storage.name.removeprefix("local:"))
    stored = storage.files()
    trials = None if options.trial is None else matching_trials(stored, options.trial)
    if trials == []:
        raise SyncError(
            f"no trial's directory matches {options.trial!r}; there are "
            f"{', '.join(layout.trials(stored)[:10]) or 'none, so that it is no experiment'}"
        )
    document: dict[str, Any] = {"destination": destination}
    lines = []
    if options.best:
        candidates = layout.trials(stored) if trials is None else trials
        with_results = [name for name in candidates if f"{name}/{RESULTS}" in stored]
        best, value = best_trial(storage, with_results, options.best, options.mode)
        trials = [best]
        document["best"] = {"trial": best, "metric": options.best, "value": value}
        lines.append(f"best {options.best}: {value:g}, of {best}")
    wanted = choose(stored, trials=trials, include=tuple(options.include))
    if not wanted:
        raise SyncError("there is nothing to pull: correct the URL, or --include")
    with Bar(None if options.json else of_pull, after_s=0.0) as progress:
        done = pull(storage, wanted, destination, progress)
    document |= dataclasses.asdict(done)
    document["failures"] = [each._asdict() for each in done.failures]
    lines += cut([str(each) for each in done.failures])
    failed = len(done.failures)
    lines.append(
        f"{destination}: {count_of(done.fetched, 'file')} fetched "
        f"({human_bytes(done.fetched_bytes)}), {done.kept} were there "
        f"({human_bytes(done.kept_bytes)}), {failed} failed"
        + ("; pull again, and it goes on from here" if failed else "")
    )
    return (_DIFFERENT if failed else _OK), document, lines


def _refuse_inside(destination: str, source: str) -> None:
    there, here = os.path.realpath(source), os.path.realpath(destination)
    if here == there or here.startswith(there.rstrip(os.sep) + os.sep):
        raise SyncError(f"{destination} is in what is to be pulled: give another DEST")


def _doctor(place: Place, options: argparse.Namespace) -> Found:
    found = check_cluster(place, options.address) if options.address else [check_here(place)]
    document = {"nodes": [dataclasses.asdict(each) for each in found]}
    well = all(each.is_well for each in found)
    return (_OK if well else _DIFFERENT), document, [str(each) for each in found]
