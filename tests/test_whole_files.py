"""The experiment's state in storage, while Ray rewrites it in place."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path

from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.sync import SyncOptions, sync
from tune_sync_plugin.whole_files import copy_files


def test_no_reader_ever_sees_half_a_state(tmp_path: Path) -> None:
    staging, copies, storage = (tmp_path / name for name in ("staging", "copies", "storage"))
    staging.mkdir()
    synced = threading.Event()
    versions = itertools.count(1)

    def write() -> None:
        """As Ray's ``save_to_dir``, each time of another length; then our syncer is called."""
        with open(staging / "experiment_state.json", "w") as out:
            json.dump([next(versions)] * 20_000, out)
        copy_files(str(staging), str(copies))

    def write_on() -> None:
        while not synced.is_set():
            write()

    write()
    writer = threading.Thread(target=write_on)
    writer.start()
    seen = set()
    try:
        for _ in range(100):
            report = sync(
                [str(copies), str(staging)],
                LocalStorage(str(storage)),
                str(tmp_path / "manifest"),
                SyncOptions(overlaid=True),
            )
            assert not report.failures
            numbers = json.loads((storage / "experiment_state.json").read_text())
            assert len(numbers) == 20_000
            seen |= set(numbers)
    finally:
        synced.set()
        writer.join()
    assert len(seen) > 20, "nothing was written meanwhile, so this proves nothing"
    assert os.listdir(storage) == ["experiment_state.json"]
