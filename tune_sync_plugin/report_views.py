"""A report as a person looks at it: a pandas table, a notebook's page, a plot.

Presentation only: what is shown is counted in ``report``. pandas and matplotlib are imported when
they are asked for; neither is needed to sync.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from tune_sync_plugin.report import EXPERIMENT, ExperimentReport, TrialReport
from tune_sync_plugin.words import human_bytes

if TYPE_CHECKING:
    import pandas

# What a notebook's page lists at most; the table of pandas has all.
MOST_ROWS = 50


class Row(NamedTuple):
    """One line of the table; see ``ExperimentReport.to_pandas``."""

    trial: str
    files: int
    bytes: int
    bytes_uploaded: int
    bytes_unchanged: int
    failed: int
    lost: int
    files_restored: int
    duration_s: float
    last_sync: datetime | None


def rows(report: ExperimentReport) -> list[Row]:
    """The driver's directory, then the trials in the order they came."""
    return [
        _row(key, part) for key, part in [(EXPERIMENT, report.experiment), *report.trials.items()]
    ]


def _row(key: str, part: TrialReport) -> Row:
    lost = sum(failure.lost for failure in part.failures)
    return Row(
        key,
        part.files,
        part.bytes,
        part.bytes_uploaded,
        part.bytes_unchanged,
        len(part.failures) - lost,
        lost,
        part.files_restored,
        part.duration_s,
        None if part.last_sync is None else datetime.fromtimestamp(part.last_sync, timezone.utc),
    )


def to_pandas(report: ExperimentReport) -> pandas.DataFrame:
    """See ``ExperimentReport.to_pandas``."""
    import pandas

    frame = pandas.DataFrame(rows(report), columns=Row._fields).set_index("trial")
    frame["last_sync"] = pandas.to_datetime(frame["last_sync"], utc=True)
    return frame


# -- a notebook's page ------------------------------------------------------------------------

# Colours are inherited, or a grey that shows on white as on black. Jupyter stripes the rows of
# tables in colours of its theme by itself.
_STYLE = """
<style>
.tune-sync { color: inherit; background: transparent; max-width: 100%; overflow-x: auto; }
.tune-sync p, .tune-sync details { margin: 0.4em 0; }
.tune-sync table {
  border-collapse: collapse; color: inherit; font-variant-numeric: tabular-nums; margin-top: 0.8em;
}
.tune-sync summary { cursor: pointer; }
.tune-sync th, .tune-sync td {
  text-align: right; white-space: nowrap; padding: 0.25em 0.8em; color: inherit; border: 0;
}
.tune-sync th { font-weight: bold; border-bottom: 1px solid currentColor; }
.tune-sync td { border-bottom: 1px solid rgba(128, 128, 128, 0.3); }
.tune-sync th:first-child, .tune-sync td:first-child { text-align: left; }
.tune-sync .bad td { font-weight: bold; }
.tune-sync ul { margin: 0.2em 0; padding-left: 1.4em; overflow-wrap: anywhere; }
</style>
"""
_HEADS = (
    "trial",
    "files",
    "size",
    "uploaded",
    "unchanged",
    "failed",
    "lost",
    "restored",
    "sync time",
    "last sync (UTC)",
)


def to_html(report: ExperimentReport) -> str:
    """A page of a notebook: the summary, what is missing, and a table of the trials."""
    parts = [_STYLE, '<div class="tune-sync">', f"<p><b>{escape(report.summary())}</b></p>"]
    if report.destination:
        parts.append(f"<p>in <code>{escape(report.destination)}</code></p>")
    parts += _list("Not synced", map(str, report.failures))
    parts += _list("Not restored (it is in storage)", map(str, report.not_restored))
    parts += _list(
        "Left to Ray's own sync", (f"{key}: {why}" for key, why in report.not_attached.items())
    )
    # Those with something to say first, so that none of them is among what is left out.
    found = sorted(rows(report), key=lambda row: not (row.failed or row.lost))
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    parts.append(f"<table><thead><tr>{heads}</tr></thead><tbody>")
    parts += map(_html_row, found[:MOST_ROWS])
    parts.append("</tbody></table>")
    if len(found) > MOST_ROWS:
        parts.append(f"<p>and {len(found) - MOST_ROWS:,} more: see <code>to_pandas()</code></p>")
    return "\n".join([*parts, "</div>"])


def _html_row(row: Row) -> str:
    cells = (
        escape(row.trial),
        f"{row.files:,}",
        human_bytes(row.bytes),
        human_bytes(row.bytes_uploaded),
        human_bytes(row.bytes_unchanged),
        f"{row.failed:,}",
        f"{row.lost:,}",
        f"{row.files_restored:,}",
        f"{row.duration_s:,.1f} s",
        f"{row.last_sync:%Y-%m-%d %H:%M:%S}" if row.last_sync else "never",
    )
    kind = ' class="bad"' if row.failed or row.lost else ""
    return f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _list(title: str, lines: Iterable[str]) -> list[str]:
    found = list(lines)
    if not found:
        return []
    items = [f"<li>{escape(line)}</li>" for line in found[:MOST_ROWS]]
    if len(found) > MOST_ROWS:
        items.append(f"<li>and {len(found) - MOST_ROWS:,} more</li>")
    heading = f"<summary>{escape(title)}: {len(found):,}</summary>"
    return [f"<details open>{heading}<ul>", *items, "</ul></details>"]


# -- a plot -----------------------------------------------------------------------------------


def plot(report: ExperimentReport, ax: Any = None) -> Any:
    """See ``ExperimentReport.plot``."""
    try:
        from matplotlib import pyplot
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError(
            "plot() needs matplotlib, which is not installed: "
            "pip install 'tune-sync-plugin[plot]' (or: pip install matplotlib)"
        ) from error
    if ax is None:
        ax = pyplot.subplots()[1]
    start = report.history.points[0][0] if report.history.points else 0.0
    end = report.history.points[-1][0] - start if report.history.points else 0.0
    for name, history in {"in total": report.history, **report.trial_histories}.items():
        # From nothing at the first upload, and level to the last one's time.
        times = [0.0, *(when - start for when, _ in history.points), end]
        sizes = [0, *(count for _, count in history.points), history.total]
        in_total = history is report.history
        ax.step(times, sizes, where="post", label=name, linewidth=2 if in_total else 1)
    ax.set_xlabel("seconds since the first upload")
    ax.set_ylabel("uploaded")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda count, _: human_bytes(count)))
    ax.set_ylim(bottom=0)
    ax.legend()
    return ax
