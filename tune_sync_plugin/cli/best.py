"""Which trial is best, by the results that Ray's loggers wrote for each to ``result.json``.

Reads these files and nothing else. No part of Ray is here.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from tune_sync_plugin.engine.pool import Health, Limits, run
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import SyncError, describe

_CONCURRENCY = 16
RESULTS = "result.json"


def best_trial(
    storage: Storage, trials: Sequence[str], metric: str, mode: str
) -> tuple[str, float]:
    """The trial whose last reported value of a metric is the best one, and that value.

    As for Ray's ``get_best_result``, a trial whose last value is not finite (NaN) does not count,
    nor does one that never reported the metric.

    Args:
        storage: The experiment's directory.
        trials: The names of the trials' directories that have a ``result.json``.
        metric: Its name; ``a/b`` is the ``b`` in an ``a``.
        mode: ``"min"`` or ``"max"``.

    Raises:
        SyncError: No trial has it.
        OSError: A trial's results can't be read.

    Example:
        >>> import os, tempfile
        >>> from tune_sync_plugin.engine.local_storage import LocalStorage
        >>> there = tempfile.mkdtemp()
        >>> for name, loss in (("t_1", 0.5), ("t_2", 0.25), ("t_3", "NaN")):
        ...     os.mkdir(f"{there}/{name}")
        ...     _ = open(f"{there}/{name}/result.json", "w").write(f'{{"loss": {loss}}}')
        >>> best_trial(LocalStorage(there), ["t_1", "t_2", "t_3"], "loss", "min")
        ('t_2', 0.25)
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', not {mode!r}")

    def read(trial: str, health: Health) -> float | None:
        found = last_value(storage.read(f"{trial}/{RESULTS}"), metric)
        health.succeeded()
        return found

    values: dict[str, float] = {}
    for trial, value in run(list(trials), read, Limits(_CONCURRENCY, math.inf)):
        if isinstance(value, BaseException):
            raise OSError(f"reading {trial}/{RESULTS} failed: {describe(value)}") from value
        if value is not None and math.isfinite(value):
            values[trial] = value
    if not values:
        raise SyncError(
            f"none of {len(trials)} trials in {storage.name} has a last {metric!r} in its "
            f"{RESULTS} that is a number: correct the metric's name"
        )
    sign = 1 if mode == "min" else -1
    name = min(values, key=lambda trial: (sign * values[trial], trial))
    return name, values[name]


def last_value(chunks: Iterable[bytes], metric: str) -> float | None:
    """The value in the last result that has the metric; NaN if it is no number, ``None`` if none.

    Example:
        >>> last_value([b'{"a": {"b": 1}}', b'\\n{"a": {"b": 2}}\\n{"c": 3}\\n{"tor'], "a/b")
        2.0
    """
    lines = b"".join(chunks).splitlines()
    for line in reversed(lines):
        try:
            result = json.loads(line)
        except ValueError:
            continue  # it is being written
        if isinstance(result, dict) and (found := _named(result, metric)):
            value = found[0]
            with contextlib.suppress(OverflowError):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    return float(value)
            return math.nan
    return None


def _named(result: dict[str, Any], metric: str) -> tuple[Any] | None:
    if metric in result:
        return (result[metric],)
    first, slash, rest = metric.partition("/")
    inner = result.get(first)
    return _named(inner, rest) if slash and isinstance(inner, dict) else None
