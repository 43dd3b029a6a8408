"""Everything that can go wrong, at random, for as long as asked: ``python -m benchmarks.soak``.

Rounds of Tune runs on three nodes with disks of their own and a real S3 server behind a proxy.
Meanwhile requests fail, are reset, stall; the link is slow or stands still; trials raise or are
killed; sync tasks are killed; nodes die and others join. What a trial writes follows from its name
and the step, so at the end every stored byte can be checked: wrong ones are never forgiven, missing
ones only where the report names the dead node that had them. Prints one line; exits with 1 if
anything was lost silently. The seed repeats the choices, not their timing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from ray import tune

from tests.support.cluster import LocalCluster
from tests.support.proxy import Proxy
from tests.support.s3_server import S3Server, available
from tests.support.scenarios import Link, sync_workers
from tune_sync_plugin import SyncCallback, SyncConfig

NODES, STEPS = 3, 20
MARK = f"TUNE_SYNC_SOAK={os.getpid()}"


def content(x: int, step: int) -> bytes:
    """What trial ``x`` writes at a step: a few bytes to a few megabytes, never the same."""
    seed = hashlib.sha256(f"{x}:{step}".encode()).digest()
    size = int.from_bytes(seed[:2], "big") * (60 if seed[2] < 16 else 1)
    return random.Random(seed).randbytes(size)


def train(config: dict[str, Any]) -> None:
    """Writes a file and a line per step; fails now and then, never twice in the same way."""
    start = 0
    if checkpoint := tune.get_checkpoint():
        # Ray's own upload of a checkpoint may have failed without a word (DESIGN 2, row 13).
        with contextlib.suppress(OSError), checkpoint.as_directory() as directory:
            start = int(Path(directory, "step").read_text()) + 1
    chance = random.Random(f"{config['seed']}:{config['x']}:{start}:{time.time_ns()}")
    for step in range(start, STEPS):
        Path(f"step_{step}.bin").write_bytes(content(config["x"], step))
        with open("log.txt", "a") as log:
            log.write(f"{step}\n")
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(directory))
        time.sleep(chance.uniform(0, 0.6))
        if chance.random() < 0.03:
            raise RuntimeError("as the soak wants it")
        if chance.random() < 0.03:
            os.kill(os.getpid(), signal.SIGKILL)


class Chaos:
    """A thread that breaks one thing after the other."""

    def __init__(self, cluster: LocalCluster, proxy: Proxy, chance: random.Random) -> None:
        self.done: Counter[str] = Counter()
        self._cluster, self._proxy, self._chance = cluster, proxy, chance
        self._alive = list(range(1, NODES + 1))
        self._stop = threading.Event()

    def __enter__(self) -> Chaos:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._stop.clear()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.heal()

    def restock(self) -> None:
        """Replace the nodes that died; only Python's main thread can start one."""
        while len(self._alive) < NODES:
            self._cluster.add_node()
            self._alive.append(len(self._cluster.node_ids))

    def heal(self) -> None:
        self._proxy.clear_rules()
        self._proxy.set()

    def _run(self) -> None:
        acts = [self._errors, self._slow, self._outage, self._kill_sync, self._kill_node, self.heal]
        while not self._stop.wait(self._chance.uniform(0.5, 5)):
            act = self._chance.choice(acts)
            with contextlib.suppress(OSError):
                act()
            self.done[act.__name__.strip("_")] += 1

    def _errors(self) -> None:
        action = self._chance.choice(["status:503", "status:500", "reset", "lose", "delay:3"])
        self._proxy.add_rule("/soak", action, fraction=0.3, seed=self._chance.randrange(1000))

    def _slow(self) -> None:
        self._proxy.set(bandwidth_bytes_per_s=self._chance.choice([0, 2e5, 5e6]), latency_s=0.05)

    def _outage(self) -> None:
        self._proxy.add_rule("/soak", "status:503")
        self._stop.wait(self._chance.uniform(1, 15))
        self.heal()

    def _kill_sync(self) -> None:
        for line in sync_workers():
            pid = int(line.split(":")[0])
            with contextlib.suppress(OSError):
                # Ours, and not those of a test that runs on this machine as well.
                if MARK.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def _kill_node(self) -> None:
        if len(self._alive) > 1:
            number = self._chance.choice(self._alive)
            self._cluster.kill_node(number)
            self._alive.remove(number)


def play(link: Link, chaos: Chaos, seed: int) -> Counter[str]:
    """One round; returns what was checked and what was found."""
    prefix = f"soak-{link.prefix()}"
    callback = SyncCallback()
    chaos.restock()
    with chaos:
        results = tune.Tuner(
            train,
            param_space={"x": tune.grid_search(list(range(6))), "seed": seed},
            run_config=tune.RunConfig(
                name="exp",
                storage_path=link.s3.uri(prefix, port=link.proxy.port),
                sync_config=SyncConfig(sync_artifacts=True, sync_period=2, sync_timeout=60),
                failure_config=tune.FailureConfig(max_failures=-1),
                callbacks=[callback],
                verbose=0,
            ),
        ).fit()
        # What the flush meets is chaos too; but a link that stands still has to move at last.
    found: Counter[str] = Counter()
    keys = link.s3.keys(prefix)
    lost = {failure.trial for failure in callback.report.failures}
    for result in results:
        x, trial = result.config["x"], result.metrics["trial_id"]
        named = trial in lost
        parts = {key: key.split("/", 3) for key in keys if key.count("/") >= 3}
        of_trial = {part[3]: key for key, part in parts.items() if f"_{trial}_" in part[2]}
        wanted = {f"step_{step}.bin": content(x, step) for step in range(STEPS)}
        for name, expected in wanted.items():
            found["files"] += 1
            found["bytes"] += len(expected)
            key = of_trial.get(name)
            if key is None:
                found["lost and named" if named else "lost silently"] += 1
            elif link.s3.get(key) != expected:
                found["wrong"] += not named
                found["torn by a dead node, named"] += named
        lines = link.s3.get(of_trial["log.txt"]).decode().split() if "log.txt" in of_trial else []
        if not {str(step) for step in range(STEPS)} <= set(lines):
            found["logs with gaps, named" if named else "logs with gaps, silent"] += 1
    found["rounds"] += 1
    found["trials"] += len(results)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="default 10")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    options = parser.parse_args()
    if reason := available():
        print(f"no S3 server: {reason}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    chance = random.Random(options.seed)
    total: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    with (
        tempfile.TemporaryDirectory() as directory,
        S3Server.start(Path(directory)) as server,
        Proxy.start(server.host, server.port) as proxy,
        LocalCluster(workers=NODES, env_vars=dict([MARK.split("=")])) as cluster,
    ):
        chaos = Chaos(cluster, proxy, chance)
        while time.monotonic() < end:
            total += play(Link(server, proxy), chaos, chance.randrange(10**6))
    bad = total["wrong"] + total["lost silently"] + total["logs with gaps, silent"]
    broken = ", ".join(f"{count} {what}" for what, count in sorted(chaos.done.items()))
    figures = ", ".join(f"{count:,} {what}" for what, count in total.items())
    print(f"soak, seed {options.seed}, {options.minutes:g} min ({broken}): {figures}; {bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
