"""What the callback is for, on a real cluster with a real S3 server behind a slow link.

Each run also exists under Ray's own syncing: ``python -m benchmarks.against_ray`` prints the pairs.
"""

from __future__ import annotations

import re
import time

import pytest

from tests.support import scenarios
from tests.support.cluster import LocalCluster
from tests.support.scenarios import MB, Link

pytestmark = pytest.mark.usefixtures("cluster")

RAYS_FILES = {"params.json", "params.pkl", "progress.csv", "result.json"}


def test_both_directories_of_all_trials_arrive_beside_rays_files(
    link: Link, cluster: LocalCluster
) -> None:
    outcome = scenarios.both_directories(link, "ours")
    assert outcome.callback
    assert not outcome.callback.report.failures
    trials = {result.metrics["trial_id"]: result.config["x"] for result in outcome.results}
    assert len(trials) == 3
    for trial_id, x in trials.items():
        names = outcome.names(trial_id)
        for step in range(3):
            for name in (f"cwd_{step}.txt", f"sub/deep_{step}.txt", f"trial_dir_{step}.txt"):
                key = next(k for k in outcome.stored if trial_id in k and k.endswith("/" + name))
                assert link.s3.get(key) == f"{x}:{step}".encode()
            assert names[f"checkpoint_{step:06d}/model.bin"] == 1000
        assert names.keys() >= RAYS_FILES
    assert outcome.results.get_best_result("score", "max").config["x"] == 3
    # The point of it: these trials ran on other nodes than the driver's, and on both of them.
    ran_on = {
        node for trial in outcome.callback.report.trials.values() for node in trial.last_by_node
    }
    assert ran_on == set(cluster.node_ids[:2])


def test_the_last_file_arrives_whole_over_a_slow_link(link: Link) -> None:
    outcome = scenarios.big_last_file(link, "ours")
    assert outcome.names()["last.bin"] == 300 * MB
    assert outcome.callback
    assert not outcome.callback.report.failures


def test_reports_do_not_wait_for_artifacts(link: Link) -> None:
    outcome = scenarios.blocked_reports(link, "ours", steps=3, bandwidth=6 * MB)
    assert sum(outcome.names()[f"artifact_{n}.bin"] for n in range(3)) == 60 * MB
    # One upload takes over three seconds on this link: far less means that none was waited for.
    assert outcome.extra["report_s"] < 1.5


def test_unchanged_files_are_sent_once(link: Link) -> None:
    outcome = scenarios.resend(link, "ours")
    assert outcome.callback
    assert outcome.extra["sent"] <= 1.05 * outcome.extra["changed"]
    assert outcome.uploads(r"/steady_3\.bin") == 1
    # The driver's directory too: what is written once goes once, however many snapshots follow.
    assert outcome.callback.report.experiment.syncs >= 5
    assert outcome.uploads(r"/params\.json") == 1
    assert outcome.uploads(r"/params\.pkl") == 1
    # And its forced snapshots, one per checkpoint, are not lost either.
    assert outcome.uploads(r"/experiment_state-") >= 5


def test_files_of_a_killed_trial_arrive(link: Link) -> None:
    outcome = scenarios.killed_trial(link, "ours")
    assert len(outcome.results.errors) == 1
    names = outcome.names()
    assert {f"file_{n}.txt": names.get(f"file_{n}.txt") for n in range(4)} == {
        f"file_{n}.txt": 100 for n in range(4)
    }
    assert "error.txt" in names


def test_a_hanging_upload_is_killed_and_named(link: Link) -> None:
    # Enough for a new process to start in on a busy machine.
    outcome = scenarios.hanging_upload(link, "ours", timeout_s=10)
    assert not outcome.results.errors
    assert outcome.results[0].metrics["step"] == 3
    names = outcome.names()
    assert names["a.txt"] == names["z.txt"] == 5000
    assert "hang.bin" not in names
    assert outcome.callback
    report = outcome.callback.report
    trial_id = outcome.results[0].metrics["trial_id"]
    assert (trial_id, "hang.bin", "TimeoutError") in {f[:3] for f in report.failures}
    # If the flush had no time left for one more try, it says that as well; nothing else failed.
    assert {(f.trial, f.error) for f in report.failures} == {(trial_id, "TimeoutError")}
    # Killed, though Ray may take some seconds to say so to the last of them.
    deadline = time.monotonic() + 20
    while left := scenarios.sync_workers():
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_the_period_is_kept_by_artifacts_and_by_the_experiments_state(link: Link) -> None:
    outcome = scenarios.period(link, "ours")
    # Four on an idle machine: the first waits for its process to start.
    assert 3 <= outcome.extra["log"] <= 5
    # From the start of the experiment, not of the trial: the first at once, the last forced.
    assert outcome.extra["state"] <= 2 + outcome.wall_s / 3
    assert len(re.findall(rb"line \d+\n", outcome.content("log.txt"))) == 20
