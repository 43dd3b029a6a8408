"""``tune-sync status`` and ``doctor``: what they say, and what they exit with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from pyarrow import fs

from tests.engine.support import fill, forget_library
from tests.support.cluster import REPOSITORY, LocalCluster
from tests.support.scenarios import Link
from tests.test_verify import summary, upload
from tune_sync_plugin.cli.doctor import Checked
from tune_sync_plugin.cli.main import main
from tune_sync_plugin.cli.places import Place
from tune_sync_plugin.engine.storage import storage_at
from tune_sync_plugin.report import ExperimentReport, FileFailure, SyncReport
from tune_sync_plugin.runs import RunFacts, claim

STATE = "experiment_state-2026-11-24_10-00-00.json"


def state(*statuses: str) -> bytes:
    """As Ray writes it: JSON in JSON."""
    trials = [
        (json.dumps({"status": status}), json.dumps({"last_result_time": 1_795_600_000 + n}))
        for n, status in enumerate(statuses)
    ]
    return json.dumps({"trial_data": trials, "stats": {}}).encode()


RAYS = {
    "tuner.pkl": b"pickle",
    STATE: state("TERMINATED", "TERMINATED", "ERROR"),
    "experiment_state-2026-11-23_10-00-00.json": b"older",
    "t_1/result.json": b"{}",
    "t_1/checkpoint_000000/model": b"m" * 1000,
    "t_1/checkpoint_000001/model": b"m" * 1000,
    "t_2/params.json": b"{}",
    "notes/x.txt": b"no trial",
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """An experiment of ours that has ended, of one trial."""
    exp = fill(tmp_path / "all" / "exp", {"tuner.pkl": b"p", STATE: state("TERMINATED")})
    storage = storage_at(fs.LocalFileSystem(), str(exp))
    assert claim(storage, RunFacts("r1", "2026-11-24T10:00:00+00:00")) is None
    upload(tmp_path, storage_at(fs.LocalFileSystem(), str(exp / "t_1")), "t_1")
    fill(exp / "t_1", {"result.json": b"{}", "checkpoint_000000/model": b"m"})
    return exp


# -- status ------------------------------------------------------------------------------------


def test_what_ray_alone_wrote(tmp_path: Path, run: Run) -> None:
    exp = fill(tmp_path / "exp", RAYS)
    code, out, err = run("status", exp)
    assert (code, err) == (0, "")
    first, counts, ages, newest = out.splitlines()
    assert first.startswith(f"{exp}: written by Ray alone, not by tune_sync_plugin")
    assert counts == "  2 trials, 8 files, 2.3 KB, 2 checkpoints"
    assert "last result" in ages
    assert "(2026-11-25T" in ages
    assert newest == f"  newest experiment state: {STATE}: 2 TERMINATED, 1 ERROR"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"trial_data": 3}', b'{"trial_data": [["{}", 1]]}'])
def test_a_state_that_can_not_be_read_costs_its_line_alone(
    tmp_path: Path, run: Run, data: bytes
) -> None:
    exp = fill(tmp_path / "exp", {**RAYS, STATE: data})
    code, out, _ = run("status", exp)
    assert code == 0
    assert out.endswith(f"newest experiment state: {STATE}\n")


def test_a_run_that_goes_on_and_ends(exp: Path, run: Run) -> None:
    code, out, _ = run("status", exp)
    assert code == 0
    assert f"{exp}: the run has not ended, or was killed\n" in out
    assert "  1 trial, 7 files, 3.0 MB, 1 checkpoint\n" in out
    assert "ended" not in out.partition("\n")[2]
    log = exp / "t_1" / "log.txt"
    log.write_bytes(log.read_bytes() + b"and more")
    assert run("status", exp)[0] == 0, "the index lags while a run goes on"
    summary(exp, ExperimentReport())
    code, out, _ = run("status", exp)
    assert code == 1, "and may not when it has ended"
    assert "  t_1/log.txt: 508 bytes are stored, the index says 500\n" in out
    log.write_bytes(b"line\n" * 100)
    code, out, _ = run("status", exp)
    assert (code, out.splitlines()[0]) == (0, f"{exp}: complete")
    assert "started " in out
    assert ", ended " in out


def test_what_is_missing_is_named(exp: Path, run: Run) -> None:
    (exp / "t_1" / "big.bin").unlink()
    code, out, _ = run("status", exp)
    assert code == 1
    assert out.splitlines()[0] == f"{exp}: not complete"
    assert "  t_1/big.bin: missing\n" in out
    report = ExperimentReport()
    denied = FileFailure("t1", "a.bin", "PermissionError", "upload of a.bin failed: 403")
    report.add("t1", "node", SyncReport(failures=(denied,)))
    summary(exp, report)
    shutil.rmtree(exp / "t_1" / ".tune_sync")
    code, out, _ = run("status", exp)
    assert code == 1
    assert "  t1: failed, said the run when it ended: a.bin: PermissionError" in out


def test_json_tells_the_same(exp: Path, run: Run) -> None:
    summary(exp, ExperimentReport())
    code, out, err = run("status", "--json", exp)
    assert (code, err) == (0, "")
    (found,) = json.loads(out)["experiments"]
    assert found["written_by"] == "tune_sync_plugin"
    assert found["complete"] is True
    assert found["trial_states"] == {"TERMINATED": 1}
    assert found["last_result"].startswith("2026-11-25T")
    (trial,) = found["trials"]
    assert trial == {
        "name": "t_1",
        "files": 5,
        "bytes": 3_000_507,
        "checkpoints": 1,
        "indexed": True,
    }
    code, out, _ = run("verify", "--json", exp)
    assert (code, json.loads(out)["files"], json.loads(out)["differences"]) == (0, 3, [])


def test_several_experiments_and_a_single_trial(exp: Path, run: Run) -> None:
    fill(exp.parent / "other", RAYS)
    (exp / "t_1" / "log.txt").unlink()
    code, out, _ = run("status", exp.parent)
    assert code == 1
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert heads[0] == "exp: not complete"
    assert heads[1].startswith("other: written by Ray alone")
    assert out.count("missing") == 1
    code, out, _ = run("status", exp / "t_1", "--json")
    (found,) = json.loads(out)["experiments"]
    assert (code, found["files"], found["checkpoints"]) == (1, 4, 1)


def test_on_s3(link: Link, exp: Path, run: Run) -> None:
    summary(exp, ExperimentReport())
    prefix = link.prefix()
    files = {p.relative_to(exp).as_posix(): p.read_bytes() for p in exp.rglob("*") if p.is_file()}
    link.s3.add(f"{prefix}/exp", files)
    url = link.s3.uri(f"{prefix}/exp", port=link.proxy.port)
    code, out, err = run("status", url)
    assert (code, err) == (0, "")
    assert out.startswith(f"s3://{link.s3.bucket}/{prefix}/exp: complete\n")
    assert link.s3.secret_key not in out
    assert link.proxy.stats().select("GET", "big.bin").requests == 0, "no content is read"
    code, out, err = run("status", link.s3.uri(f"{prefix}/none", port=link.proxy.port))
    assert (code, out) == (2, "")
    assert "there is nothing in" in err
    link.proxy.add_rule("list-type|prefix", "status:403")
    for command in ("status", "pull"):
        code, out, err = run(command, url)
        assert (code, out) == (2, "")
        assert "Give this node credentials" in err
        assert len(err.splitlines()) == 1
        assert link.s3.secret_key not in err


def test_options_come_from_the_environment(link: Link, tmp_path: Path, exp: Path) -> None:
    prefix = link.prefix()
    link.s3.add(f"{prefix}/exp", {"tuner.pkl": b"p"})
    url = f"s3://{link.s3.bucket}/{prefix}/exp"
    given = {"FSSPEC_S3": json.dumps(link.s3.options(link.proxy.port))}
    command = [sys.executable, "-m", "tune_sync_plugin", "status", "--json"]
    # A query says it all, whatever the environment has.
    for each in (url, link.s3.uri(f"{prefix}/exp", port=link.proxy.port)):
        done = subprocess.run(
            [*command, each],
            env={**os.environ, **given, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["url"] == url
        assert json.loads(done.stdout)["experiments"][0]["files"] == 1
        assert done.stderr == ""
    assert link.s3.secret_key not in repr(Place(url, link.s3.options()))


# -- arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "verify", "pull", "doctor"])
def test_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert f"  tune-sync {command} s3://bucket/results" in said
    assert "exit codes:" in said
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code == 2


def test_status_and_pull_need_no_ray(exp: Path) -> None:
    script = """
