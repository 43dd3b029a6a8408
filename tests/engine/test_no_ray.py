"""The engine runs where Ray is not installed: nothing in it may come to need Ray."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.engine.support import fill
from tune_sync_plugin import engine

SCRIPT = """
import importlib, pathlib, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NoRay())
for module in sorted(pathlib.Path(sys.argv[1], "engine").glob("*.py")):
    importlib.import_module(f"tune_sync_plugin.engine.{module.stem}".removesuffix(".__init__"))

from pyarrow.fs import LocalFileSystem
from tune_sync_plugin.engine.storage import storage_at
from tune_sync_plugin.engine.sync import sync

root, storage, manifest = sys.argv[2:]
report = sync([root], storage_at(LocalFileSystem(), storage), manifest)
assert report.complete, report
assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
print(report.files_uploaded)
"""


def test_imports_and_syncs_without_ray(root: Path, tmp_path: Path, manifest: Path) -> None:
    fill(root, {"a": b"1", "d/b": b"2"})
    package = Path(engine.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, package, root, tmp_path / "storage", manifest],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("2\n", 0), done.stderr
    assert (tmp_path / "storage" / "d" / "b").read_bytes() == b"2"
