"""The cases that need Ray Tune: what a run costs, ends with and waits for, under Ray and under us.

The runs themselves are in ``tune_child.py``, one process each. Long ones are run less than five
times; ``n`` says how often.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import REPOSITORY, Bench, Sample, ToolError, log, scaled
from benchmarks.results import Result, number
from tests.support.scenarios import LINK

_PATIENCE_S = 900


def _run(bench: Bench, name: str, **arguments: Any) -> dict[str, Any]:
    """One run in a process of its own.

    Raises:
        ToolError: It failed.
    """
    log_path = bench.scratch / f"{name}.log"
    with log_path.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.tune_child", name, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=_PATIENCE_S)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # its cluster and its servers end with it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if process.returncode or not out:
        tail = log_path.read_text(errors="replace")[-1500:]
        raise ToolError(f"exit code {process.returncode}\n{tail}")
    log(f"{name} {arguments}: {out.strip()[:200]}")
    return dict(json.loads(out))


def driver(bench: Bench, results: Mapping[str, Result]) -> Result:
    """The end of a run whose driver's directory holds 1,000 trials, 20 of them active.

    Twenty trials are real, report every second, and are snapshotted every ten; the others have
    ended before: the benchmark writes their directories of five files each. Ray is given a tenth of
    the trials, the same twenty active, and its time is scaled by the number of files; it would take
    about five minutes for one snapshot of all.
    """
    trials, active = bench.pick(1000, 20), bench.pick(20, 2)
    part, period = bench.pick(100, 10), bench.pick(10, 3)
    result = Result("driver", f"the driver's directory, {trials:,} trials of 5 files")
    shape = {"active": active, "period": period}
    ours = _run(bench, "driver", by="ours", trials=trials, seconds=6 * period, **shape)
    rays = _run(bench, "driver", by="ray", trials=part, seconds=3 * period, **shape)
    factor = trials / part
    result.add("ours", _sample(ours))
    result.add("ray", scaled(_sample(rays), factor))
    # The largest is the first upload of everything, the last one the end of the run.
    bursts = ours["requests_by_burst"]
    steady = bursts[bursts.index(max(bursts)) + 1 : -1]
    per_snapshot = statistics.median(steady) if steady else float("inf")
    # Of an active trial three files change, the fifth at most; and there is the state itself.
    limit = active * 5 + 5
    more = f"{active} active; Ray, scaled: {factor * rays['requests'] / rays['snapshots']:,.0f}"
    n = f"{len(steady)} snapshots"
    result.at_most("requests per snapshot", per_snapshot, limit, n, "", more)
    ratio = result.wall("ray") / result.wall("ours")
    more = f"{result.wall('ours'):.1f} s to {result.wall('ray'):.0f} s, "
    more += f"{100 / factor:.3g} % of Ray's measured, scaled"
    n = result.n("ours", "ray")
    result.at_least("less from the last result to `fit()` returning", ratio, 20, n, more=more)
    result.notes.append(
        "Wall: from the last result to the return of `fit()`. Requests: of the whole run."
    )
    return result


def _sample(run: Mapping[str, Any]) -> Sample:
    return Sample(run["after_last_result_s"], requests=run["requests"], extra=dict(run))


def blocked(bench: Bench, results: Mapping[str, Result]) -> Result:
    """How long ``tune.report`` takes when 20 MB of artifacts are new, on a link of 20 MB/s.

    Every report also comes with a checkpoint of 1 KB, which Ray uploads before it returns whoever
    syncs the artifacts: that is all there is without any artifact sync, and is told beside.
    """
    result = Result("blocked", "`tune.report(checkpoint=...)`, 20 MB of new artifacts, 20 MB/s")
    steps, rounds = bench.pick(4, 1), bench.pick(2, 1)
    found = _run(bench, "blocked", steps=steps, rounds=rounds, bandwidth=LINK)
    for by, figures in found.items():
        for wall_s, cpu_s in zip(figures["report_s"], figures["cpu_s"], strict=True):
            result.add({"none": "no artifact sync"}.get(by, by), Sample(wall_s, cpu_s))
    n = result.n("ours", "ray")
    ours, rays, none = (result.wall(by) for by in ("ours", "ray", "no artifact sync"))
    more = f"{ours * 1000:.0f} ms to {rays * 1000:.0f} ms; {none * 1000:.0f} ms without any sync"
    result.at_least(
        "less than Ray, the checkpoint's upload included", rays / ours, 50, n, more=more
    )
    # Medians of some twenty milliseconds can't be told apart by less than one.
    ratio = (rays - none) / max(ours - none, 0.001)
    more = f"{(ours - none) * 1000:+.0f} ms to {(rays - none) * 1000:+.0f} ms"
    result.at_least("less than Ray, for the artifacts alone", ratio, 50, n, more=more)
    cpu = {by: result.median(by, lambda s: s.cpu_s) for by in result.samples}
    more = ", ".join(f"{by} {number(value * 1000)} ms" for by, value in cpu.items())
    # A tenth of what the process uses anyway, or ten milliseconds, can't be told from none.
    limit_ms = max(10.0, cpu["no artifact sync"] * 100)
    value = (cpu["ours"] - cpu["no artifact sync"]) * 1000
    result.at_most("CPU of training's own process for it", value, limit_ms, n, " ms", more)
    return result


def hooks(bench: Bench, results: Mapping[str, Result]) -> Result:
    """What the callback costs Tune's loop, see ``hooks.py``."""
    trials = bench.pick(10_000, 300)
    result = Result("hooks", f"driver, {trials:,} live trials")
    found = _run(bench, "hooks", trials=trials)
    for hook in ("on_trial_result", "on_step_end"):
        result.at_most(f"`{hook}`, nothing due", found[hook], 20, "7", " µs")
    value = found["poll, busy, median"] / 1000
    more = f"99 % below {found['poll, busy, 99 %'] / 1000:.1f} ms, "
    more += f"longest {found['poll, busy, longest'] / 1000:.1f} ms"
    n = f"{found['polls']:,.0f}"
    result.at_most("poll while all trials are synced, median", value, 1, n, " ms", more)
    result.notes.append(f"Raw figures, microseconds: {json.dumps(found)}.")
    return result


def fixed(bench: Bench, results: Mapping[str, Result]) -> Result:
    """A short run that has nothing to sync but what the driver writes, with and without us.

    Each in a cluster of its own, so that a sync task's worker process has to start every time.
    """
    seconds = bench.pick(10, 2)
    trials = bench.pick(4, 2)
    result = Result("fixed", f"a run of {seconds} s, {trials} trials, nothing worth syncing")
    for _ in range(bench.pick(3, 1)):
        for by in ("ours", "ray"):
            found = _run(bench, "fixed", by=by, trials=trials, seconds=seconds)
            result.add(by, Sample(found["wall_s"], extra=found))
    more = f"{result.wall('ours'):.1f} s to {result.wall('ray'):.1f} s"
    value = result.wall("ours") - result.wall("ray")
    result.at_most(
        "longer than without the callback", value, 1.5, result.n("ours", "ray"), " s", more
    )
    ends = [result.median(by, lambda s: s.extra["after_last_result_s"]) for by in ("ours", "ray")]
    result.notes.append(
        f"From the last result to the return of `fit()`: {ends[0]:.1f} s with us, {ends[1]:.1f} s "
        "without."
    )
    return result
