"""S3 that breaks while Tune runs on it: training goes on, nothing is lost without being named.

What belongs here: whole Tune runs on the cluster, with S3 behind a proxy that breaks the traffic.
What the engine makes of each fault by itself, and at what cost, is in test_storage_faults.py.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import tune

from tests.support import scenarios
from tests.support.restarts import meanwhile, wait_until
from tests.support.retries import TRIES, most_writes
from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback, SyncError

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

SIZE = 20_000
TRIALS, STEPS = 2, 8
SPACE = {"x": tune.grid_search(list(range(TRIALS)))}
# Of the run's own files: not the one with which Ray tries the storage out before it begins.
OURS = r"/exp/(?!\.validate)"


def payload(name: str) -> bytes:
    return random.Random(name).randbytes(SIZE)


def _write(name: str) -> None:
    Path(name).write_bytes(payload(name))


def _train(config: dict[str, Any]) -> None:
    for step in range(STEPS):
        _write(f"{config['x']}_{step}.bin")
        tune.report({"step": step})
        time.sleep(0.3)
    deadline = time.monotonic() + 60
    while "until" in config and not Path(config["until"]).exists():
        assert time.monotonic() < deadline
        tune.report({"step": STEPS})
        time.sleep(0.3)


ON_TWO_NODES = tune.with_resources(_train, {"CPU": 2})
NAMES = {f"{x}_{step}.bin" for x in range(TRIALS) for step in range(STEPS)}


def prefix_of(callback: SyncCallback) -> str:
    """The experiment's keys begin so; its destination begins with the bucket."""
    return callback.report.destination.split("/", 1)[1]


def stored_bytes(link: Link, callback: SyncCallback, names: set[str]) -> int:
    """Bytes of the artifacts of these names that are in storage as they were written."""
    contents = link.s3.contents(prefix_of(callback))
    by_name = {key.rsplit("/", 1)[-1]: data for key, data in contents.items()}
    return sum(SIZE for name in names if by_name.get(name) == payload(name))


def statuses(link: Link, name: str) -> list[int]:
    """The answers to all tries to write a file of this name."""
    records = link.proxy.stats().select("PUT", rf"/{re.escape(name)}$").records
    return [record.status for record in records if record.status]


def owed(callback: SyncCallback, names: set[str]) -> int:
    """Bytes of the artifacts of these names that the report says are not in storage."""
    return SIZE * len({failure.path for failure in callback.report.failures} & names)


def warnings_of(caplog: pytest.LogCaptureFixture, cause: str) -> tuple[list[str], list[str]]:
    """The log messages that name the cause: ours, and those of others."""
    found: tuple[list[str], list[str]] = ([], [])
    for record in caplog.records:
        text = caplog.handler.format(record)
        if record.levelno >= logging.WARNING and re.search(cause, text):
            found[not record.name.startswith("tune_sync_plugin")].append(record.getMessage())
    return found


def test_all_files_of_a_run_arrive_though_requests_fail(
    link: Link, figure: Callable[..., None]
) -> None:
    faults = {"status:503": 0.2, "status:500": 0.05, "reset": 0.05, "lose": 0.05}
    outcome = scenarios.fit(
        link,
        ON_TWO_NODES,
        by="ours",
        space=SPACE,
        rules=[
            {"key_regex": OURS, "action": action, "fraction": fraction, "seed": seed}
            for seed, (action, fraction) in enumerate(faults.items())
        ],
    )
    assert outcome.callback
    assert not outcome.results.errors
    failed = sum(record.action is not None for record in outcome.stats.records)
    figure(
        "a third of a run's requests fail",
        written=SIZE * len(NAMES),
        stored=stored_bytes(link, outcome.callback, NAMES),
        lost=owed(outcome.callback, NAMES),
        more=f"{failed} of {outcome.stats.requests} requests failed",
    )
    assert failed > 8
    assert stored_bytes(link, outcome.callback, NAMES) == SIZE * len(NAMES)
    assert not outcome.callback.report.failures
    for result in outcome.results:
        assert f"{result.path}/result.json".split("/", 1)[1] in outcome.stored


