"""The mirror's own process, and the driver's hand on it.

It decides and waits in an actor on the driver's node, so that Tune's loop has nothing of it but a
message now and then.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_sync_plugin.directories import this_node
from tune_sync_plugin.errors import SyncError, describe
from tune_sync_plugin.executor import RayExecutor
from tune_sync_plugin.mirror.mirroring import Mirroring
from tune_sync_plugin.mirror.spread import Spread
from tune_sync_plugin.mirror.tasks import MirrorRun
from tune_sync_plugin.preflight import LIMIT_S, START_S, Finding, Preflight, warnings_about
from tune_sync_plugin.report import EXPERIMENT, FileFailure, MirrorReport

logger = logging.getLogger(__name__)

_STEP_S = 0.1
# So often the driver asks what has been done.
_ASK_S = 5.0
# What the driver waits longer than the actor, to be told.
_ANSWER_S = 5.0


@dataclass(frozen=True)
class MirrorSettings:
    """See ``SyncConfig``.

    Attributes:
        period_s: ``sync_period``.
        timeout_s: ``sync_timeout``.
        per_node: ``max_syncs_per_node``.
        all_checkpoints: Whether ``keep_up="all"``.
        preflight: Whether nodes are tried before they are used.
    """

    period_s: float
    timeout_s: float
    per_node: int
    all_checkpoints: bool
    preflight: bool


class _MirrorActor:
    """Runs a :class:`.Mirroring` in a thread of its own, beside those that answer calls."""

    def __init__(self, run: MirrorRun, settings: MirrorSettings) -> None:
        here, node_id = this_node(run)
        self._executor = RayExecutor(run, node_id)
        self._here = node_id
        self._preflight = Preflight(self._executor) if settings.preflight else None
        # Asked by the loop alone, and before it starts: neither is made for several threads.
        able = self._preflight.is_able if self._preflight else lambda node_id: True
        self._found: dict[str, Finding] = {}
        if self._preflight:
            for other in self._executor.alive_nodes():
                self._preflight.check(other)
        self._mirroring = Mirroring(
            run.experiment,
            os.path.join(here, "tune_sync", "mirror", "state"),
            run.name,
            Spread(self._executor, node_id, settings.per_node, able),
            period_s=settings.period_s,
            timeout_s=settings.timeout_s,
            all_checkpoints=settings.all_checkpoints,
        )
        threading.Thread(target=self._run, name="tune_sync_mirror", daemon=True).start()

    def _run(self) -> None:
        said: set[str] = set()
        while True:
            try:
                if self._preflight:
                    self._found |= self._preflight.poll()
                self._mirroring.step()
                self._executor.tidy()
            except Exception as error:
                # A file system that is away for a moment; anything else is a bug, and shows.
                if describe(error) not in said:
                    said.add(describe(error))
                    logger.warning("mirroring goes on after %s: %s", type(error).__name__, error)
                time.sleep(1.0)
            time.sleep(_STEP_S)

    def own_finding(self) -> Finding:
        """What came of the driver's node's own try, once that is known."""
        while self._preflight and self._here not in self._found:
            time.sleep(_STEP_S)
        return self._found.get(self._here, Finding())

    def pin(self, name: str) -> None:
        self._mirroring.pin(name)

    def change(self, trials: list[str]) -> None:
        self._mirroring.change(trials)

    def report(self) -> MirrorReport:
        report = self._mirroring.report()
        for node_id, finding in dict(self._found).items():
            report.warnings += warnings_about(node_id, finding, report.url)
        return report

    def finish(self, timeout_s: float) -> MirrorReport:
        """Returns when all is mirrored or has failed, at the latest after the timeout."""
        end = time.monotonic() + timeout_s
        self._mirroring.finish()
        while not self._mirroring.is_finished:
            if time.monotonic() >= end:
                self._mirroring.give_up(f"the flush ran out of its {timeout_s:.0f} s")
                break
            time.sleep(_STEP_S)
        self._executor.close()
        return self.report()


class Mirror:
    """What the driver knows of the mirror. Nothing here blocks but :meth:`finish`.

    Args:
        run: What is mirrored, where to.
        settings: How.
        here: The driver's node.
    """

    def __init__(self, run: MirrorRun, settings: MirrorSettings, here: str) -> None:
        self._last = MirrorReport(run.name)
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=32)(_MirrorActor)
        strategy = NodeAffinitySchedulingStrategy(here, soft=False)
        self._actor = actor.options(scheduling_strategy=strategy).remote(run, settings)
        self._directories: dict[str, str] = {}
        # Trials that something was heard of: before the last sync of the driver's directory began,
        # and since. Which files that sync sent is not known here.
        self._recent: tuple[set[str], set[str]] = (set(), set())
        self._changed: set[str] = set()
        self._answer: Any = None
        self._ask_again = 0.0

    def check(self) -> None:
        """Wait until the driver's node has tried the storage.

        Raises:
            SyncError: It can't use it; says what to do.
        """
        try:
            limit_s = 2 * START_S + LIMIT_S  # this process's start, and a sync worker's
            finding: Finding = ray.get(self._actor.own_finding.remote(), timeout=limit_s)
        except Exception as error:
            finding = Finding(f"its process did not answer: {describe(error)}")
        if finding.error:
            raise SyncError(f"upload_dir {self._last.url} can't be used: {finding.error}")

    def heard_of(self, trial_id: str, directory: str) -> None:
        """Something happened to a trial, which Tune's loggers will write down."""
        self._directories[trial_id] = directory
        self._recent[1].add(directory)

    def checkpoint(self, path: str) -> None:
        """A checkpoint has been reported, and is there now."""
        self._actor.pin.remote("/".join(path.rstrip("/").split("/")[-2:]))

    def synced(self, key: str) -> None:
        """Files of this trial, or of the driver's, have arrived in the experiment's directory."""
        if key == EXPERIMENT:
            before, since = self._recent
            self._changed |= before | since
            self._recent = (since, set())
        elif key in self._directories:
            self._changed.add(self._directories[key])

    def poll(self) -> MirrorReport | None:
        """Pass on what has changed; returns a new report now and then."""
        if self._changed:
            self._actor.change.remote(sorted(self._changed))
            self._changed.clear()
        if self._answer is None:
            if time.monotonic() >= self._ask_again:
                self._answer = self._actor.report.remote()
            return None
        if not ray.wait([self._answer], timeout=0)[0]:
            return None
        answer, self._answer = self._answer, None
        self._ask_again = time.monotonic() + _ASK_S
        try:
            self._last = ray.get(answer)
        except Exception as error:  # it starts again by itself
            logger.debug("the mirror's process did not answer: %s", describe(error))
            return None
        return self._last

    def finish(
        self, timeout_s: float, progress: Callable[[int], None] = lambda left: None
    ) -> MirrorReport:
        """Mirror all there is now, for at most so long; returns the last report.

        ``progress`` is told now and then how many parts are left; it must not raise.
        """
        try:
            until = time.monotonic() + timeout_s + _ANSWER_S
            end = self._actor.finish.remote(timeout_s)
            while time.monotonic() < until and not ray.wait([end], timeout=_STEP_S)[0]:
                self.poll()
                progress(self._last.owed)
            report: MirrorReport = ray.get(end, timeout=0)
            return report
        except Exception as error:
            message = f"the mirror's process failed: {describe(error)}"
            failure = FileFailure("mirror", "", type(error).__name__, message)
            self._last.failures = [*self._last.failures, failure]
            return self._last

    def close(self) -> None:
        """End its process, and with it those that it started."""
        try:
            ray.kill(self._actor)
        except Exception as error:
            logger.debug("ending the mirror's process failed: %s", describe(error))