import sys
sys.modules["ray"] = None
from tune_sync_plugin.cli.main import main
codes = [main(["status", sys.argv[1]]), main(["pull", sys.argv[1], sys.argv[2]])]
codes += [main(["doctor", sys.argv[1]])]
sys.exit(max(codes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(exp), str(exp.parent / "out")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- doctor ------------------------------------------------------------------------------------


def test_this_machine(tmp_path: Path, run: Run) -> None:
    assert run("doctor", tmp_path) == (0, "this machine: ok\n", "")
    assert not list(tmp_path.iterdir())
    code, out, err = run("doctor", tmp_path / "none")
    assert (code, err) == (1, "")
    assert f"there is no directory {tmp_path}/none. Create it" in out
    assert not (tmp_path / "none").exists()


def test_a_bucket_that_can_not_be_written_to(link: Link, run: Run) -> None:
    prefix = link.prefix()
    url = link.s3.uri(prefix, port=link.proxy.port)
    assert run("doctor", url)[:2] == (0, "this machine: ok\n")
    link.proxy.add_rule(f"{prefix}/", "status:403", method="PUT")
    code, out, err = run("doctor", url, "--json")
    assert (code, err) == (1, "")
    (node,) = json.loads(out)["nodes"]
    assert node["node"] == "this machine"
    assert "writing to it failed: " in node["error"]
    assert "Give this node credentials that may write" in node["error"]
    assert link.s3.secret_key not in out


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    forget_library(monkeypatch, "sftp", "sshfs")
    code, out, _ = run("doctor", "sftp://me:hidden@127.0.0.1:1/x")
    assert code == 1
    assert "pip install sshfs" in out
    assert "hidden" not in out


def test_every_node_of_a_cluster(cluster: LocalCluster, storage: Path, run: Run) -> None:
    code, out, _ = run("doctor", storage, "--address", cluster.address)
    assert code == 0
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert sorted(out.splitlines()) == sorted(f"node {n[:8]} (127.0.0.1): ok" for n in nodes)
    storage.chmod(0o500)
    try:
        code, out, err = run("doctor", storage / "none", "--address", cluster.address, "--json")
    finally:
        storage.chmod(0o700)
    assert (code, err) == (1, "")
    found = json.loads(out)["nodes"]
    assert {each["node"] for each in found} == set(nodes)
    assert all("there is no directory" in each["error"] for each in found)


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune_sync_plugin", "doctor", str(tmp_path)]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:1"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no Ray cluster at 127.0.0.1:1: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_clock_that_is_off_is_something_to_do() -> None:
    behind = Checked("1a2b3c4d5e", "10.0.0.1", ahead_s=-60.0)
    assert str(behind).startswith(
        "node 1a2b3c4d (10.0.0.1): its clock is 60 s or more behind this machine's."
    )
    assert not behind.is_well
    assert Checked("1a2b").is_well
