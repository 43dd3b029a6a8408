"""The bar that shows, on a terminal or in a notebook, how far a long final flush is.

The only place that knows tqdm. A bar is a nicety: whatever goes wrong with it is not the run's.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# A flush that is over sooner needs no bar.
_AFTER_S = 1.0
# So often at most it is drawn; its clock goes on meanwhile.
_EVERY_S = 0.25


class FlushBar:
    """Shows how many targets are left; a context manager that gives the function to tell.

    Args:
        make: Makes a tqdm bar of so many steps.
        clock: Seconds, monotonic.

    Example:
        >>> with FlushBar() as tell:  # nothing is shown before a second is over
        ...     tell(12)
    """

    def __init__(
        self,
        make: Callable[[int], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make or _make_bar
        self._clock = clock
        self._begun = clock()
        self._total = 0
        self._bar: Any = None
        self._drawn = 0.0
        self._broken = False

    def __enter__(self) -> Callable[[int], None]:
        return self._tell

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._safely(self._bar.close)

    def _tell(self, left: int) -> None:
        self._total = max(self._total, left)
        now = self._clock()
        is_soon = now - self._drawn < _EVERY_S and left > 0
        if self._broken or now - self._begun < _AFTER_S or is_soon:
            return
        self._drawn = now
        self._safely(self._draw, left)

    def _draw(self, left: int) -> None:
        if self._bar is None:
            if not left:
                return
            self._bar = self._make(self._total)
        self._bar.n = self._total - left
        self._bar.refresh()

    def _safely(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Exception as error:
            self._broken = True
            logger.debug("the progress bar failed: %s: %s", type(error).__name__, error)


def _make_bar(total: int) -> Any:
    from tqdm import auto

    # Where standard error is not a terminal there is no bar, but a notebook's never is one.
    in_notebook = any(base.__module__ == "tqdm.notebook" for base in auto.tqdm.__mro__)
    return auto.tqdm(
        total=total,
        desc="final sync",
        unit=" directories",
        file=sys.stderr,
        disable=False if in_notebook else None,
        leave=False,
    )
