"""An experiment that changes as Tune changes one, and calls that end when a test says so."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.mirror.mirroring import Mirroring
from tune_sync_plugin.mirror.spread import Spread
from tune_sync_plugin.mirror.tasks import MirrorRun

HERE = "driver"


class Experiment:
    """An experiment's directory, of which Tune keeps some checkpoints per trial."""

    def __init__(self, directory: Path, num_to_keep: int = 2) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        (directory / ".mark").touch()
        (directory / "tuner.pkl").write_bytes(b"tuner")
        self.num_to_keep = num_to_keep
        self.kept: dict[str, list[int]] = {}
        self.numbers: dict[str, int] = {}
        self.written: dict[str, dict[str, bytes]] = {}
        self._states = 0

    def checkpoint(self, trial: str, size: int = 100) -> str:
        """A trial reports one; Tune deletes what it keeps no longer. Returns its name."""
        number = self.numbers.get(trial, 0)
        self.numbers[trial] = number + 1
        name = f"{trial}/checkpoint_{number:06d}"
        files = {"model.bin": os.urandom(size), "deep/optimizer.bin": f"{name}".encode()}
        for path, content in files.items():
            target = self.directory / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        self.written[name] = files
        kept = self.kept.setdefault(trial, [])
        kept.append(number)
        while len(kept) > self.num_to_keep:
            shutil.rmtree(self.directory / f"{trial}/checkpoint_{kept.pop(0):06d}")
        return name

    def named(self) -> list[str]:
        return [f"{t}/checkpoint_{n:06d}" for t, numbers in self.kept.items() for n in numbers]

    def write_state(self) -> None:
        """As our sync of the driver's directory writes it: whole, by renaming."""
        self._states += 1
        state = {"number": self._states, "paths": [f"/mnt/exp/{name}" for name in self.named()]}
        partial = self.directory / ".part"
        partial.write_text(json.dumps(state))
        partial.rename(self.directory / "experiment_state-2026-01-01_00-00-00.json")

    def write_artifact(self, trial: str, name: str, content: bytes) -> None:
        target = self.directory / trial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


class Calls:
    """Does tasks in this process, each when the test says so: a :class:`.spread.Caller`."""

    def __init__(self, run: MirrorRun, nodes: tuple[str, ...] = (HERE,)) -> None:
        self.run = run
        self.nodes = set(nodes)
        self.pending: list[dict[str, Any]] = []
        self.by_node: dict[str, list[str]] = {}
        self.fail: Callable[[str, str], Exception | None] = lambda node, name: None

    def call(self, node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
        call = {"node": node_id, "do": (function, arguments), "done": False, "result": None}
        self.pending.append(call)
        return call

    def end(self, index: int = 0) -> None:
        """Let one of those under way do its work, and end."""
        call = self.pending.pop(index % len(self.pending))
        function, arguments = call["do"]
        self.by_node.setdefault(call["node"], []).append(arguments[0])
        call["result"] = self.fail(call["node"], arguments[0]) or function(*arguments, self.run)
        call["done"] = True

    def names(self) -> list[str]:
        """What those that are under way are about."""
        return sorted(call["do"][1][0] for call in self.pending)

    def end_one(self, name: str) -> None:
        """Let the one of that name end."""
        self.end(next(n for n, call in enumerate(self.pending) if call["do"][1][0] == name))

    def is_ready(self, call: Any) -> bool:
        return bool(call["done"])

    def result(self, call: Any) -> Any:
        if isinstance(call["result"], Exception):
            raise call["result"]
        return call["result"]

    def kill(self, call: Any) -> None:
        if call in self.pending:
            self.pending.remove(call)

    def alive_nodes(self) -> set[str]:
        return self.nodes


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class World:
    """An experiment, its mirror in another directory, and what carries one to the other."""

    def __init__(
        self, tmp_path: Path, *, nodes: tuple[str, ...] = (HERE,), num_to_keep: int = 2, **how: Any
    ) -> None:
        self.experiment = Experiment(tmp_path / "storage" / "exp", num_to_keep)
        self.mirror = tmp_path / "mirror" / "exp"
        self.run = MirrorRun(
            str(self.experiment.directory), ".mark", str(self.mirror), {}, "", SyncOptions()
        )
        self.clock = Clock()
        self.calls = Calls(self.run, nodes)
        self._copy = str(tmp_path / "copy")
        self._how = {"period_s": 0.0, "timeout_s": 60.0, **how}
        self.mirroring = self.restart()

    def restart(self) -> Mirroring:
        """The mirror's process begins anew."""
        self.calls.pending.clear()
        spread = Spread(self.calls, HERE, 2, clock=self.clock)
        self.mirroring = Mirroring(
            str(self.experiment.directory),
            self._copy,
            str(self.mirror),
            spread,
            clock=self.clock,
            **self._how,
        )
        return self.mirroring

    def step(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        self.mirroring.step()

    def settle(self) -> None:
        """Let all that is under way end, and what follows from it."""
        self.step()
        while self.calls.pending:
            self.calls.end()
            self.step()

    def finish(self) -> None:
        self.mirroring.finish()
        for _ in range(500):
            if self.mirroring.is_finished:
                return
            self.step()
            while self.calls.pending:
                self.calls.end()
            self.mirroring.step()
        raise AssertionError("it does not come to an end")

    def state(self) -> dict[str, Any] | None:
        """The state in the mirror, as a reader finds it."""
        found = sorted(self.mirror.glob("experiment_state-*.json"))
        return json.loads(found[-1].read_text()) if found else None

    def named(self) -> set[str]:
        """What the mirror's state names."""
        return {path.removeprefix("/mnt/exp/") for path in (self.state() or {"paths": ()})["paths"]}

    def stored(self, name: str) -> dict[str, bytes]:
        """A checkpoint's files in the mirror."""
        root = self.mirror / name
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }

    def checkpoints(self) -> set[str]:
        """All checkpoints of which the mirror has anything."""
        return {str(path.relative_to(self.mirror)) for path in self.mirror.glob("*/checkpoint_*")}

    def assert_sound(self) -> None:
        """Whatever a reader of the mirror sees is whole."""
        for name in self.named():
            assert self.stored(name) == self.experiment.written[name], name
        if self.state() is not None:
            assert (self.mirror / "tuner.pkl").exists()
