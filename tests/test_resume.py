"""Drivers that are killed, and ``Tuner.restore`` after that: drivers are processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment.trial import _TrainingRunMetadata

from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.restarts import Place, found_at, remove_blockers, wait_until
from tests.support.resumable import HOLD_AT, STEPS, Settings
from tests.support.scenarios import Link


class Driver:
    """A driver process; a context manager that leaves nothing of it and its cluster behind."""

    def __init__(self, settings: Settings) -> None:
        self._own: Path | None = None
        if not settings.address:
            self._own = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
            settings = dataclasses.replace(settings, temp_dir=str(self._own))
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "RAY_USAGE_STATS_ENABLED": "0",
            "TUNE_GLOBAL_CHECKPOINT_S": "0.5",
        }
        environment.pop("RAY_TMPDIR", None)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.resumable",
                json.dumps(dataclasses.asdict(settings)),
            ],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        if self._own is None:
            return
        # Its cluster goes with it; what is slow to do so is helped along, lest it still syncs.
        end = time.monotonic() + 15
        while remaining := _processes_of(self._own):
            if time.monotonic() > end:
                for pid in remaining:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self._own, ignore_errors=True)
        assert not self._own.exists()

    def kill(self) -> None:
        assert self._process.poll() is None, self._process.communicate()[0]
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def report(self) -> dict[str, Any]:
        """Wait for the end, and return what it printed."""
        output, _ = self._process.communicate(timeout=120)
        found = [line for line in output.splitlines() if line.startswith("REPORT ")]
        assert found, output
        report: dict[str, Any] = json.loads(found[0].removeprefix("REPORT "))
        return report


def _processes_of(temp_dir: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if f"{temp_dir}/".encode() in text:
                    found.append(int(entry.name))
    return found


@pytest.fixture
def hold(tmp_path: Path) -> Path:
    path = tmp_path / "hold"
    path.touch()
    return path


def _trials(place: Place) -> dict[int, str]:
    """The names of the trials' directories, by x."""
    names = {name.split("/")[1] for name in place.names() if name.endswith("/params.json")}
    return {json.loads(place.read("params.json", name))["x"]: name for name in names}


def _steps(place: Place, trial: str) -> list[tuple[int, int]]:
    """Step and score of each result in storage."""
    lines = place.read("result.json", trial).splitlines()
    return [(found["step"], found["score"]) for found in map(json.loads, lines)]


def _steps_in_state(place: Place) -> list[int]:
    """The step of each trial's newest checkpoint, by the newest state of the experiment."""
    names = [name for name in place.names() if name.startswith("exp/experiment_state-")]
    if not names:
        return []
    found = []
    for _, metadata in json.loads(place.get(max(names)))["trial_data"]:
        manager = _TrainingRunMetadata.from_json_state(metadata).checkpoint_manager
        latest = manager.latest_checkpoint_result
        found.append(latest.metrics["step"] if latest else -1)
    return found


def _stands_still(place: Place, trials: int, last: str) -> bool:
    """Whether storage has everything up to the step where all trials wait."""
    names = _trials(place).values()
    return (
        len(names) == trials
        and _steps_in_state(place) == [HOLD_AT] * trials
        and all(
            last.encode() in place.peek(".tune_sync/index.json", name)
            and f":{HOLD_AT}\n".encode() in place.peek("log.txt", name)
            and f":{HOLD_AT}\n".encode() in (place.peek("log2.txt", name) or b":4\n")
            for name in names
        )
    )


