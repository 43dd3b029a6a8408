"""Cold uploads: a directory that storage has nothing of, by every client, into a fresh prefix.

After each round the server is asked whether every file is there in its full size; a client that
left something out has no figure. Slow clients get fewer rounds, and Ray on the deep tree a tenth of
it, scaled up, since it would take four minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks import trees
from benchmarks.harness import Bench, ToolError, interleaved, log, scaled
from benchmarks.results import Result

MB = 1_000_000
SMALL, LARGE = "small", "large"

# Rounds of a full run, by how long one takes.
_FAST = {"ours": 5, "s5cmd": 5, "obstore": 5}


def small(bench: Bench, results: Mapping[str, Result]) -> Result:
    count = bench.pick(2000, 200)
    result = Result(SMALL, f"cold upload, {count:,} x 10 KB")
    rounds = {**_FAST, "rclone": 5, "s3fs": 5, "fsspec": 1, "aws": 1, "ray": 1}
    with bench.directory("small") as root:
        trees.flat(root, count, 10_000)
        _compare(bench, result, root, rounds)
    _judge(result, 30)
    return result


def deep(bench: Bench, results: Mapping[str, Result]) -> Result:
    count = bench.pick(5000, 250)
    result = Result("deep", f"cold upload, {count:,} tiny files five levels deep")
    rounds = {**_FAST, "rclone": 3, "s3fs": 2, "fsspec": 1, "aws": 1, "ray": 1}
    with bench.directory("deep") as root:
        trees.deep(root, count)
        tenth = root / "level_0_0"
        _compare(
            bench, result, root, rounds, {"ray": tenth / "level_1_0" if bench.quick else tenth}
        )
    _judge(result, 60)
    return result


def medium(bench: Bench, results: Mapping[str, Result]) -> Result:
    count = bench.pick(200, 40)
    result = Result("medium", f"cold upload, {count:,} x 1 MB")
    rounds = {**_FAST, "rclone": 5, "s3fs": 5, "fsspec": 5, "aws": 5, "ray": 5}
    with bench.directory("medium") as root:
        trees.flat(root, count, MB)
        _compare(bench, result, root, rounds)
    _judge(result, 4)
    return result


def large(bench: Bench, results: Mapping[str, Result]) -> Result:
    size = bench.pick(512, 32)
    result = Result(LARGE, f"cold upload, 2 x {size} MB")
    rounds = {**_FAST, "rclone": 5, "s3fs": 5, "fsspec": 3, "aws": 3, "ray": 3}
    with bench.directory("large") as root:
        trees.flat(root, 2, size * MB)
        _compare(bench, result, root, rounds)
    _judge(result)
    peak = max((s.peak_mb - s.idle_mb for s in result.samples.get("ours", [])), default=1e999)
    result.at_most("peak RSS above an idle worker", peak, 200, result.n("ours"), " MB")
    return result


def cpu(bench: Bench, results: Mapping[str, Result]) -> Result:
    """CPU seconds, from the uploads of the cases `small` and `large`; they are run if need be."""
    count, size = bench.pick(2000, 200), bench.pick(512, 32) * 2
    result = Result("cpu", "CPU seconds of a cold upload, all threads and processes")
    for case, run, per, what in (
        (SMALL, small, count / 1000, "per 1,000 files of 10 KB"),
        (LARGE, large, size / 1000, "per GB of large files"),
    ):
        found = results.get(case) or run(bench, results)
        of = {name: found.median(name, lambda s: s.cpu_s) / per for name in ("ours", "s5cmd")}
        for name, value in of.items():
            result.notes.append(f"{what}: {name} {value:.2f} CPU s.")
        more = f"{of['ours']:.2f} s to {of['s5cmd']:.2f} s"
        ratio = of["ours"] / of["s5cmd"]
        result.at_most(f"{what}, ours / s5cmd's", ratio, 1, found.n("ours", "s5cmd"), more=more)
    return result


def _compare(
    bench: Bench,
    result: Result,
    root: Path,
    rounds: Mapping[str, int],
    slices: Mapping[str, Path] = {},
) -> None:
    """Upload ``root`` by every client that is here, so often each.

    Args:
        slices: Clients that are given only a part of it.
    """
    files = len(trees_files(root))
    counts = {name: bench.pick(n, 2 if name in _FAST else 1) for name, n in rounds.items()}
    counts = {name: n for name, n in counts.items() if name not in bench.left_out}
    for number, name in interleaved(counts):
        if name in result.failed:
            continue
        if number == 0 or name == "ours":
            bench.renew_if_full()
        part = slices.get(name, root)
        job = bench.job(part)
        try:
            sample = bench.measure(name, job)
            bench.check(job)
        except ToolError as error:
            result.failed[name] = str(error)
            log(f"{result.case}: {name} failed: {error}")
            continue
        finally:
            shutil.rmtree(Path(job["manifest"]).parent, ignore_errors=True)
        if part != root:
            sample = scaled(sample, files / len(trees_files(part)))
        result.add(name, sample)
        log(f"{result.case}: {name} {sample.wall_s:.2f} s, {sample.requests} requests")
    bench.dismiss()
    for name in counts.keys() & result.failed.keys():
        result.samples.pop(name, None)


def trees_files(root: Path) -> list[Path]:
    """All files below a directory."""
    return [path for path in root.rglob("*") if path.is_file()]


def _judge(result: Result, faster_than_ray: float | None = None) -> None:
    ours = result.wall("ours")
    if faster_than_ray is not None:
        scale = result.samples["ray"][0].factor if result.samples.get("ray") else 1
        more = f"{100 / scale:.3g} % of Ray's measured, scaled" if scale != 1 else ""
        ratio = result.wall("ray") / ours
        n = result.n("ours", "ray")
        result.at_least("faster than Ray", ratio, faster_than_ray, n, more=more)
    peers = [name for name in result.samples if name not in ("ours", "ray")]
    if peers and result.samples.get("ours"):
        fastest = min(peers, key=result.wall)
        ratio = result.wall(fastest) / ours
        n = result.n("ours", fastest)
        more = f"{ours:.2f} s to {result.wall(fastest):.2f} s of {fastest}"
        result.at_least("faster than the fastest peer", ratio, 1, n, more=more)
    shares = {
        name: result.median(name, lambda sample: sample.proxy_cpu_s / sample.wall_s)
        for name in ("ours", *peers)
    }
    busy = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    result.notes.append(
        f"How busy the proxy's one thread was meanwhile: {busy}. Near 100 % it is what limits."
    )
