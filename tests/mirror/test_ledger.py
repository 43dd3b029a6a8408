"""The account of what we put into the mirror survives the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tune_sync_plugin.mirror.ledger import Ledger


def test_what_was_begun_and_what_arrived(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), "s3://bucket/exp")
    ledger.begin("t/checkpoint_000000", ["a", "b"])
    ledger.begin("t/checkpoint_000001", ["a"])
    ledger.complete("t/checkpoint_000000")
    again = Ledger(str(tmp_path), "s3://bucket/exp")
    assert again.has("t/checkpoint_000000")
    assert not again.has("t/checkpoint_000001")
    assert again.names() == {"t/checkpoint_000000", "t/checkpoint_000001"}
    assert again.files("t/checkpoint_000000") == ["a", "b"]
    again.incomplete("t/checkpoint_000000")
    again.forget("t/checkpoint_000001")
    assert Ledger(str(tmp_path), "s3://bucket/exp").names() == {"t/checkpoint_000000"}
    assert not Ledger(str(tmp_path), "s3://bucket/exp").has("t/checkpoint_000000")


def test_a_file_that_came_again_differently_is_remembered(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), "m")
    ledger.begin("t/checkpoint_000000", ["a"])
    ledger.begin("t/checkpoint_000000", ["b"])
    assert ledger.files("t/checkpoint_000000") == ["a", "b"]


def test_each_mirror_has_its_own(tmp_path: Path) -> None:
    Ledger(str(tmp_path), "m1").complete("t/checkpoint_000000")
    assert not Ledger(str(tmp_path), "m2").has("t/checkpoint_000000")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"checkpoints": {"a": 1}}', b"\xff"])
def test_a_damaged_one_sends_everything_again(tmp_path: Path, content: bytes) -> None:
    Ledger(str(tmp_path), "m").begin("t/checkpoint_000000", [])
    (path,) = (tmp_path / ".tune_sync").iterdir()
    path.write_bytes(content)
    assert Ledger(str(tmp_path), "m").names() == set()
