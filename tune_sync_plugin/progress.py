"""Bars that show, on a terminal or in a notebook, how far something long is.

The only place that knows tqdm. A bar is a nicety: whatever goes wrong with it is not the run's.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# What is over sooner needs no bar, unless somebody has asked for it and waits.
_AFTER_S = 1.0
# So often at most it is drawn; its clock goes on meanwhile.
_EVERY_S = 0.25
# Without a rate: parts of a flush are too few and too different for one.
_PARTS = {"bar_format": "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}]", "leave": False}


class Bar:
    """Shows how much is left; a context manager that gives the function to tell.

    Args:
        make: Makes a tqdm bar of so many steps: see :func:`of_flush` and those below it. Without,
            nothing is shown.
        after_s: Nothing is shown of what is over sooner; seconds.
        clock: Seconds, monotonic.

    Example:
        >>> with Bar(of_flush) as tell:  # nothing is shown before a second is over
        ...     tell(12)
    """

    def __init__(
        self,
        make: Callable[[int], Any] | None,
        after_s: float = _AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._clock = clock
        self._from = clock() + after_s
        self._total = 0
        self._bar: Any = None
        self._drawn = 0.0

    def __enter__(self) -> Callable[[int], None]:
        return self._tell

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._safely(self._bar.close)

    def _tell(self, left: int) -> None:
        self._total = max(self._total, left)
        now = self._clock()
        is_soon = now - self._drawn < _EVERY_S and left > 0
        if self._make is None or now < self._from or is_soon:
            return
        self._drawn = now
        self._safely(self._draw, left)

    def _draw(self, left: int) -> None:
        if self._bar is None:
            if not left or not self._make:
                return
            self._bar = self._make(self._total)
        self._bar.n = self._total - left
        self._bar.refresh()

    def _safely(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self._make = None  # no more of it
            logger.debug("the progress bar failed: %s: %s", type(error).__name__, error)


def is_seen() -> bool:
    """Whether somebody looks at this process: on a terminal, or in a notebook."""
    with contextlib.suppress(AttributeError, ValueError):  # there is none, or it is closed
        if sys.stderr.isatty():
            return True
    ipython = sys.modules.get("IPython")  # which is there wherever a notebook is
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and "IPKernelApp" in shell.config


def of_flush(total: int) -> Any:
    """For the flush at the end of a run; ``total`` counts directories."""
    return _here(total, desc="final sync", unit="directories", **_PARTS)


def of_mirror(total: int) -> Any:
    """For the mirror's flush; ``total`` counts checkpoints, trials and the experiment's state."""
    return _here(total, desc="final mirroring", unit="parts", **_PARTS)


def of_pull(total: int) -> Any:
    """For ``tune-sync pull``; ``total`` counts bytes."""
    return _here(total, unit="B", unit_scale=True)


def of_restore(trial_id: str) -> Callable[[int], Any]:
    """For a trial's artifacts that come back; ``total`` counts bytes.

    Drawn by the driver, to whom Ray passes it on from the process that this is called in. So it is
    for the driver to know whether it :func:`is_seen`.
    """

    def make(total: int) -> Any:
        from ray.experimental import tqdm_ray

        return tqdm_ray.tqdm(desc=f"restoring {trial_id}", total=total, unit="B")

    return make


def _here(total: int, **options: Any) -> Any:
    from tqdm import auto

    return auto.tqdm(total=total, file=sys.stderr, disable=not is_seen(), **options)
