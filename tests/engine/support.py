"""What the engine's tests share: the short way to a scanned file and to a sync of a directory."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.engine.fakes import Counting
from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.index import Index
from tune_sync_plugin.engine.keeper import Indexing
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Reason, Record, Upload
from tune_sync_plugin.engine.restore import RestoreOptions, restore
from tune_sync_plugin.engine.scan import FileEntry, scan
from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.report import RestoreReport, SyncReport


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


class Disk:
    """A node's disk with one trial's directory on it, synced with an index and restored to.

    ``storage`` counts what the last sync or restore asked for.
    """

    def __init__(self, root: Path, manifest: Path, inner: Storage, node: str = "node-1") -> None:
        self.root, self.manifest, self.inner, self.node = root, manifest, inner, node
        self.storage = Counting(inner)

    def beside(self, node: str) -> Disk:
        """Another node's disk, empty, for the same storage."""
        base = self.root.parent / node
        (base / "trial").mkdir(parents=True)
        return Disk(base / "trial", base / "manifests" / "m.sqlite", self.inner, node)

    def sync(
        self,
        storage: Storage | None = None,
        options: SyncOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
        **indexing: Any,
    ) -> SyncReport:
        """One sync; ``indexing`` are fields of Indexing."""
        self.storage = Counting(storage or self.inner)
        return sync(
            [str(self.root)],
            self.storage,
            str(self.manifest),
            options or SyncOptions(timeout_s=20),
            label="trial_1",
            indexing=Indexing(**{"writer": self.node, "forced": False, **indexing}),
            clock=clock,
        )

    def restore(
        self,
        storage: Storage | None = None,
        clock: Callable[[], float] = time.monotonic,
        roots: Mapping[str, str] = MappingProxyType({}),
        progress: Callable[[int], None] = lambda left: None,
        **options: Any,
    ) -> RestoreReport:
        """One restore; ``options`` are fields of RestoreOptions."""
        self.storage = Counting(storage or self.inner)
        return restore(
            {"": str(self.root), **roots},
            self.storage,
            str(self.manifest),
            RestoreOptions(**{"writer": self.node, "timeout_s": 20, **options}),
            label="trial_1",
            progress=progress,
            clock=clock,
        )

    def settle(self) -> None:
        """Sync until no file has to be compared any more."""
        while self.sync().files_uploaded or any(record.racy for record in self.records().values()):
            pass

    def records(self) -> dict[str, Record]:
        """What the manifest knows."""
        manifest = Manifest(str(self.manifest), self.inner.name)
        found = manifest.load()
        manifest.close()
        return found

    def index(self) -> Index:
        """What storage has of it."""
        found = indexes.read(self.inner)
        assert found
        return found


def forget_library(monkeypatch: pytest.MonkeyPatch, protocol: str, module: str) -> None:
    """Have the library of an fsspec protocol be missing, whichever test has used it before."""
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, protocol, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
