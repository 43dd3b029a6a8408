"""The same Tune runs under Ray's own syncing and under ours: ``python -m benchmarks.against_ray``.

Two worker nodes with disks of their own, a real S3 server on loopback behind a proxy that limits
the link to 20 MB/s where a run says so. Prints the pairs of figures of the README as a Markdown
table. Arguments name the scenarios to run; default all (about four minutes).
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from tests.support import scenarios
from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.s3_server import S3Server, available
from tests.support.scenarios import MB, Link, Outcome


def _files(pattern: str) -> Callable[[Outcome], str]:
    def figure(outcome: Outcome) -> str:
        return str(sum(Path(key).match(pattern) for key in outcome.stored))

    return figure


def _last_file(outcome: Outcome) -> str:
    size = outcome.names().get("last.bin", 0)
    return f"{size / MB:.0f} MB ({outcome.wall_s:.0f} s)"


def _blocked(outcome: Outcome) -> str:
    return f"{outcome.extra['report_s'] * 1000:.0f} ms"


def _resent(outcome: Outcome) -> str:
    return f"{outcome.extra['sent'] / outcome.extra['changed']:.2f}"


def _hanging(outcome: Outcome) -> str:
    arrived = sum(name in outcome.names() for name in ("a.txt", "z.txt"))
    named = outcome.callback and any(
        failure.path == "hang.bin" for failure in outcome.callback.report.failures
    )
    return f"{arrived} of 2, hanging file {'named' if named else 'not named'}"


def _period(outcome: Outcome) -> str:
    return f"{outcome.extra['log']} and {outcome.extra['state']}"


def _lines(outcome: Outcome) -> str:
    return f"{outcome.extra['lines']} of 10"


def _results(outcome: Outcome) -> str:
    return f"{outcome.extra['results']} of {scenarios.RESTART_STEPS}"


# What to run, what the figure says, how to read it off, and by whom besides Ray and us.
CASES: dict[str, tuple[str, Callable[[Outcome], str], tuple[str, ...]]] = {
    "both_directories": (
        "files that three trials wrote to `get_trial_dir()` on worker nodes, arrived of 9",
        _files("*/trial_dir_*.txt"),
        (),
    ),
    "big_last_file": (
        "a 300 MB file written last, 20 MB/s link: arrived (time until `fit()` returned)",
        _last_file,
        (),
    ),
    "blocked_reports": (
        "`tune.report(checkpoint=...)` with 20 MB of new artifacts, 20 MB/s link, median",
        _blocked,
        ("none",),
    ),
    "resend": (
        "artifact bytes sent per byte that changed, over six checkpoints",
        _resent,
        (),
    ),
    "moved_trial": (
        "lines of a log that a trial appends to, after it went on on another node twice",
        _lines,
        (),
    ),
    "killed_trial": (
        "files of a trial killed by SIGKILL, arrived of 4",
        _files("*/file_*.txt"),
        (),
    ),
    "hanging_upload": (
        "one upload hangs for ever, `sync_timeout=5`: other files arrived",
        _hanging,
        (),
    ),
    "period": (
        "`sync_period=3`, ten seconds, a snapshot per result: uploads of a log and of the "
        "experiment state",
        _period,
        (),
    ),
    "restarted_trial": (
        "results in `result.json` after a trial failed and went on from its checkpoint",
        _results,
        (),
    ),
}


def main() -> None:
    """Run the scenarios and print the table."""
    if reason := available():
        sys.exit(reason)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    names = sys.argv[1:] or list(CASES)
    rows = []
    with (
        tempfile.TemporaryDirectory() as directory,
        LocalCluster(workers=2),
        S3Server.start(Path(directory)) as s3,
        Proxy.start(s3.host, s3.port) as proxy,
    ):
        link = Link(s3, proxy)
        for name in names:
            title, figure, others = CASES[name]
            run = getattr(scenarios, name)
            figures = {by: figure(run(link, by)) for by in ("ray", "ours", *others)}
            if "none" in figures:
                title += f" (without any artifact sync: {figures['none']})"
            rows.append(f"| {title} | {figures['ray']} | {figures['ours']} |")
            print(rows[-1], file=sys.stderr, flush=True)
    print("\n| | Ray's own sync | SyncCallback |\n|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
