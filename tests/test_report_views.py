"""The report as a table, a page and a plot."""

from __future__ import annotations

import builtins
import re
from typing import Any

import pytest

from tune_sync_plugin.report import (
    EXPERIMENT,
    ExperimentReport,
    FileFailure,
    RestoreReport,
    SyncReport,
)
from tune_sync_plugin.report_views import MOST_ROWS

DENIED = FileFailure("t1", "<b>.txt", "PermissionError", "403 & <script>alert(1)</script>")
LOST = FileFailure("t1", "", "NodeDiedError", "node 1a2b is gone")


@pytest.fixture
def report() -> ExperimentReport:
    report = ExperimentReport(destination="bucket/exp", duration_s=12.0)
    report.add(EXPERIMENT, "A", SyncReport(3, 30, files_stored=3, bytes_stored=30, duration_s=0.5))
    report.add("t0", "A", SyncReport(2, 1500, 4, 2500, files_stored=6, bytes_stored=4000))
    report.add("t0", "A", SyncReport(1, 500, duration_s=2.0, files_stored=7, bytes_stored=4500))
    report.add("t1", "A", SyncReport(failures=(LOST,)))
    report.add("t1", "B", SyncReport(failures=(DENIED,), deferred=(DENIED,)))
    report.of("t0").restored += [RestoreReport(files_restored=5)]
    return report


class TestPandas:
    def test_a_row_per_trial(self, report: ExperimentReport) -> None:
        frame = report.to_pandas()
        assert list(frame.index) == [EXPERIMENT, "t0", "t1"]
        row = frame.loc["t0"].to_dict()
        last_sync = row.pop("last_sync")
        assert row == {
            "files": 7,
            "bytes": 4500,
            "bytes_uploaded": 2000,
            "bytes_unchanged": 2500,
            "failed": 0,
            "lost": 0,
            "files_restored": 5,
            "duration_s": 2.0,
        }
        assert last_sync.timestamp() == pytest.approx(report.of("t0").last_sync)
        assert str(last_sync.tz) == "UTC"

    def test_failed_and_lost_are_told_apart(self, report: ExperimentReport) -> None:
        frame = report.to_pandas()
        assert (frame.loc["t1", "failed"], frame.loc["t1", "lost"]) == (2, 1)
        assert str(frame.loc["t1", "last_sync"]) == "NaT"

    def test_of_an_empty_report(self) -> None:
        frame = ExperimentReport().to_pandas()
        assert list(frame.index) == [EXPERIMENT]
        assert str(frame["last_sync"].dtype).endswith(", UTC]")


class TestHtml:
    def test_it_has_the_summary_the_failures_and_a_row_per_trial(
        self, report: ExperimentReport
    ) -> None:
        page = report._repr_html_()
        assert "synced 2 trials: 10 files" in page
        assert "bucket/exp" in page
        assert page.count("<tr") == 1 + 3
        cells = re.findall(r"<td>(.*?)</td>", page)
        row = cells[cells.index("t0") :][:9]
        assert row == ["t0", "7", "4.5 KB", "2.0 KB", "2.5 KB", "0", "0", "5", "2.0 s"]
        assert "t1: NodeDiedError: node 1a2b is gone" in page

    def test_everything_is_escaped(self, report: ExperimentReport) -> None:
        report.destination = "<i>d</i>"
        report.not_attached["<u>t9"] = "<s>why"
        report.add("<em>t", "A", SyncReport())
        page = report._repr_html_()
        for raw in ("<script", "<b>.txt", "<i>d", "<u>t9", "<s>why", "<em>"):
            assert raw not in page
        assert "&lt;script&gt;" in page
        assert "&lt;em&gt;t" in page

    def test_it_fits_light_and_dark(self, report: ExperimentReport) -> None:
        style = re.search(r"<style>(.*)</style>", report._repr_html_(), re.DOTALL)
        assert style
        set_colour = r"(?<!-)(?:color|background|border(?:-bottom)?):\s*([^;]+);"
        colours = re.findall(set_colour, style[1])
        known = (
            r"inherit|transparent|0|1px solid currentColor|1px solid rgba\(128, 128, 128, 0\.3\)"
        )
        assert [colour for colour in colours if not re.fullmatch(known, colour)] == []
        rules = [line for line in style[1].splitlines() if "{" in line]
        assert all(line.startswith(".tune-sync") for line in rules)  # nothing else on the page

    def test_many_trials_are_cut_and_those_that_failed_are_shown(self) -> None:
        report = ExperimentReport()
        for number in range(200):
            report.add(f"t{number}", "A", SyncReport())
        report.add("last", "A", SyncReport(failures=(DENIED,) * 70))
        page = report._repr_html_()
        assert page.count("<tr") == 1 + MOST_ROWS
        assert "and 152 more" in page  # the driver's directory counts
        assert "<td>last</td>" in page
        assert page.count("PermissionError") == MOST_ROWS
        assert "and 20 more" in page

    def test_of_an_empty_report(self) -> None:
        assert "synced 0 trials" in ExperimentReport()._repr_html_()


class TestPlot:
    @pytest.fixture(autouse=True)
    def _no_display(self) -> Any:
        matplotlib = pytest.importorskip("matplotlib")
        before = matplotlib.get_backend()
        matplotlib.use("agg")
        yield
        matplotlib.pyplot.close("all")
        matplotlib.use(before)

    def test_a_line_in_total_and_per_trial(self, report: ExperimentReport) -> None:
        report.history.points = [(100.0, 30), (101.0, 1530), (104.0, 2030)]
        report.trial_histories["t0"].points = [(101.0, 1500), (104.0, 2000)]
        lines = {line.get_label(): line for line in report.plot().get_lines()}
        assert list(lines) == ["in total", "t0", "t1"]
        assert lines["in total"].get_xydata().tolist() == [
            *([0, 0], [0, 30], [1, 1530], [4, 2030], [4, 2030])
        ]
        assert lines["t0"].get_xydata().tolist() == [[0, 0], [1, 1500], [4, 2000], [4, 2000]]
        assert lines["t0"].get_drawstyle() == "steps-post"

    def test_on_given_axes_and_with_readable_sizes(self, report: ExperimentReport) -> None:
        from matplotlib import pyplot

        figure, ax = pyplot.subplots()
        assert report.plot(ax) is ax
        figure.canvas.draw()
        assert any(label.get_text() == "1.0 KB" for label in ax.get_yticklabels())

    def test_of_an_empty_report(self) -> None:
        ExperimentReport().plot().figure.canvas.draw()


def test_without_matplotlib_it_says_how_to_get_it(
    report: ExperimentReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'tune-sync-plugin\[plot\]'"):
        report.plot()
