"""Random histories of a trial that moves between nodes: nothing that was stored is ever lost.

What is expected is a model of lineages: each version of a file knows the one it was made from, so
that a version may only vanish from storage if one made from it has taken its place.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.engine.fakes import Around, Killing, ObjectStorage, tree
from tests.engine.support import Disk, fill
from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine import sync as sync_module
from tune_sync_plugin.engine.index import is_ours
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.storage import Storage, is_partial
from tune_sync_plugin.engine.sync import SyncOptions

NODES = ("A", "B", "C")
PATHS = st.sampled_from(["log", "d/model", "state"])


class Refusing(Around):
    """Hands nothing out, as storage does in an outage."""

    def read(self, path: str) -> object:  # type: ignore[override]
        raise PermissionError(13, "as in an outage")


class Moves(RuleBasedStateMachine):
    """One trial, three nodes, one storage. Contents are numbered: none is like another."""

    def __init__(self) -> None:
        super().__init__()
        shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.base = Path(tempfile.mkdtemp(prefix="tune_sync_moves-", dir=shm))
        self.disks = {}
        for node in NODES:
            (self.base / node / "trial").mkdir(parents=True)
            self.disks[node] = Disk(
                self.base / node / "trial",
                self.base / node / "manifests" / "m.sqlite",
                self.storage(),
                node,
            )
        self.at = "A"
        self.visited = {"A"}
        self.count = 0
        # A version's content -> that of the version it was made from.
        self.made_from: dict[bytes, bytes | None] = {}
        self.sent: set[bytes] = set()

    def storage(self) -> Storage:
        return LocalStorage(str(self.base / "storage"))

    def stored(self) -> dict[str, bytes]:
        found = tree(self.base / "storage").items()
        return {path: c for path, c in found if not is_ours(path) and not is_partial(path)}

    def teardown(self) -> None:
        shutil.rmtree(self.base)

    @property
    def disk(self) -> Disk:
        return self.disks[self.at]

    # -- what happens ----------------------------------------------------------------------------

    @rule(path=PATHS, longer=st.booleans())
    def write(self, path: str, longer: bool) -> None:
        """A new version, made from what is here."""
        file = self.disk.root / path
        before = file.read_bytes() if file.exists() else None
        self.count += 1
        content = b"%06d" % self.count + b"+" * (self.count if longer else 0)
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        self.made_from[content] = before

    @rule(forced=st.booleans())
    def sync(self, forced: bool) -> None:
        report = self.disk.sync(forced=forced, shared=len(self.visited) > 1)
        assert report.complete, report.failures
        stored = self.stored()
        for path, content in tree(self.disk.root).items():
            assert stored[path] == content, "the newest of each path"
        self.check()

    @rule(countdown=st.integers(1, 20))
    def sync_is_killed(self, countdown: int) -> None:
        child = os.fork()
        if child == 0:
            try:
                killing = Killing(self.disk.inner, countdown)
                sync_module._RECORD_EVERY_S = 0.0
                for method in ("withdraw", "record", "meet", "index_written"):
                    setattr(Manifest, method, killing.wrap(getattr(Manifest, method)))
                options = SyncOptions(concurrency=1, timeout_s=20)
                self.disk.sync(killing, options, shared=len(self.visited) > 1)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        self.check()

    @precondition(lambda self: self.sent)
    @rule(node=st.sampled_from(NODES))
    def move(self, node: str) -> None:
        """The trial starts again; a driver that was started anew does not know where it was."""
        self.at = node
        self.visited.add(node)
        report = self.disk.restore()
        # A cut-off upload may have been noted and never have arrived.
        assert {f.error for f in report.failures} <= {"NotStoredError"}, report.failures
        index = indexes.read(self.disk.inner)
        missing = set(index.entries) - set(tree(self.disk.root)) if index else set()
        assert missing == {failure.path for failure in report.failures}

    @precondition(lambda self: self.sent)
    @rule(node=st.sampled_from(NODES))
    def move_while_nothing_can_be_read(self, node: str) -> None:
        self.at = node
        self.visited.add(node)
        assert self.disk.restore(Refusing(self.disk.inner)).failures

    @rule()
    def driver_restarts(self) -> None:
        """And has forgotten on which nodes the trial was."""
        self.visited = {self.at}

    # -- what must hold --------------------------------------------------------------------------

    def check(self) -> None:
        stored = self.stored()
        alive = set(stored.values())
        assert alive <= self.made_from.keys()
        self.sent |= alive
        superseded: set[bytes] = set()
        for content in alive:
            older = self.made_from[content]
            while older is not None:
                superseded.add(older)
                older = self.made_from[older]
        lost = self.sent - alive - superseded
        assert not lost, f"{sorted(lost)} of {stored}"


class MovesOnObjects(Moves):
    """The same where storage has checksums of its own."""

    def storage(self) -> Storage:
        return ObjectStorage(self.base / "storage")

    def stored(self) -> dict[str, bytes]:
        contents = ObjectStorage(self.base / "storage").contents()
        return {path: content for path, content in contents.items() if not is_ours(path)}


@pytest.mark.parametrize("objects", [False, True])
def test_a_disk_that_was_left_writes_on(tmp_path: Path, objects: bool) -> None:
    """A second process of the trial, a logger that is late: both versions are kept."""
    store = ObjectStorage(tmp_path / "o") if objects else LocalStorage(str(tmp_path / "s"))
    one = Disk(fill(tmp_path / "one", {"log": b"1"}), tmp_path / "m1" / "m.sqlite", store, "A")
    one.sync()
    two = one.beside("B")
    two.restore()
    fill(two.root, {"log": b"1 2 3"})
    two.sync(shared=True)
    fill(one.root, {"log": b"1 late"})
    report = one.sync(shared=True)
    assert report.complete
    stored = [b"".join(store.read(path)) for path in store.files() if not is_ours(path)]
    assert sorted(stored) == [b"1 2 3", b"1 late"]
    assert "kept" in report.warnings[0]


_SETTINGS = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestDirectory = Moves.TestCase
TestDirectory.settings = _SETTINGS
TestObjects = MovesOnObjects.TestCase
TestObjects.settings = _SETTINGS
