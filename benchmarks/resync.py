"""Syncs of what storage has already, all or most of it; and how one sync grows with its files.

What is measured is the second sync and later ones, on a manifest that has come to rest. Where a
client needs a first upload it is made without the proxy's latency, and not timed.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import trees
from benchmarks.harness import LATENCY_S, Bench, ToolError, interleaved, log
from benchmarks.results import Result

_OLD_S = 3600


def unchanged(bench: Bench, results: Mapping[str, Result]) -> Result:
    """Ours beside a bare walk over the same tree in the same process, in turns."""
    count = bench.pick(10_000, 400)
    result = Result("unchanged", f"nothing changed, {count:,} files")
    rounds = bench.pick(9, 3)
    with bench.directory("unchanged") as root:
        _age(trees.grouped(root, count, 1000))
        job = bench.job(root)
        _settle(bench, job, count)
        bench.dismiss()  # what the first sync left in memory is not this one's
        for _, name in interleaved({"ours": rounds, "a bare scandir + stat walk": rounds}):
            walk = {} if name == "ours" else {"do": "walk"}
            result.add(name, bench.measure("ours", job | walk))
    bench.dismiss()
    requests = max(sample.requests for sample in result.samples["ours"])
    result.at_most("requests", requests, 0, result.n("ours"), "")
    ratio = result.wall("ours") / result.wall("a bare scandir + stat walk")
    more = f"{result.wall('ours') * 1000:.0f} ms"
    result.at_most("time of a bare scandir + stat walk", ratio, 2, str(rounds), more=more)
    return result


def changed(bench: Bench, results: Mapping[str, Result]) -> Result:
    """One file in a hundred rewritten, half of them in the same size, before each round."""
    count = bench.pick(10_000, 400)
    result = Result("changed", f"1 % changed of {count:,} files")
    rounds = {"ours": 5, "s5cmd": 5, "aws": 5, "rclone": 5}
    rounds = {name: bench.pick(n, 2) for name, n in rounds.items() if name not in bench.left_out}
    chance = random.Random(0)
    with bench.directory("changed") as root:
        paths = trees.grouped(root, count, 1000)
        _age(paths)
        jobs = {name: bench.job(root) for name in rounds}
        for name, job in list(jobs.items()):
            if name == "ours":
                _settle(bench, job, count)
            else:
                # rclone compares times that it has stored itself; the others storage's own.
                first = "rclone" if name == "rclone" else "s5cmd"
                bench.measure("aws" if first in bench.left_out else first, job, latency_s=0)
            jobs[name] = job | {"again": True}
        bench.dismiss()
        for number, name in interleaved(rounds):
            if name == next(iter(rounds)):
                time.sleep(1.1)  # storage's times, which some compare, are whole seconds
                for index, path in enumerate(chance.sample(paths, count // 100)):
                    path.write_bytes(os.urandom(path.stat().st_size + index % 2))
                time.sleep(0.1)
            if name in result.failed:
                continue
            try:
                sample = bench.measure(name, jobs[name])
                if number == rounds[name] - 1:
                    bench.check(jobs[name])
                result.add(name, sample)
            except ToolError as error:
                result.failed[name] = str(error)
                continue
            log(f"changed: {name} {sample.wall_s:.2f} s, {sample.requests} requests")
    bench.dismiss()
    most = max((sample.requests for sample in result.samples.get("ours", [])), default=1e999)
    result.at_most("requests", most, count // 100 + 1, result.n("ours"), "")
    ratio = result.wall("s5cmd") / result.wall("ours")
    more = f"{result.wall('ours'):.2f} s"
    n = result.n("ours", "s5cmd")
    result.at_least("faster than s5cmd sync", ratio, 5, n, more=more)
    return result


_COUNTED = "a line appended, by the proxy (20 ms)"
_APPENDED = "a line appended, without proxy"
_WHOLE = "full upload, without proxy"


def append(bench: Bench, results: Mapping[str, Result]) -> Result:
    """A line more in a log before each round.

    Bytes and requests are those of a destination behind the proxy; times are those of another one
    without it, beside a full upload of the same log there, since bandwidth is free on loopback.
    """
    size = bench.pick(200, 40)
    result = Result("append", f"one line appended to a {size} MB log")
    rounds = bench.pick(5, 2)
    with bench.directory("append") as root:
        path = root / "train.log"
        trees.write(path, size * 1_000_000)
        counted, direct = bench.job(root), bench.job(root, direct=True)
        for job in (counted, direct):
            bench.measure("ours", job, latency_s=0)
        for _ in range(rounds):
            with path.open("a") as log_file:
                log_file.write(f"{time.time():.3f} step done, loss 0.123, accuracy 0.987\n")
            time.sleep(0.1)
            result.add(_COUNTED, bench.measure("ours", counted, latency_s=LATENCY_S))
            result.add(_APPENDED, bench.measure("ours", direct, latency_s=0))
            whole = bench.job(root, direct=True)
            result.add(_WHOLE, bench.measure("ours", whole, latency_s=0))
            for job in (counted, direct, whole):
                bench.check(job)
        local = hashlib.md5(path.read_bytes()).digest()
        for job in (counted, direct):
            if hashlib.md5(bench.server.get(f"{job['prefix']}/train.log")).digest() != local:
                raise ToolError("what is stored is not the log")
    bench.dismiss()
    sent = max(sample.sent_bytes for sample in result.samples[_COUNTED]) / 1024
    result.at_most("bytes sent", sent, 64, str(rounds), " KB")
    requests = max(sample.requests for sample in result.samples[_COUNTED])
    result.at_most("requests", requests, 6, str(rounds), "")
    ratio = result.wall(_APPENDED) / result.wall(_WHOLE)
    more = f"{result.wall(_APPENDED):.2f} s to {result.wall(_WHOLE):.2f} s"
    result.at_most("time of a full upload, loopback", ratio, 0.25, str(rounds), more=more)
    return result


def memory(bench: Bench, results: Mapping[str, Result]) -> Result:
    """Ten times as many files, in a worker of its own each; straight to the server.

    The first sync of each size is measured once, the ones after it several times.
    """
    few, many = bench.pick(10_000, 100), bench.pick(100_000, 1000)
    result = Result("memory", f"one sync task on {few:,} and {many:,} files")
    rounds = bench.pick(5, 2)
    for count in (few, many):
        with bench.directory("memory") as root:
            _age(trees.grouped(root, count, 100))
            bench.dismiss()
            job = bench.job(root, direct=True)
            result.add(f"first, {count:,} files", bench.measure("ours", job, latency_s=0))
            bench.check(job)
            _settle(bench, job, count)
            bench.dismiss()
            for _ in range(rounds):
                again = bench.measure("ours", job, latency_s=0)
                result.add(f"nothing changed, {count:,} files", again)
            log(f"memory: {count} files done")
    bench.dismiss()
    for what, n in (("first", 1), ("nothing changed", rounds)):
        small, large = f"{what}, {few:,} files", f"{what}, {many:,} files"
        peak = max(s.peak_mb - s.idle_mb for s in result.samples[large])
        result.at_most(f"{what}: peak RSS above an idle worker", peak, 150, str(n), " MB")
        ratio = result.wall(large) / result.wall(small)
        more = f"{result.wall(small):.2f} s to {result.wall(large):.2f} s"
        result.at_most(f"{what}: time for ten times the files", ratio, 12, str(n), more=more)
    return result


def _age(paths: list[Path]) -> None:
    """Make files look an hour old, as most are when a sync looks at them."""
    then = time.time() - _OLD_S
    for path in paths:
        os.utime(path, (then, then))


def _settle(bench: Bench, job: Mapping[str, Any], count: int) -> None:
    """Sync until nothing is sent or compared any more: a file written just now is looked at twice.

    Raises:
        ToolError: It goes on for ever.
    """
    for _ in range(6):
        sample = bench.measure("ours", job, latency_s=0)
        extra = sample.extra
        if extra["files_unchanged"] == count and not (sample.requests or extra["files_uploaded"]):
            return
        time.sleep(0.1)
    raise ToolError(f"after six syncs there is still something to do: {extra}")
