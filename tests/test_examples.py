"""The examples run as a reader runs them, and what they promise is in storage afterwards.

Each one runs in a process of its own; all that is looked at here is files, exit code and output.
"""

from __future__ import annotations

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

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SUMMARY = re.compile(
    r"synced (\d+) trials: (\d+) files, [\d.]+ \w+ uploaded, [\d.]+ \w+ unchanged, (\d+) failed"
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of their own for the examples' Ray; a short path, for its sockets."""
    path = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(path))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
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


def test_quickstart(environment: Path, tmp_path: Path) -> None:
    script = EXAMPLES / "quickstart.py"
    process = subprocess.run(
        [sys.executable, script, "results"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    output = f"{process.stdout}\n{process.stderr}"
    assert process.returncode == 0, output
    # stderr has Ray's start-up lines and our one; a warning would be the first thing a user sees.
    assert "tune_sync_plugin" in process.stderr
    assert not re.search(r"WARNING tune_sync_plugin|Traceback", process.stderr), output

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
        assert trial_dir.name in process.stdout
    # Trials ran on both workers, none on the head, and the summary says what the files say.
    assert set(re.findall(r"^lr [\d.]+ on ([\w-]+):", process.stdout, re.M)) == {
        "worker-1",
        "worker-2",
    }
    summary = SUMMARY.search(process.stdout)
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
        timeout=120,
        resources={"metadata": {"path": str(where)}},
    )
    client.execute(env=dict(os.environ))
    return "".join(
        output.text for cell in code for output in cell.outputs if output.output_type == "stream"
    )


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


def test_object_storage_notebook(environment: Path, tmp_path: Path) -> None:
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