@pytest.fixture(
    scope="module", params=["function", pytest.param("class", marks=pytest.mark.exhaustive)]
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind of trainable, and the experiment as it is if nothing happens to it."""
    place = Place.in_directory(tmp_path_factory.mktemp("whole"))
    with Driver(Settings(place.storage_path, request.param)) as driver:
        report = driver.report()
    assert not report["errors"]
    return request.param, place, report


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", pytest.param("S3", marks=pytest.mark.exhaustive)])
def test_a_killed_driver_changes_nothing_about_the_result(
    whole: Any,
    kind: str,
    hold: Path,
    storage: Path,
    request: pytest.FixtureRequest,
    figure: Callable[..., None],
) -> None:
    trainable, reference, reference_report = whole
    if kind == "S3":
        link: Link = request.getfixturevalue("link")
        place = Place.on_s3(link, through_proxy=False)
    else:
        place = Place.in_directory(storage)
    settings = Settings(place.storage_path, trainable, str(hold))
    with Driver(settings) as driver:
        wait_until(lambda: driver.is_over() or _stands_still(place, 2, f"model_{HOLD_AT}.bin"), 90)
        driver.kill()
    hold.unlink()
    at_kill = {x: place.artifacts(name) for x, name in _trials(place).items()}
    with Driver(dataclasses.replace(settings, restore=True)) as driver:
        report = driver.report()

    assert not report["errors"]
    assert not report["failures"]
    assert not report["not_restored"]
    assert report["metrics"] == reference_report["metrics"]
    written = stored = 0
    trials, expected_trials = _trials(place), _trials(reference)
    assert trials.keys() == expected_trials.keys() == {1, 2}
    for x, trial in trials.items():
        assert _steps(place, trial) == _steps(reference, expected_trials[x])
        found = place.artifacts(trial)
        expected = reference.artifacts(expected_trials[x])
        names = {"log.txt", *(f"model_{step}.bin" for step in range(STEPS))}
        names |= {"log2.txt"} if trainable == "function" else {"same.txt"}
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        # Back before training went on.
        _, here, log = found_at(place, HOLD_AT + 1, trial)
        assert set(here) >= at_kill[x].keys() - {"log2.txt"}
        assert log.encode() == at_kill[x]["log.txt"]
        written += sum(len(expected[name]) for name in names)
        stored += sum(len(found[name]) for name in names if found[name] == expected[name])
        if trainable == "class":
            # setup() came first: its file stays, and so does the stored one.
            assert found["setup.txt"] != at_kill[x]["setup.txt"]
            assert found["setup.txt.before-1"] == at_kill[x]["setup.txt"]
            assert "same.txt.before-1" not in found
        kept = {name: found.get(name) for name in at_kill[x] if not name.startswith("log")}
        kept["setup.txt"] = found.get("setup.txt.before-1")
        assert {k: v for k, v in kept.items() if k in at_kill[x]} == {
            k: v for k, v in at_kill[x].items() if not k.startswith("log")
        }
    figure(f"driver SIGKILLed, new cluster, {trainable}, {kind}", written=written, stored=stored)


@pytest.mark.exhaustive
def test_a_killed_driver_that_had_no_callback(
    whole: Any, hold: Path, storage: Path, figure: Callable[..., None]
) -> None:
    """What Ray's own sync brought up by then comes back by a listing, in a new cluster."""
    trainable, reference, reference_report = whole
    place = Place.in_directory(storage)
    settings = Settings(place.storage_path, trainable, str(hold), by_ray=True)

    def stands_still() -> bool:
        return (
            len(names := _trials(place).values()) == 2
            and _steps_in_state(place) == [HOLD_AT] * 2
            and all(place.peek(f"model_{HOLD_AT}.bin", name) for name in names)
            and all(f":{HOLD_AT}\n".encode() in place.peek("log.txt", name) for name in names)
        )

    with Driver(settings) as driver:
        wait_until(lambda: driver.is_over() or stands_still(), 90)
        driver.kill()
    hold.unlink()
    assert not any(".tune_sync" in name for name in place.names())
    at_kill = {x: place.artifacts(name) for x, name in _trials(place).items()}
    with Driver(dataclasses.replace(settings, restore=True)) as driver:
        report = driver.report()

    assert not report["errors"]
    # A listing does not tell what was written to get_trial_dir(): it comes back to the working
    # directory, and where training goes on with it in the other one, that is said.
    beside = ["log2.txt"] if trainable == "function" else []
    assert [f.split(":")[0].split("/", 1)[1] for f in report["failures"]] == beside * 2
    assert not report["not_restored"]
    assert report["files_restored"] > 0
    assert report["metrics"] == reference_report["metrics"]
    written = stored = 0
    expected_trials = _trials(reference)
    for x, trial in _trials(place).items():
        found = place.artifacts(trial)
        expected = reference.artifacts(expected_trials[x])
        names = ["log.txt", *(f"model_{step}.bin" for step in range(STEPS))]
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
        _, here, log = found_at(place, HOLD_AT + 1, trial)
        assert log.encode() == at_kill[x]["log.txt"]
        assert set(here) >= {f"model_{step}.bin" for step in range(HOLD_AT + 1)}
        assert not any(name.startswith(("checkpoint_", "events.", "result.")) for name in here)
        written += sum(len(expected[name]) for name in names)
        stored += sum(len(found[name]) for name in names)
    figure(f"driver without callback SIGKILLed, {trainable}", written=written, stored=stored)


def _works_in(directory: Path) -> bool:
    """Whether a process is in it."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd")) == directory:
                return True
    return False


@pytest.fixture
def _no_blockers(cluster: LocalCluster) -> Iterator[None]:
    yield
    remove_blockers(cluster.node_ids)


@pytest.mark.slow
@pytest.mark.usefixtures("_no_blockers")
@pytest.mark.parametrize(
    "moves",
    [pytest.param(False, id="stays", marks=pytest.mark.exhaustive), pytest.param(True, id="moves")],
)
def test_a_killed_driver_of_a_cluster_that_lives_on(
    cluster: LocalCluster, moves: bool, hold: Path, storage: Path, figure: Callable[..., None]
) -> None:
    """What was not synced lies on the node's disk: it is fetched first, wherever the trial goes."""
    place = Place.in_directory(storage)
    settings = Settings(
        place.storage_path,
        hold=str(hold),
        address=cluster.address,
        trials=1,
        moves=moves,
        # The first sync of the artifacts comes at once, and no other before the kill.
        sync={
            "sync_period": 300,
            "experiment_sync_period": 0.5,
            "sync_artifacts_on_checkpoint": False,
        },
    )
    with Driver(settings) as driver:
        wait_until(lambda: driver.is_over() or place.peek("log.txt"), 60)
        (trial,) = (n.split("/")[1] for n in place.names() if n.endswith("/log.txt"))
        (disk,) = (
            path
            for temp_dir in cluster.temp_dirs
            for path in temp_dir.glob("session_2*/artifacts/*/exp/working_dirs/*")
            if path.name == trial
        )
        wait_until(lambda: _steps_in_state(place) == [HOLD_AT])
        hold.write_text("late")
        wait_until((disk / "late.bin").exists)
        time.sleep(1)
        driver.kill()
    at_kill = place.artifacts()
    assert "late.bin" not in at_kill
    on_disk = {path.name: path.read_bytes() for path in disk.iterdir()}
    assert on_disk["log.txt"].endswith(b"1:late\n")
    wait_until(lambda: not _works_in(disk))  # the trial's process ends with its driver
    hold.unlink()
    with Driver(dataclasses.replace(settings, restore=True)) as driver:
        report = driver.report()

    assert not report["errors"]
    stored = place.artifacts()
    first, second = found_at(place, 0)[0], found_at(place, HOLD_AT + 1)[0]
    rest = "".join(f"1:{step}\n" for step in range(HOLD_AT + 1, STEPS)).encode()
    assert stored["log.txt"] == on_disk["log.txt"] + rest
    assert {name: stored[name] for name in on_disk if name != "log.txt"} == {
        name: content for name, content in on_disk.items() if name != "log.txt"
    }
    assert not report["failures"]
    assert first != second or not moves  # where it goes on is for Ray to say, if there is a choice
    # Whatever had been stored is there, as it was or with more behind it.
    for name, content in at_kill.items():
        assert stored[name].startswith(content), name
    written = {**on_disk, "log.txt": on_disk["log.txt"] + rest}
    figure(
        f"driver SIGKILLed, same cluster, trial {'moves' if moves else 'stays'}",
        written=sum(map(len, written.values())),
        stored=sum(len(stored.get(name, b"")) for name in written),
    )
