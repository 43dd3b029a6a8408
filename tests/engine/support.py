"""What the engine's tests share: the short way to a scanned file and to a sync of a directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.plan import Reason, Upload
from tune_sync_plugin.engine.scan import FileEntry, scan
from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.report import SyncReport


def fill(root: Path, files: dict[str, bytes]) -> Path:
    """Write ``files`` below ``root``."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def entry_of(file: Path) -> FileEntry:
    """What a scan of the file's directory says about it."""
    return scan([str(file.parent)], Filter()).files[file.name]


def uploads_of(root: Path) -> list[Upload]:
    """A plan to upload all of a directory, in the order of the names."""
    found = scan([str(root)], Filter()).files
    return [Upload(found[path], Reason.NEW) for path in sorted(found)]


def put(storage: Storage, file: Path, path: str | None = None, run_id: str = "run") -> None:
    """Store a file as the engine does."""
    with Source(entry_of(file)) as source:
        storage.write(path or file.name, source, run_id)


def sync_dir(
    root: Path, storage: Storage, manifest: Path, roots: Sequence[Path] = (), **options: Any
) -> SyncReport:
    """One sync; ``options`` are those of SyncOptions."""
    where = [str(path) for path in (root, *roots)]
    settings = SyncOptions(**{"timeout_s": 20.0, **options})
    return sync(where, storage, str(manifest), settings, label="trial_1")
