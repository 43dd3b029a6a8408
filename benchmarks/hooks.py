"""What a hook costs Tune's loop while nothing is due: ``python -m benchmarks.hooks``.

Runs a real experiment and, inside it, gives the live dispatcher so many more trials; times its poll
while they are all being synced, and then the hooks that Tune calls most. Prints the medians of
several rounds, in microseconds. The case ``hooks`` of ``python -m benchmarks`` runs this too.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune

from tune_sync_plugin import SyncCallback, SyncConfig
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.tasks import SyncJob

ROUNDS, CALLS = 7, 2000


class Probe(tune.Callback):
    """Stands beside the callback under test and times its hooks."""

    def __init__(self, callback: SyncCallback, trials: int) -> None:
        self.callback = callback
        self.trials = trials
        self.figures: dict[str, float] = {}

    def on_trial_result(self, **info: Any) -> None:
        experiment = self.callback._active
        assert experiment
        here = ray.get_runtime_context().get_node_id()
        keys = [f"probe_{number:05d}" for number in range(self.trials)]
        for key in keys:
            experiment.dispatcher.add_target(key)
            job = SyncJob(key, (f"working_dirs/{key}",), "/tmp/unused", SyncOptions())
            experiment.dispatcher.set_places(key, {here: job})
            experiment.dispatcher.request(key, forced=False)
        polls = []
        deadline = time.monotonic() + 300
        while len(experiment._report.trials) < self.trials and time.monotonic() < deadline:
            start = time.perf_counter()
            experiment.poll()
            polls.append((time.perf_counter() - start) * 1e6)
            time.sleep(0.001)  # Tune's loop has other things to do
        self.figures["poll, busy, median"] = statistics.median(polls)
        self.figures["poll, busy, 99 %"] = statistics.quantiles(polls, n=100)[98]
        self.figures["poll, busy, longest"] = max(polls)
        self.figures["polls"] = len(polls)
        fakes = [SimpleNamespace(trial_id=key) for key in keys]
        hooks = {
            "on_trial_result": lambda n: self.callback.on_trial_result(
                iteration=0, trials=fakes, trial=fakes[n % len(fakes)], result={}
            ),
            "on_step_end": lambda n: self.callback.on_step_end(iteration=0, trials=fakes),
        }
        for name, hook in hooks.items():
            rounds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for number in range(CALLS):
                    hook(number)
                rounds.append((time.perf_counter() - start) / CALLS * 1e6)
            self.figures[name] = statistics.median(rounds)


def measure(trials: int) -> dict[str, float]:
    """Microseconds per call, by hook, with so many live trials; and how many busy polls were timed.

    "Busy" is while all trials are being synced; the others are while nothing is due.
    """
    callback = SyncCallback()
    probe = Probe(callback, trials)
    with tempfile.TemporaryDirectory() as storage:
        tune.Tuner(
            lambda config: tune.report({"x": 1}),
            run_config=tune.RunConfig(
                storage_path=storage,
                sync_config=SyncConfig(sync_artifacts=True),
                callbacks=[callback, probe],
                verbose=0,
            ),
        ).fit()
    return probe.figures


def main() -> None:
    """Print a line per hook and number of trials."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for trials in [int(argument) for argument in sys.argv[1:]] or [1000, 10_000]:
        for name, figure in measure(trials).items():
            unit = "" if name == "polls" else " µs"
            print(f"{trials:>6} live trials  {name:<20} {figure:8.2f}{unit}")
    ray.shutdown()


if __name__ == "__main__":
    main()
