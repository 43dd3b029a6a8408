"""What tests of restarts share: trials that move, a log that goes on, and what storage has of them.

What belongs here: training code, moving and waiting, reading storage. What may not: assertions
about the product, which are the tests' business.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tests.support.scenarios import Link
from tune_sync_plugin import SyncCallback, SyncConfig

# Of the two CPUs of a node: a trial that fails leaves room for the blocker, and then none is left
# for the trial.
TRIAL_CPUS, BLOCKER_CPUS = 1.5, 0.6

_NO_ARTIFACTS = re.compile(
    r"(checkpoint_[^/]*/|\.tune_sync/|events\.out\.tfevents\.)"
    r"|(error\.pkl|error\.txt|params\.json|params\.pkl|progress\.csv|result\.json)$"
)


# -- storage ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A storage path, and what is below it: the same for a directory and for S3.

    Attributes:
        storage_path: What Tune is given.
        names: Everything there, as ``exp/<trial directory>/<file>``.
        get: The content of one of these names.
        kind: For the names of figures.
    """

    storage_path: str
    names: Callable[[], list[str]]
    get: Callable[[str], bytes]
    kind: str

    @classmethod
    def in_directory(cls, path: Path) -> Place:
        def names() -> list[str]:
            return [str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()]

        return cls(str(path), names, lambda name: (path / name).read_bytes(), "directory")

    @classmethod
    def on_s3(cls, link: Link, *, through_proxy: bool = True) -> Place:
        prefix, bucket = link.prefix(), link.s3.bucket
        client = link.s3.client()  # one for all: making one takes long

        def names() -> list[str]:
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
            return [
                item["Key"][len(prefix) + 1 :]
                for page in pages
                for item in page.get("Contents", ())
                if not item["Key"].endswith("/")  # Ray's own sync marks directories
            ]

        def get(name: str) -> bytes:
            body: bytes = client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
            return body

        port = link.proxy.port if through_proxy else None
        return cls(link.s3.uri(prefix, port=port), names, get, "S3")

    def artifacts(self, trial: str = "") -> dict[str, bytes]:
        """The artifacts of the one trial whose directory's name contains ``trial``."""
        found = {}
        for name in self.names():
            directory, _, path = name.partition("/")[2].partition("/")
            if directory.startswith(".") or not path:
                continue
            if trial in directory and not _NO_ARTIFACTS.match(path):
                assert path not in found, f"more than one trial has {path}"
                found[path] = self.get(name)
        return found

    def read(self, name: str, trial: str = "") -> bytes:
        """One file of the one trial that has it."""
        (found,) = (
            n for n in self.names() if n.endswith(f"/{name}") and trial in n.split("/", 2)[1]
        )
        return self.get(found)

    def peek(self, name: str, trial: str = "") -> bytes:
        """As :meth:`read`; nothing if it is not there (yet)."""
        try:
            return self.read(name, trial)
        except (ValueError, KeyError, FileNotFoundError):
            return b""


# -- while a run is on --------------------------------------------------------------------------


def wait_until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    """Poll until ``condition`` holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.02)


@contextlib.contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Run ``act`` beside the block; what it raises is raised when the block is over."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            traceback.print_exc()
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), "what should have happened during the run did not"
    if raised:
        raise raised[0]


@ray.remote(num_cpus=BLOCKER_CPUS)
class _Blocker:
    def ping(self) -> None:
        pass


def move_away_when_this_ends() -> None:
    """Let the trial that calls this go on elsewhere than on this node."""
    node = ray.get_runtime_context().get_node_id()
    remove_blockers({other["NodeID"] for other in ray.nodes()} - {node})
    block(node)


def block(node: str) -> Any:
    """Leave no room for a trial on a node, as soon as there is room for this."""
    return _Blocker.options(
        name=f"blocker-{node[:8]}",
        namespace="blockers",
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()


def remove_blockers(nodes: Iterable[str]) -> None:
    """Let trials back onto these nodes."""
    for node in nodes:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(f"blocker-{node[:8]}", namespace="blockers"))


# -- training -----------------------------------------------------------------------------------


def start_step() -> int:
    """The step after the checkpoint's; 0 without one."""
    checkpoint = tune.get_checkpoint()
    if not checkpoint:
        return 0
    with checkpoint.as_directory() as directory:
        return int(Path(directory, "step").read_text()) + 1


def report_step(step: int, **metrics: Any) -> None:
    """Report with a checkpoint that :func:`start_step` understands."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "step").write_text(str(step))
        checkpoint = tune.Checkpoint.from_directory(directory)
        tune.report({"step": step, **metrics}, checkpoint=checkpoint)


def note_start(start: int) -> None:
    """Leave a file that says where this attempt started, and what it found: node, files, log."""
    node = ray.get_runtime_context().get_node_id()
    here = sorted(str(p.relative_to(".")) for p in Path(".").rglob("*") if p.is_file())
    log = Path("log.txt").read_text() if Path("log.txt").exists() else ""
    Path(f"attempt_at_{start}.txt").write_text("\n".join([node, ",".join(here), log]))


def found_at(place: Place, start: int, trial: str = "") -> tuple[str, list[str], str]:
    """What :func:`note_start` noted: the node's id, the files there were, the log."""
    node, here, log = place.read(f"attempt_at_{start}.txt", trial).decode().split("\n", 2)
    return node, [name for name in here.split(",") if name], log


def train(config: dict[str, Any]) -> None:
    """Appends a line to two logs and checkpoints, ten times; fails when asked, and moves."""
    start = start_step()
    note_start(start)
    trial_dir = Path(tune.get_context().get_trial_dir())
    for step in range(start, config.get("steps", 10)):
        for log in (Path("log.txt"), trial_dir / "log2.txt"):
            with log.open("a") as out:
                out.write(f"{step}\n")
        time.sleep(config.get("sleep_s", 0))
        report_step(step, at=time.time())
        if step in config.get("fails_after", ()) and not Path(f"failed_after_{step}").exists():
            move_away_when_this_ends()
            Path(f"failed_after_{step}").touch()
            time.sleep(0.5)
            raise RuntimeError(f"as asked, after {step}")


def lines(count: int, start: int = 0) -> bytes:
    """What :func:`train` logs."""
    return "".join(f"{step}\n" for step in range(start, count)).encode()


def fit(
    place: Place,
    *,
    trainable: Any = train,
    space: dict[str, Any],
    max_failures: int = 2,
    resources: Any = None,
    **settings: Any,
) -> tuple[Any, SyncCallback]:
    """Run an experiment ``exp`` of trials that fill a node; returns results and callback."""
    callback = SyncCallback()
    sync_config = {"sync_artifacts": True, "sync_period": 300, **settings}
    results = tune.Tuner(
        tune.with_resources(trainable, resources or {"CPU": TRIAL_CPUS}),
        param_space=space,
        run_config=tune.RunConfig(
            name="exp",
            storage_path=place.storage_path,
            sync_config=SyncConfig(**sync_config),
            failure_config=tune.FailureConfig(max_failures=max_failures),
            callbacks=[callback],
            verbose=0,
        ),
    ).fit()
    return results, callback
