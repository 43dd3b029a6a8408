"""The examples run as a reader runs them, and what they promise is in storage afterwards.

Each one runs in a process of its own; all that is looked at here is files, exit code and output.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import s3_server
from tests.support.notebooks import EXAMPLES, NOTEBOOKS, notebook_of

SUMMARY = re.compile(
    r"synced (\d+) trials?: (\d+) files?, [\d.]+ \w+ uploaded, [\d.]+ \w+ unchanged, (\d+) failed"
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of their own for the examples' Ray; a short path, for its sockets."""
    path = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Jupyter runs a notebook in the directory where it is, and its imports are looked up there.
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES), prepend=os.pathsep)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def trial_dirs(storage: Path) -> dict[str, Path]:
    """The trials of the only run in ``storage``, by learning rate."""
    (run,) = (path for path in storage.iterdir() if path.is_dir())
    assert (run / "tuner.pkl").is_file()
    assert list(run.glob("experiment_state-*.json"))
    trials = [path for path in run.iterdir() if path.is_dir() and path.name != ".tune_sync"]
    return {re.search(r"_lr=([\d.]+)_", path.name)[1]: path for path in trials}  # type: ignore[index]


def artifacts(trial_dir: Path) -> dict[str, bytes]:
    """All that a trial has in storage, but for its checkpoints and Ray's own files."""
    rays_own = re.compile(
        r"checkpoint_\d+/.*|events\.out\.tfevents\..*|params\.(json|pkl)|progress\.csv|result\.json"
        r"|error\.(txt|pkl)|\.tune_sync/.*"
    )
    files = [path for path in trial_dir.rglob("*") if path.is_file()]
    contents = {path.relative_to(trial_dir).as_posix(): path.read_bytes() for path in files}
    return {name: data for name, data in contents.items() if not rays_own.fullmatch(name)}


def number_synced(storage: Path) -> int:
    """Files in storage that the callback brought; the others Ray writes there directly."""
    names = [path.as_posix() for path in storage.rglob("*") if path.is_file()]
    return sum(
        not re.search(
            r"/checkpoint_\d+/|/tuner\.pkl$|/\.validate_storage_marker$|/\.tune_sync/", name
        )
        for name in names
    )


