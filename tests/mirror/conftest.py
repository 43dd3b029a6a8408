"""A place for manifests, where otherwise a node's session directory is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_sync_plugin.mirror import tasks


@pytest.fixture(autouse=True)
def _session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "this_node", lambda run: (str(tmp_path / "session"), "node"))
