"""``tune-sync pull``: what is fetched, what is not fetched twice, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.support import fill
from tests.support.cluster import REPOSITORY
from tests.support.scenarios import Link
from tests.support.terminal import on_a_terminal
from tune_sync_plugin.cli.best import best_trial
from tune_sync_plugin.cli.main import main
from tune_sync_plugin.cli.pull import pull
from tune_sync_plugin.engine.checksum import checksum_of, has_etag
from tune_sync_plugin.engine.index import INDEX
from tune_sync_plugin.engine.local_storage import LocalStorage

FILES = {
    "tuner.pkl": b"pickle",
    "experiment_state-2026-11-24_10-00-00.json": b"{}",
    ".tune_sync/summary.json": b"{}",
    "t_1/result.json": b'{"loss": 1.0, "a": {"b": 5}}\n{"loss": 0.5}\n{"done": true}\n',
    "t_1/log.txt": b"line\n" * 100,
    f"t_1/{INDEX}": b"ours",
    "t_1/checkpoint_000000/model #1.bin": b"m" * 200_000,
    "t_2/result.json": b'{"loss": 0.1}\n{"loss": NaN}\n',
    "t_2/plots/a.png": b"\x89PNG",
    "t_3/result.json": b'{"loss": 0.75, "a": {"b": 7}}\n{"los',
    "t_4/result.json": b'{"other": 1}\n',
}
THEIRS = {path: data for path, data in FILES.items() if ".tune_sync" not in path}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def part(start: str) -> dict[str, bytes]:
    return {path: data for path, data in THEIRS.items() if path.startswith(start)}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["pull", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def exp(tmp_path: Path) -> Path:
    return fill(tmp_path / "exp", FILES)


# -- what is chosen ----------------------------------------------------------------------------


def test_an_experiment_comes_whole_without_our_own_files(exp: Path, run: Run) -> None:
    code, out, err = run(exp)
    assert (code, err) == (0, "")
    assert out == f"exp: {len(THEIRS)} files fetched (200.6 KB), 0 were there (0 B), 0 failed\n"
    assert contents(Path("exp")) == THEIRS
    assert run(exp / "t_1", "trial")[0] == 0
    assert contents(Path("trial")) == {p[4:]: data for p, data in part("t_1/").items()}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--trial", "t_[12]"], {**part("t_1/"), **part("t_2/")}),
        (["--include", "**/*.png", "--include", "*.pkl"], {**part("t_2/plots"), **part("tuner")}),
        (["--trial", "t_1", "--include", "**/checkpoint_*"], part("t_1/checkpoint")),
        (["--best", "loss", "--mode", "min"], part("t_1/")),
        (["--best", "loss", "--mode", "max"], part("t_3/")),
        (["--best", "a/b", "--mode", "max"], part("t_3/")),
        (["--best", "a/b", "--mode", "max", "--trial", "t_1"], part("t_1/")),
    ],
)
def test_parts(exp: Path, run: Run, arguments: list[str], wanted: dict[str, bytes]) -> None:
    assert run(exp, "out", *arguments)[0] == 0
    assert contents(Path("out")) == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trial", "zz*"], "no trial's directory matches 'zz*'; there are t_1, t_2"),
        (["--best", "acc", "--mode", "max"], "none of 4 trials"),
        (["--best", "loss"], "--best METRIC and --mode min|max go together"),
        (["--mode", "min"], "--best METRIC and --mode min|max go together"),
        (["--include", "../x"], "'../x' must be relative"),
        (["--include", "none.txt"], "nothing to pull"),
    ],
)
def test_what_can_not_be_chosen(exp: Path, run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run(exp, "out", *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not Path("out").exists()


def test_json_is_all_there_is_on_stdout(exp: Path, run: Run) -> None:
    code, out, err = run(exp, "out", "--json", "--best", "loss", "--mode", "min")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["best"] == {"trial": "t_1", "metric": "loss", "value": 0.5}
    assert (said["fetched"], said["kept"], said["failures"]) == (3, 0, [])
    code, out, err = run("/nowhere/at/all", "--json")
    assert code == json.loads(out)["exit_code"] == 2
    assert "there is no directory /nowhere/at/all" in json.loads(out)["error"]
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("value", ["NaN", "-Infinity", '"nan"', "true", "1" + "0" * 400])
def test_what_is_no_number_is_never_the_best(tmp_path: Path, value: str) -> None:
    names = [f"t_{n}" for n in range(6)]
    for name in names:
        loss = "0.5" if name == "t_3" else value
        fill(tmp_path / name, {"result.json": f'{{"loss": 0}}\n{{"loss": {loss}}}\n'.encode()})
    for mode in ("min", "max"):
        assert best_trial(LocalStorage(str(tmp_path)), names, "loss", mode) == ("t_3", 0.5)


# -- what is there already, and what must not be touched ---------------------------------------


def test_what_is_there_is_kept_and_what_differs_is_replaced(exp: Path, run: Run) -> None:
    assert run(exp, "out")[0] == 0
    before = {path: os.stat(f"out/{path}") for path in THEIRS}
    Path("out/t_1/log.txt").write_bytes(b"LINE\n" * 100)
    Path("out/mine.txt").write_bytes(b"mine")
    code, out, _ = run(exp, "out")
    assert (code, out) == (0, "out: 1 file fetched (500 B), 8 were there (200.1 KB), 0 failed\n")
    assert contents(Path("out")) == {**THEIRS, "mine.txt": b"mine"}
    kept = [path for path in THEIRS if os.stat(f"out/{path}").st_ino == before[path].st_ino]
    assert len(kept) == len(THEIRS) - 1


def test_paths_that_leave_the_directory_are_refused(exp: Path, run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Path("out").mkdir()
    Path("out/t_1").symlink_to(outside)
    code, out, _ = run(exp, "out")
    assert code == 1
    assert "t_1/log.txt: refused: it would be written outside of out" in out
    assert not list(outside.iterdir())
    assert contents(Path("out")) == {p: data for p, data in THEIRS.items() if "t_1" not in p}
    wanted = {"../x": 1, "/etc/x": 1, "a/../../x": 1, "a//x": 1}
    done = pull(LocalStorage(str(exp)), wanted, "other")
    assert [each.path for each in done.failures] == sorted(wanted)
    assert all("refused" in each.problem for each in done.failures)


def test_pulling_into_the_source_is_refused(exp: Path, run: Run) -> None:
    os.chdir(exp.parent)
    for destination in ([], [exp / "copy"]):
        code, _, err = run("exp", *destination)
        assert code == 2
        assert "give another DEST" in err
    assert contents(exp) == FILES


def test_only_one_at_a_time(exp: Path, run: Run) -> None:
    Path("out").mkdir()
    lock = os.open("out", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = run(exp, "out")
    finally:
        os.close(lock)
    assert code == 2
    assert "another pull to out is under way" in err
    assert run(exp, "out")[0] == 0


def test_a_disk_that_can_not_be_written_to_is_named(exp: Path, run: Run) -> None:
    fill(Path("out"), {"t_1": b"a file in the way"})
    code, out, _ = run(exp, "out")
    assert code == 1
    assert "t_1/log.txt: writing out/t_1/log.txt: " in out
    assert "3 failed; pull again" in out
    assert Path("out/t_2/plots/a.png").exists()


# -- over S3 -----------------------------------------------------------------------------------


@pytest.fixture
def url(link: Link) -> str:
    prefix = link.prefix()
    link.s3.add(f"{prefix}/exp", FILES)
    link.proxy.reset_stats()
    return link.s3.uri(f"{prefix}/exp", port=link.proxy.port)


def fetched(link: Link) -> int:
    return link.proxy.stats().select("GET", "^[^?]*/exp/").requests


def test_nothing_is_fetched_twice_from_s3(link: Link, url: str, run: Run) -> None:
    code, _, err = run(url)
    assert (code, err) == (0, "")
    assert contents(Path("exp")) == THEIRS
    assert fetched(link) == len(THEIRS), "a request a file"
    link.proxy.reset_stats()
    assert run(url)[1].startswith(f"exp: 0 files fetched (0 B), {len(THEIRS)} were there")
    assert fetched(link) == 0
    assert link.proxy.stats().select("HEAD", "/exp/").requests >= len(THEIRS)
    Path("exp/t_1/log.txt").write_bytes(b"LINE\n" * 100)
    Path("exp/t_2/plots/a.png").unlink()
    link.proxy.reset_stats()
    assert run(url)[1].startswith("exp: 2 files fetched")
    assert fetched(link) == 2
    assert contents(Path("exp")) == THEIRS


def test_large_objects_are_told_by_the_etags_of_their_parts(link: Link, run: Run) -> None:
    prefix = link.prefix()
    data = b"0123456789abcdef" * (12 << 16)
    with link.s3.arrow_fs().open_output_stream(f"{link.s3.bucket}/{prefix}/exp/big") as out:
        out.write(data)  # as Ray does: parts of 10 MB
    url = link.s3.uri(f"{prefix}/exp", port=link.proxy.port)
    assert run(url)[0] == 0
    assert Path("exp/big").read_bytes() == data
    link.proxy.reset_stats()
    assert run(url)[1].startswith("exp: 0 files fetched")
    assert fetched(link) == 0


def test_what_failed_is_named_and_the_next_pull_goes_on(link: Link, url: str, run: Run) -> None:
    link.proxy.add_rule("model", "status:403", method="GET")
    code, out, _ = run(url)
    assert code == 1
    assert out.startswith("t_1/checkpoint_000000/model #1.bin: ")
    assert "403" in out
    assert "writing" not in out, "it is not this disk's fault"
    assert out.splitlines()[-1].endswith("1 failed; pull again, and it goes on from here")
    assert "model" not in str(contents(Path("exp"))), "nor a part of it"
    link.proxy.clear_rules()
    link.proxy.reset_stats()
    assert run(url)[1].startswith("exp: 1 file fetched (200.0 KB), 8 were there")
    assert fetched(link) == 1
    assert contents(Path("exp")) == THEIRS


def test_a_killed_pull_leaves_no_half_file_and_is_gone_on_with(
    link: Link, tmp_path: Path, run: Run
) -> None:
    prefix = link.prefix()
    files = {f"t_1/{n}": bytes([n]) * 1_000_000 for n in range(8)}
    link.s3.add(f"{prefix}/exp", files)
    url = link.s3.uri(f"{prefix}/exp", port=link.proxy.port)
    link.proxy.add_rule("/exp/t_1/[0-3]$", "hang", method="GET")
    command = [sys.executable, "-m", "tune_sync_plugin", "pull", url, "out"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    try:
        end = time.monotonic() + 30
        while not all(Path(f"out/t_1/{n}").exists() for n in range(4, 8)):
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    whole = {p: d for p, d in contents(Path("out")).items() if not p.endswith(".part")}
    assert whole == {p: data for p, data in files.items() if p > "t_1/3"}
    link.proxy.clear_rules()
    link.proxy.reset_stats()
    assert run(url, "out")[1].startswith("out: 4 files fetched (4.0 MB), 4 were there")
    assert fetched(link) == 4
    assert contents(Path("out")) == files, "nothing half-written is left"


def test_a_bar_is_shown_to_a_terminal_alone(exp: Path, run: Run) -> None:
    assert run(exp, "out")[2] == ""
    command = [sys.executable, "-m", "tune_sync_plugin", "pull", str(exp), "other"]
    for more, shown in (([], True), (["--json"], False)):
        said, done = on_a_terminal([*command, *more], stdout=subprocess.PIPE)
        assert ("100%" in said) is shown
        assert b"%" not in done.stdout


@pytest.mark.parametrize(("size_mb", "part_mb"), [(12, 10), (12, 8), (20, 5), (20, 16), (3, 1000)])
def test_etags_of_other_clients_can_be_compared_with(size_mb: int, part_mb: int) -> None:
    data = os.urandom(1 << 20) * size_mb
    made, slash, _ = checksum_of([data], f"/{part_mb << 20}").partition("/")
    assert bool(slash) is (size_mb > part_mb)
    assert has_etag(lambda: [data], len(data), made) is True
    assert has_etag(lambda: [data[1:] + b"x"], len(data), made) is False
    assert has_etag(lambda: [data], len(data), '"not-an-md5"') is None
    assert has_etag(lambda: [data], len(data), "0" * 32 + "-17") is None
