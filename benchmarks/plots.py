"""The plots of the README, drawn from ``results/*.json``; nothing is measured here.

``python -m benchmarks.plots [DIRECTORY]`` draws them again. Without matplotlib there are none.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.harness import log
from benchmarks.peers import PEERS

_OURS, _RAY, _OTHER = "#1a7f5a", "#c2483d", "#8a97a6"
_COLD = ("small", "deep", "medium", "large")


def draw(directory: Path) -> list[Path]:
    """Draw what there are figures for; returns the files written."""
    if not importlib.util.find_spec("matplotlib"):
        log("no plots: matplotlib is not installed")
        return []
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "tune_sync_plugin", "font.size": 9})
    found = {case: _read(directory, case) for case in (*_COLD, "changed", "driver", "blocked")}
    drawn = [
        _cold(directory, [found[case] for case in _COLD if found[case]]),
        _again(directory, found["changed"]),
        _runs(directory, found["driver"], found["blocked"]),
    ]
    return [path for path in drawn if path]


def _read(directory: Path, case: str) -> dict[str, Any] | None:
    path = directory / f"{case}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _bars(axes: Any, summary: dict[str, Any], key: str, label: str, form: str) -> None:
    """Horizontal bars by client on a log scale, the best one at the top."""
    from matplotlib.ticker import NullFormatter

    rows = sorted(summary.items(), key=lambda item: item[1][key])
    names = [_name(name) for name, _ in rows]
    values = [row[key] for _, row in rows]
    colors = [_OURS if name == "ours" else _RAY if name == "ray" else _OTHER for name, _ in rows]
    bars = axes.barh(names, values, color=colors, height=0.7)
    scaled = ["*" if row["factor"] != 1 else "" for _, row in rows]
    texts = [format(value, form) + mark for value, mark in zip(values, scaled, strict=True)]
    axes.bar_label(bars, texts, padding=3)
    axes.set_xscale("log")
    # The bars bear their figures; between powers of ten an axis's would overlap.
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(values) / 2, max(values) * 2.5)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _name(client: str) -> str:
    return PEERS[client].title.partition(",")[0].replace("`", "") if client in PEERS else client


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    # White, since a page in dark mode shows black text on nothing otherwise.
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    pyplot.close(figure)
    return path


def _cold(directory: Path, cases: list[dict[str, Any]]) -> Path | None:
    if not cases:
        return None
    from matplotlib import pyplot

    columns = 2 if len(cases) > 1 else 1
    lines = -(-len(cases) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(5.2 * columns, 2.9 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    for axes, case in zip(grid.flat, cases, strict=False):
        _bars(axes, case["summary"], "wall_s", "seconds, log scale", ".2f")
        axes.set_title(case["title"], fontsize=10)
    if any(row["factor"] != 1 for case in cases for row in case["summary"].values()):
        figure.supxlabel("* a part was measured and scaled", fontsize=8)
    return _save(figure, directory / "cold_uploads.svg")


def _again(directory: Path, case: dict[str, Any] | None) -> Path | None:
    if not case or not case["summary"]:
        return None
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 2.2), layout="constrained")
    _bars(left, case["summary"], "wall_s", "seconds, log scale", ".2f")
    _bars(right, case["summary"], "requests", "requests, log scale", ",.0f")
    figure.suptitle(case["title"], fontsize=10)
    return _save(figure, directory / "changed.svg")


def _runs(
    directory: Path, driver: dict[str, Any] | None, blocked: dict[str, Any] | None
) -> Path | None:
    if not (driver and blocked and driver["summary"] and blocked["summary"]):
        return None
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 2.2), layout="constrained")
    _bars(left, driver["summary"], "wall_s", "seconds, log scale", ".1f")
    left.set_title(f"{driver['title']}:\nfrom the last result to the return of fit()", fontsize=9)
    _bars(right, blocked["summary"], "wall_s", "seconds, log scale", ".2f")
    right.set_title("a report with 20 MB of new artifacts, 20 MB/s link:\nblocked", fontsize=9)
    if any(row["factor"] != 1 for row in driver["summary"].values()):
        figure.supxlabel("* a part was measured and scaled", fontsize=8)
    return _save(figure, directory / "runs.svg")


if __name__ == "__main__":
    for drawn in draw(Path(sys.argv[1]) if sys.argv[1:] else results.DIRECTORY):
        print(drawn)
