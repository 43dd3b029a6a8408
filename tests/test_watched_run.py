"""One real run, and all that a person sees of it: status lines, metrics in Prometheus, report."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune

from tests.support.cluster import LocalCluster
from tests.test_metrics import DASHBOARD, names_in, queries
from tune_sync_plugin import SyncCallback, SyncConfig, experiment, metrics, watching
from tune_sync_plugin.report import EXPERIMENT, SyncReport


@pytest.fixture(scope="module")
def exporting() -> Iterator[LocalCluster]:
    """A cluster whose nodes export metrics."""
    for module in ("opentelemetry.exporter.prometheus", "aiohttp_cors"):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            found = None
        if not found:
            pytest.skip("ray[default] is not installed")
    with LocalCluster(workers=1, metrics=True) as running:
        yield running


def train(config: dict[str, Any]) -> None:
    for step in range(200):
        if step > 3 and Path(config["enough"]).exists():
            break
        if step < 4:
            Path(f"artifact_{step}.bin").write_bytes(b"a" * 100_000)
        if config["x"] == 1:
            Path("result.json").write_text("not ours to write")  # is reported, every time
        tune.report({"step": step}, checkpoint=None)
        time.sleep(0.3)


def exported(experiment: str) -> dict[str, float]:
    """What the driver's node exports of an experiment, summed over its other tags."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    sums: dict[str, float] = {}
    for name, tags, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        # Buckets are cumulative: the last has all.
        if f'experiment="{experiment}"' in tags and ('le="' not in tags or 'le="+Inf"' in tags):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def test_what_a_person_sees_of_a_run(
    exporting: LocalCluster,
    storage: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(watching, "EVERY_S", 1.0)
    syncs: list[SyncReport] = []
    original = watching.Watching.synced

    def synced(self: watching.Watching, node_id: str, report: SyncReport) -> None:
        syncs.append(report)
        original(self, node_id, report)

    monkeypatch.setattr(watching.Watching, "synced", synced)
    left: list[int] = []
    monkeypatch.setattr(experiment, "Bar", lambda make: contextlib.nullcontext(left.append))
    caplog.set_level("INFO", "tune_sync_plugin")
    enough = tmp_path / "enough"

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "last error: " in record.getMessage():
                enough.touch()  # the trials may end

    listener = Listener()
    log = logging.getLogger(watching.__name__)
    log.addHandler(listener)
    request.addfinalizer(lambda: log.removeHandler(listener))
    callback = SyncCallback()
    tune.Tuner(
        train,
        param_space={"x": tune.grid_search([0, 1]), "enough": str(enough)},
        run_config=tune.RunConfig(
            name="seen",
            storage_path=str(storage),
            sync_config=SyncConfig(sync_artifacts=True, sync_period=1),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    report = callback.report

    lines = [r.getMessage() for r in caplog.records if r.name.endswith(".watching")]
    assert 1 <= len(lines) <= report.duration_s
    assert all(re.match(r"synced \d of [12] trials?, [\d.]+ [KMG]?B up \(", line) for line in lines)
    assert any("last error: " in line and "result.json" in line for line in lines)

    assert left[0] >= 1
    assert left[-1] == 0

    frame = report.to_pandas()
    assert list(frame["failed"].sort_values()) == [0, 0, 1]
    assert frame["bytes_uploaded"].sum() == report.history.total == report.bytes_uploaded
    assert (frame["bytes_uploaded"].drop(EXPERIMENT) >= 400_000).all()
    assert "result.json" in report._repr_html_()

    asked = map(names_in, queries(json.loads(DASHBOARD.read_text())))
    right = {
        f"ray_{metrics.BYTES_UPLOADED}_total": report.bytes_uploaded,
        f"ray_{metrics.FILES_UPLOADED}_total": sum(s.files_uploaded for s in syncs),
        f"ray_{metrics.FAILURES}_total": sum(len(s.failures) + len(s.deferred) for s in syncs),
        f"ray_{metrics.QUEUE_LENGTH}": 1,  # what failed
        f"ray_{metrics.DURATION}_count": sum(s.duration_s > 0 for s in syncs),
        f"ray_{metrics.DURATION}_bucket": sum(s.duration_s > 0 for s in syncs),
    }
    oldest = f"ray_{metrics.OLDEST_UNSYNCED}"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = exported("seen")
        if {name: found.get(name) for name in right} == right and oldest in found:
            break
        time.sleep(0.2)
    assert {name: found.get(name) for name in right} == right
    assert 0 < found[oldest] < report.duration_s
    assert set().union(*asked) == {*right, oldest}