@pytest.mark.slow  # the file that is answered 500 is tried for all of sync_timeout
def test_files_that_are_refused_are_named_and_the_others_arrive(
    link: Link, tmp_path: Path, figure: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    callback = SyncCallback()
    refuse = {"method": "PUT", "action": "status:403"}
    arrived = tmp_path / "arrived"

    def see_it_arrive() -> None:
        wait_until(lambda: 200 in statuses(link, "0_2.bin"))
        arrived.touch()

    with pytest.raises(SyncError) as raised, meanwhile(see_it_arrive):
        scenarios.fit(
            link,
            ON_TWO_NODES,
            by="ours",
            callback=callback,
            space={**SPACE, "until": str(arrived)},
            sync_config={"strict": True, "sync_timeout": 15},
            rules=[
                {"key_regex": r"/0_1\.bin$", **refuse},
                {"key_regex": r"/0_2\.bin$", **refuse, "times": 2},
                {"key_regex": r"/1_1\.bin$", "method": "PUT", "action": "status:500"},
            ],
        )
    stats = link.proxy.stats()
    stored = stored_bytes(link, callback, NAMES)
    figure(
        "two files of a run are refused, 403 and 500",
        written=SIZE * len(NAMES),
        stored=stored,
        lost=owed(callback, NAMES),
        more="by name, operation and cause",
    )
    assert stored == SIZE * (len(NAMES) - 2)
    failures = {failure.path: failure.message for failure in callback.report.failures}
    # The tries of 1_1.bin may fill the flush's time, which then is said of the trial as well.
    assert failures.keys() - {""} == {"0_1.bin", "1_1.bin"}
    for name, status, cause in [
        ("0_1.bin", 403, "AccessDenied"),
        ("1_1.bin", 500, "InternalError"),
    ]:
        assert re.search(rf"{callback.report.destination}/\S+/{name} ", failures[name])
        assert re.search(rf"PutObject of \S+: HTTP status {status} \({cause}\)", failures[name])
        assert name in str(raised.value)
        # At most one message for all syncs, beside the summary's.
        assert sum("Training goes on" in text for text in warnings_of(caplog, cause)[0]) <= 1
    # 403: one try per sync. 500: several per sync.
    assert stats.select("PUT", r"/0_1\.bin$").requests >= 3
    assert stats.select("PUT", r"/1_1\.bin$").requests >= 4
    assert statuses(link, "0_2.bin") == [403, 403, 200]


# -- broken from the middle on --------------------------------------------------------------------

WRITES = ("PUT", "POST")
EVERYTHING = (None,)


@contextlib.contextmanager
def breaking(
    link: Link,
    signals: Path,
    answer: str,
    methods: Sequence[str | None] = EVERYTHING,
    *,
    over_s: float | None = None,
) -> Iterator[None]:
    """Break storage once each trial's first file and a snapshot are there, and tell the trials.

    Args:
        signals: A directory that the trials see; a file "broken" in it is what they wait for.
        answer: What comes of requests from then on.
        methods: Of these methods; None means any.
        over_s: After so many seconds storage is well again; None means never.
    """
    stop = threading.Event()

    def arrived(regex: str) -> int:
        done = scenarios.uploads(link.proxy.stats(), regex)
        return len({record.path for record in done if record.status == 200})

    def watch() -> None:
        while not stop.wait(0.2):
            if arrived(r"/early_\d\.bin") == TRIALS and arrived("/experiment_state-"):
                for method in methods:
                    link.proxy.add_rule("", answer, method=method)
                (signals / "broken").touch()
                if over_s and not stop.wait(over_s):
                    link.proxy.clear_rules()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        link.proxy.clear_rules()


def _train_past_the_break(config: dict[str, Any]) -> None:
    x, signals = config["x"], Path(config["signals"])
    _write(f"early_{x}.bin")
    while not (signals / "broken").exists():
        tune.report({"step": -1})
        time.sleep(0.3)
    for step in range(STEPS):
        _write(f"late_{x}_{step}.bin")
        tune.report({"step": step})
        time.sleep(0.7)
    (signals / f"ended_{x}").touch()


PAST_THE_BREAK = tune.with_resources(_train_past_the_break, {"CPU": 2})
EARLY = {f"early_{x}.bin" for x in range(TRIALS)}
LATE = {f"late_{x}_{step}.bin" for x in range(TRIALS) for step in range(STEPS)}


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray snapshots the experiment twice a second, so that the driver's syncs fail often, too."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.5")


def fit_past_the_break(
    link: Link, signals: Path, callback: SyncCallback, client: str = "pyarrow", **config: Any
) -> float:
    """Run to the end; returns how many seconds after the training ``fit`` ended.

    With a storage that can't even be read, Ray's ``fit`` itself raises while it collects results.
    """
    space = {**SPACE, "signals": str(signals)}
    try:
        outcome = scenarios.fit(
            link,
            PAST_THE_BREAK,
            by="ours",
            space=space,
            client=client,
            callback=callback,
            sync_config=config,
        )
    except Exception as error:
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not any("ray/tune/analysis" in name for name in files):
            raise
    else:
        assert not outcome.results.errors
        assert [result.metrics["step"] for result in outcome.results] == [STEPS - 1] * TRIALS
    ended = [path.stat().st_mtime for path in signals.glob("ended_*")]
    assert len(ended) == TRIALS, "training went on to its end"
    return time.time() - max(ended)


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize(
    ("client", "answer", "methods", "cause"),
    [
        ("pyarrow", "status:403", WRITES, r"ACCESS_DENIED|AccessDenied"),
        pytest.param(
            "s3fs",
            "status:404:NoSuchBucket",
            EVERYTHING,
            r"NO_SUCH_BUCKET|NoSuchBucket",
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=["403", "NoSuchBucket"],
)
def test_training_goes_on_when_storage_refuses_from_the_middle_on(
    link: Link,
    figure: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    client: str,
    answer: str,
    methods: Sequence[str | None],
    cause: str,
) -> None:
    callback = SyncCallback()
    with breaking(link, tmp_path, answer, methods):
        after_s = fit_past_the_break(link, tmp_path, callback, client)
    report = callback.report
    stored = stored_bytes(link, callback, EARLY | LATE)
    figure(
        f"{answer} from the middle on, {client}",
        written=SIZE * len(EARLY | LATE),
        stored=stored,
        lost=owed(callback, EARLY | LATE),
        more=f"fit ended {after_s:.0f} s after training",
    )
    assert stored == SIZE * len(EARLY)
    # What is owed, by trial and name; the driver's files too.
    for trial_id, trial in report.trials.items():
        assert trial.syncs >= 5, "too few to tell one message per cause from one per sync"
        names = {failure.path for failure in report.failures if failure.trial == trial_id}
        assert names in ({f"late_{x}_{step}.bin" for step in range(STEPS)} for x in range(TRIALS))
    assert owed(callback, LATE) == SIZE * len(LATE)
    assert report.experiment.syncs >= 5
    assert any("experiment_state-" in failure.path for failure in report.experiment.failures)

    ours, others = warnings_of(caplog, cause)
    first, summary = ours
    assert re.search("CreateMultipartUpload|PutObject", first)
    assert re.search(rf"{report.destination}/\S+", first)
    assert "Training goes on" in first
    assert "Not synced:" in summary
    # Ray's, of its last snapshot.
    assert len(others) <= 1


@pytest.mark.usefixtures("snapshots")
@pytest.mark.parametrize(
    "answer", ["hang", pytest.param("status:500", marks=pytest.mark.exhaustive)]
)
def test_a_run_ends_soon_after_training_however_storage_is_broken(
    link: Link,
    figure: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    answer: str,
) -> None:
    callback = SyncCallback()
    with breaking(link, tmp_path, answer, WRITES):
        after_s = fit_past_the_break(link, tmp_path, callback, sync_timeout=8)
    stored = stored_bytes(link, callback, EARLY | LATE)
    figure(
        f"{answer} from the middle on",
        written=SIZE * len(EARLY | LATE),
        stored=stored,
        lost=owed(callback, EARLY | LATE),
        more=f"fit ended {after_s:.0f} s after training, sync_timeout is 8 s",
    )
    assert after_s <= 8 + 15
    assert stored == SIZE * len(EARLY)
    for trial_id in callback.report.trials:
        failures = [f for f in callback.report.failures if f.trial == trial_id]
        names = {failure.path for failure in failures}
        # By name, but for what came after the last sync that ended: then the trial is named.
        late = ({f"late_{x}_{step}.bin" for step in range(STEPS)} for x in range(TRIALS))
        assert any(names - {""} == of_one for of_one in late) or "" in names
        assert {failure.error for failure in failures} <= {"OSError", "TimeoutError"}
    # Killed: they would linger for 30 s by themselves. Ray repeats a cancel every other second.
    deadline = time.monotonic() + 20
    while scenarios.sync_workers():
        assert time.monotonic() < deadline, scenarios.sync_workers()
        time.sleep(0.2)


@pytest.mark.usefixtures("snapshots")
@pytest.mark.exhaustive
def test_all_files_of_a_run_arrive_after_an_outage_of_a_minute(
    link: Link, figure: Callable[..., None], tmp_path: Path
) -> None:
    callback = SyncCallback()
    with breaking(link, tmp_path, "reset", over_s=60):
        after_s = fit_past_the_break(link, tmp_path, callback, sync_timeout=150)
    stored = stored_bytes(link, callback, EARLY | LATE)
    failed = sum(record.action is not None for record in link.proxy.stats().records)
    figure(
        "outage of 60 s in a run",
        written=SIZE * len(EARLY | LATE),
        stored=stored,
        lost=owed(callback, EARLY | LATE),
        more=f"{failed} requests during it; fit ended {after_s:.0f} s after training",
    )
    assert after_s > 40, "training ended after the outage, which so was no test of the flush"
    assert stored == SIZE * len(EARLY | LATE)
    assert not callback.report.failures
    # The bound: a target has one sync at a time, which began before the outage was a minute old
    # and sends a file again at most so often; the client makes several attempts of each.
    files = len(link.s3.keys(prefix_of(callback)))
    assert failed <= files * most_writes(60) * TRIES["obstore"]
