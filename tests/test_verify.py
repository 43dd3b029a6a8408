"""``python -m tune_sync_plugin verify``: what it compares, names and exits with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import fs

from tests.engine.support import fill
from tests.support.cluster import REPOSITORY
from tests.support.scenarios import Link
from tune_sync_plugin.cli.main import main
from tune_sync_plugin.engine.index import INDEX
from tune_sync_plugin.engine.keeper import Indexing
from tune_sync_plugin.engine.storage import Storage, storage_at
from tune_sync_plugin.engine.sync import sync
from tune_sync_plugin.report import (
    ExperimentReport,
    FileFailure,
    SyncReport,
)
from tune_sync_plugin.runs import RunFacts, close, summarize

FILES = {"log.txt": b"line\n" * 100, "sub/plot #1.png": b"\x89PNG", "big.bin": b"b" * 3_000_000}


def upload(tmp_path: Path, storage: Storage, trial: str) -> None:
    source = fill(tmp_path / trial, FILES)
    report = sync([str(source)], storage, str(tmp_path / f"{trial}.sqlite"), indexing=Indexing())
    assert report.complete


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    """A stored experiment of two trials, and files of Ray's beside theirs."""
    exp = tmp_path / "exp"
    for trial in ("trial_1", "trial_2"):
        where = storage_at(fs.LocalFileSystem(), str(exp / trial))
        upload(tmp_path, where, trial)
        fill(exp / trial, {"result.json": b"{}", "checkpoint_000001/model": b"m"})
    summary(exp, ExperimentReport())
    return exp


def summary(exp: Path, report: ExperimentReport) -> None:
    facts = RunFacts("r1", "2026-11-24T10:00:00+00:00")
    storage = storage_at(fs.LocalFileSystem(), str(exp))
    assert close(storage, facts, summarize(report, facts)) is None


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["verify", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_all_there(exp: Path, run: Run) -> None:
    code, out, err = run(str(exp))
    assert (code, out, err) == (0, "2 trials, 6 files, 6.0 MB: all there\n", "")
    assert run(f"file://{exp}")[0] == 0
    assert run(str(exp / "trial_1"))[1].startswith("1 trial, 3 files, 3.0 MB: all there")
    assert run(str(exp.parent))[0] == 0, "a directory above experiments is fine too"


def test_as_a_process(exp: Path) -> None:
    (exp / "trial_1" / "log.txt").unlink()
    command = [sys.executable, "-m", "tune_sync_plugin", "verify", str(exp)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done
    assert done.stdout == "trial_1/log.txt: missing\n2 trials, 6 files, 6.0 MB: 1 difference\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b"short"), "5 bytes are stored, the index says 500"),
        (lambda path: path.write_bytes(b"LINE\n" * 100), "its content is not what was uploaded"),
    ],
)
def test_differences_are_named(
    exp: Path, run: Run, damage: Callable[[Path], None], said: str
) -> None:
    damage(exp / "trial_2" / "log.txt")
    code, out, _ = run(str(exp))
    assert code == 1
    first, last = out.splitlines()
    assert first.startswith("trial_2/log.txt: ")
    assert said in first
    assert last.endswith(": 1 difference")
    if "content" in said:
        assert run("--sizes-only", str(exp))[0] == 0


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"version": 1}\n'])
def test_a_damaged_index_is_a_difference(exp: Path, run: Run, data: bytes) -> None:
    (exp / "trial_1" / INDEX).write_bytes(data)
    code, out, _ = run(str(exp))
    assert code == 1
    assert f"trial_1/{INDEX}: the index is damaged" in out


def test_what_the_run_itself_missed_is_a_difference(exp: Path, run: Run) -> None:
    report = ExperimentReport()
    denied = FileFailure("t1", "a.bin", "PermissionError", "upload of a.bin failed: 403")
    report.add("t1", "node", SyncReport(failures=(denied,)))
    dead = FileFailure("t2", "", "NodeDiedError", "node 1a2b is gone")
    report.add("t2", "node", SyncReport(failures=(dead,)))
    report.not_attached["t3"] = "No module named 'tune_sync_plugin'"
    summary(exp, report)
    code, out, _ = run(str(exp))
    assert code == 1
    lines = out.splitlines()
    assert lines[0].startswith("t1: failed, said the run when it ended: a.bin: PermissionError")
    assert lines[1].startswith("t2: lost, said the run when it ended: all: NodeDiedError")
    assert lines[2].startswith("t3: was left to Ray's own sync: No module")
    stored = json.loads((exp / ".tune_sync" / "summary.json").read_text())
    assert stored["complete"] is False


def test_a_run_that_has_not_ended_is_said(exp: Path, run: Run) -> None:
    (exp / ".tune_sync" / "summary.json").unlink()
    code, out, _ = run(str(exp))
    assert code == 0
    assert out.endswith("all there; the run has not ended, or was killed\n")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("/nowhere/at/all", "there is no directory /nowhere/at/all"),
        ("nothing://here", "Protocol not known: nothing"),
        ("s3://", "S3"),
    ],
)
def test_what_cannot_be_checked(run: Run, url: str, said: str) -> None:
    code, out, err = run(url)
    assert (code, out) == (2, "")
    assert said.lower() in err.lower()
    assert len(err.splitlines()) == 1


def test_a_directory_without_an_index_cannot_be_checked(exp: Path, run: Run) -> None:
    for trial in ("trial_1", "trial_2"):
        shutil.rmtree(exp / trial / ".tune_sync")
    code, _, err = run(str(exp))
    assert code == 2
    assert "there is no index" in err


def test_no_arguments_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_on_s3_by_etags(tmp_path: Path, link: Link, run: Run) -> None:
    prefix = link.prefix()
    uri = link.s3.uri(prefix, port=link.proxy.port)
    filesystem, path = fs.FileSystem.from_uri(uri)
    upload(tmp_path, storage_at(filesystem, f"{path}/trial_1"), "trial_1")
    link.proxy.reset_stats()
    code, out, _ = run(uri)
    assert (code, out.split(":")[0]) == (0, "1 trial, 3 files, 3.0 MB")
    stats = link.proxy.stats()
    assert stats.select("HEAD", "trial_1/(log|sub|big)").requests == 3
    assert stats.select("GET", "trial_1/(log|sub|big)").requests == 0, "nothing is downloaded"
    with filesystem.open_output_stream(f"{path}/trial_1/log.txt") as out_stream:
        out_stream.write(b"LINE\n" * 100)
    code, out, _ = run(uri)
    assert code == 1
    assert out.startswith("trial_1/log.txt: its content is not what was uploaded")


def test_a_refusal_can_be_told_from_a_difference(tmp_path: Path, link: Link, run: Run) -> None:
    prefix = link.prefix()
    uri = link.s3.uri(prefix, port=link.proxy.port)
    link.proxy.add_rule("list-type|prefix", "status:403")
    code, out, err = run(uri)
    assert (code, out) == (2, "")
    assert "403" in err or "ACCESS_DENIED" in err
    user, _, secret = uri.partition("://")[2].partition("@")[0].partition(":")
    assert secret not in err
    assert user