def run_script(name: str, where: Path, *arguments: str) -> str:
    """Run a script in a directory; returns what it printed."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return f"{process.stdout}\n{process.stderr}"


@pytest.mark.slow
def test_quickstart(environment: Path, tmp_path: Path) -> None:
    output = run_script("quickstart.py", tmp_path, "results")
    # stderr has Ray's start-up lines and our one; a warning would be the first thing a user sees.
    assert "tune_sync_plugin" in output
    assert not re.search(r"WARNING tune_sync_plugin|Traceback", output), output

    trials = trial_dirs(tmp_path / "results")
    assert trials.keys() == {"0.1000", "0.2000", "0.4000", "0.8000"}
    for lr, trial_dir in trials.items():
        assert artifacts(trial_dir) == {
            "log.txt": "".join(f"lr {float(lr)}, step {n}\n" for n in (1, 2, 3, 4)).encode(),
            "embeddings.bin": b"\x04" * 300_000,
            "plots/loss.svg": b"<svg><title>Step 4</title></svg>\n",
            "notes.md": b"4 steps done\n",
        }
        assert (trial_dir / "checkpoint_000003" / "model.txt").read_text() == "4\n"
        assert (trial_dir / "result.json").read_bytes().count(b"\n") == 4
        assert trial_dir.name in output
    # Trials ran on both workers, none on the head, and the summary says what the files say.
    assert set(re.findall(r"^lr [\d.]+ on ([\w-]+):", output, re.M)) == {
        "worker-1",
        "worker-2",
    }
    summary = SUMMARY.search(output)
    assert summary, output
    assert summary.groups() == ("4", str(number_synced(tmp_path / "results")), "0")
    assert list(tmp_path.iterdir()) == [tmp_path / "results"]
    for nodes_dir in re.findall(r"/tmp/nodes\w+", output):
        assert not Path(nodes_dir).exists()


def run_notebook(name: str, where: Path) -> str:
    """Execute a notebook in a directory; returns what its cells printed."""
    for module in ("ipykernel", "nbclient", "nbformat"):
        pytest.importorskip(module, reason=f"{module} is missing: pip install -e '.[examples]'")
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / name, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear the outputs"

    # No kernels but the one of this interpreter, whatever is installed for the user.
    kernels = KernelSpecManager(kernel_dirs=[])
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels),
        timeout=300,
        resources={"metadata": {"path": str(where)}},
    )
    client.execute(env=dict(os.environ))
    return "".join(
        output.text for cell in code for output in cell.outputs if output.output_type == "stream"
    )


@pytest.mark.slow
def test_quickstart_notebook(environment: Path, tmp_path: Path) -> None:
    printed = run_notebook("01_quickstart.ipynb", tmp_path)
    trials = trial_dirs(tmp_path / "tune_sync_results")
    assert trials.keys() == {"0.1000", "1", "10"}
    for lr, trial_dir in trials.items():
        # The trial with lr 10 is killed in its third epoch.
        epochs = range(1, 4 if lr == "10" else 6)
        losses = [1 / (1 + float(lr) * epoch) for epoch in epochs]
        stored = artifacts(trial_dir)
        # In particular no cache/, which the notebook excludes.
        assert stored.keys() == {"log.txt", "plots/curve.svg"}
        lines = [
            f"epoch {epoch}: loss {loss:.3f}\n" for epoch, loss in zip(epochs, losses, strict=True)
        ]
        assert stored["log.txt"].decode() == "".join(lines)
        assert stored["plots/curve.svg"].count(b",") == len(lines)
        assert (trial_dir / "error.txt").exists() == (lr == "10")
        reports = len(lines) - (lr == "10")
        assert (trial_dir / "result.json").read_bytes().count(b"\n") == reports
        assert len(list(trial_dir.glob("checkpoint_*/model.txt"))) == reports

    summary = SUMMARY.search(printed)
    assert summary, printed
    assert summary.groups() == ("3", str(number_synced(tmp_path / "tune_sync_results")), "0")
    assert "not synced: []" in printed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_each_notebook_is_its_script(name: str) -> None:
    """So that it is enough to run one. To make them anew: ``python -m tests.support.notebooks``."""
    script = (EXAMPLES / NOTEBOOKS[name]).read_text()
    assert (EXAMPLES / name).read_text() == notebook_of(script)


@pytest.mark.slow
def test_object_storage(environment: Path, tmp_path: Path) -> None:
    if reason := s3_server.available():
        pytest.skip(reason)
    printed = run_notebook("02_object_storage.ipynb", tmp_path)
    assert "mirror s3://results/my-project/mirrored: " in printed
    assert " 0 failed" in printed
    kept = re.findall(
        r"^mirrored/.*lr=([\d.]+)_.*/checkpoint_00000(\d)/weights.bin$", printed, re.M
    )
    assert kept == [("0.1000", "2"), ("0.1000", "3"), ("1.0000", "2"), ("1.0000", "3")]
    logs = re.findall(r"log.txt (\[.*\])", printed)
    assert logs == [str([f"epoch {n}" for n in range(6)])] * 2


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_surviving_failures(environment: Path, tmp_path: Path) -> None:
    printed = run_notebook("03_surviving_failures.ipynb", tmp_path)
    killed = re.search(r"^killed (worker-\d) after epoch (\d)$", printed, re.M)
    assert killed, printed
    node, epoch = killed[1], int(killed[2])
    assert "trials that ended with an error: 0" in printed

    trials = trial_dirs(tmp_path / "tune_sync_results")
    assert trials.keys() == {"0.1000", "0.5000"}
    where = {}
    for lr, trial_dir in trials.items():
        stored = artifacts(trial_dir)
        assert stored.keys() == {"log.txt"} | {f"weights/epoch_{n}.npy" for n in range(1, 11)}
        lines = re.findall(
            r"^epoch +(\d+) on (worker-\d): loss [\d.]+$", stored["log.txt"].decode(), re.M
        )
        # No line is missing, and none is there twice.
        assert [int(number) for number, _ in lines] == list(range(1, 11))
        where[lr] = [name for _, name in lines]
        # Two reports of the epoch that had no checkpoint.
        reported = [json.loads(line) for line in (trial_dir / "result.json").open()]
        epochs = [result["epoch"] for result in reported]
        again = [epoch] if lr == "0.1000" else []
        assert sorted(epochs) == sorted([*range(1, 11), *again])
    # Up to the checkpoint before on the node that died, and from there on on one other.
    before, after = where["0.1000"][: epoch - 1], where["0.1000"][epoch - 1 :]
    assert set(before) == {node}
    assert len(set(after)) == 1
    assert node not in after
    assert node not in where["0.5000"]
    assert f"last line on the dead node's disk: epoch  {epoch} on {node}: " in printed

    assert f"came back: {epoch} files, " in printed  # the log, and the weights of each epoch before
    summary = SUMMARY.search(printed)
    assert summary, printed
    assert summary.groups() == ("2", str(number_synced(tmp_path / "tune_sync_results")), "1")
    lost = re.findall(r"^lost: .*", printed, re.M)
    assert len(lost) == 1
    assert re.search(r"NodeDiedError: node \w{8} is gone; its last complete sync ended", lost[0])


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_real_model(environment: Path, tmp_path: Path) -> None:
    if reason := s3_server.available():
        pytest.skip(reason)
    pytest.importorskip("sklearn", reason="pip install -e '.[examples]'")
    printed = run_notebook("04_real_model.ipynb", tmp_path)

    (home,) = (tmp_path / "tune_sync_results").iterdir()
    figures = {}
    for name in ("ray", "ours"):
        (said,) = re.findall(rf"^{name}: (.*)$", printed, re.M)
        pairs = (part.rsplit(" ", 1) for part in said.split(", "))
        figures[name] = {key: float(value) for key, value in pairs}
        trials = [path.parent for path in (home / name).glob("*/result.json")]
        assert len(trials) == 4
        epochs = [len((trial / "result.json").read_text().splitlines()) for trial in trials]
        assert sum(epochs) == figures[name]["epochs"]
        # ASHA has stopped the weak ones.
        assert min(epochs) < max(epochs) == 9
        # What the chart shows is what is there.
        kinds = ("log.txt", "plots/*.png", "tensorboard/*")
        found = sum(len(list(trial.glob(kind))) for trial in trials for kind in kinds)
        assert found == figures[name]["arrived"]
    for trial, count in zip(trials, epochs, strict=True):  # ours
        log = (trial / "log.txt").read_text()
        assert re.findall(r"^epoch (\d): accuracy", log, re.M) == [
            str(n) for n in range(1, count + 1)
        ]
        assert {path.name for path in trial.glob("plots/*")} == {
            f"confusion_{n}.png" for n in range(1, count + 1)
        }
        for plot in trial.glob("plots/*.png"):
            assert plot.read_bytes().endswith(b"IEND\xaeB`\x82")  # whole
        assert len(list(trial.glob("tensorboard/events.out.tfevents.*"))) == 1
        assert len(list(trial.glob("checkpoint_*/model.pkl"))) == count
    assert figures["ours"]["arrived"] == figures["ours"]["written"]
    assert figures["ours"]["MB per epoch"] < figures["ray"]["MB per epoch"]
    assert figures["ours"]["requests per epoch"] < figures["ray"]["requests per epoch"] / 2
    assert (home / "side_by_side.png").read_bytes().startswith(b"\x89PNG")
    summary = SUMMARY.search(printed)
    assert summary, printed
    assert (summary[1], summary[3]) == ("4", "0")
