"""The metrics: what is counted, that a run never suffers from them, and the dashboard's names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.util.metrics

from tests.support.cluster import REPOSITORY
from tune_sync_plugin import metrics
from tune_sync_plugin.metrics import Metrics
from tune_sync_plugin.report import FileFailure, SyncReport
from tune_sync_plugin.targets import Account

NODE = "1a2b3c4d5e6f"
DENIED = FileFailure("t1", "a.txt", "PermissionError", "403")
DASHBOARD = Path(REPOSITORY, "examples", "grafana", "tune_sync.json")


def names_in(query: str) -> set[str]:
    """The metrics that a PromQL query asks for."""
    return set(re.findall(r"\bray_\w+", query))


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


class Recorder:
    """Stands in for Ray's Counter, Gauge and Histogram."""

    said: list[tuple[str, float, dict[str, str]]]

    def __init__(self, name: str, description: str, *rest: Any) -> None:
        self.name, self.keys = name, set(rest[-1])
        assert description

    def record(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self.keys
        Recorder.said.append((self.name, value, tags))

    inc = set = observe = record


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, float, dict[str, str]]]]:
    Recorder.said = []
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, kind, Recorder)
    return Recorder.said


class TestMetrics:
    def test_a_sync_is_counted(self, said: list[Any]) -> None:
        report = SyncReport(2, 300, failures=(DENIED,), deferred=(DENIED,), duration_s=1.5)
        Metrics("exp").synced(NODE, report)
        tags = {"experiment": "exp", "node": "1a2b3c4d"}
        assert said == [
            (metrics.BYTES_UPLOADED, 300, tags),
            (metrics.FILES_UPLOADED, 2, tags),
            (metrics.FAILURES, 2, tags),
            (metrics.DURATION, 1.5, tags),
        ]

    def test_nothing_is_not_counted(self, said: list[Any]) -> None:
        Metrics("exp").synced(NODE, SyncReport())  # a real counter takes no 0
        assert said == []

    def test_what_is_owed_is_said_even_if_it_is_nothing(self, said: list[Any]) -> None:
        known = Metrics("exp")
        known.owed(Account(3, 1, 1, 2, oldest_s=7.5))
        known.owed(Account())
        tags = {"experiment": "exp"}
        assert said == [
            (metrics.QUEUE_LENGTH, 2, tags),
            (metrics.OLDEST_UNSYNCED, 7.5, tags),
            (metrics.QUEUE_LENGTH, 0, tags),
            (metrics.OLDEST_UNSYNCED, 0, tags),
        ]

    @pytest.mark.parametrize("where", ["making", "recording"])
    def test_they_never_raise_and_are_left_alone(
        self, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tries = []

        class Broken(Recorder):
            def __init__(self, *arguments: Any) -> None:
                if where == "making":
                    self.record()

            def record(self, *arguments: Any) -> None:  # type: ignore[override]
                tries.append(arguments)
                raise RuntimeError("as scripted")

            inc = set = observe = record

        for kind in ("Counter", "Gauge", "Histogram"):
            monkeypatch.setattr(ray.util.metrics, kind, Broken)
        caplog.set_level(logging.DEBUG, "tune_sync_plugin.metrics")
        known = Metrics("exp")
        for _ in range(3):
            known.synced(NODE, SyncReport(2, 300))
            known.owed(Account())
        assert len(tries) == 1
        assert caplog.messages == ["no more metrics: RuntimeError: as scripted"]


class TestDashboard:
    @pytest.fixture
    def dashboard(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
        return loaded

    def test_grafana_can_import_it(self, dashboard: dict[str, Any]) -> None:
        assert dashboard["schemaVersion"] >= 36
        assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
        assert dashboard["title"]
        assert dashboard["id"] is None  # Grafana gives it one
        variables = {v["name"]: v for v in dashboard["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        assert variables["datasource"]["query"] == "prometheus"
        assert "ray_tune_sync_" in variables["experiment"]["definition"]
        for name in ("experiment",):
            assert variables[name]["datasource"]["uid"] == "${datasource}"

    def test_every_panel_asks_the_chosen_source(self, dashboard: dict[str, Any]) -> None:
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)
        taken = set()
        for panel in dashboard["panels"]:
            assert panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["targets"]
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert x < 24
                    assert (x, y) not in taken
                    taken.add((x, y))

    def test_every_query_is_of_the_chosen_experiments_and_balanced(
        self, dashboard: dict[str, Any]
    ) -> None:
        for query in queries(dashboard):
            assert query.count('{experiment=~"$experiment"}') == len(
                re.findall(r"\bray_\w+", query)
            )
            for left, right in ("()", "[]", "{}"):
                assert query.count(left) == query.count(right)

    def test_it_asks_for_what_there_is_and_for_all_of_it(self, dashboard: dict[str, Any]) -> None:
        asked = set().union(*map(names_in, queries(dashboard)))
        assert asked <= metrics.exported_names()
        known = {name for key, name in vars(metrics).items() if key.isupper() and key[0] != "_"}
        assert {re.sub(r"^ray_|_(total|bucket|count)$", "", name) for name in asked} == known
