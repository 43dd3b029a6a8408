"""Fixtures of the engine's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty trial directory."""
    path = tmp_path / "trial"
    path.mkdir()
    return path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Where a manifest can be made."""
    return tmp_path / "manifests" / "m.sqlite"
