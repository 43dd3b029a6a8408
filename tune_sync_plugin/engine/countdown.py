"""Counts what is left of a transfer, for whoever shows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int], None]
"""Told how many bytes are left; the first time of all of them. Must not raise."""


class Countdown:
    """Bytes that have yet to arrive, for any number of threads.

    Args:
        total: Bytes in all.
        tell: Told what is left, by one thread at a time.

    Example:
        >>> countdown = Countdown(7, print)
        7
        >>> with countdown.file(4) as arrived:
        ...     arrived(3)
        4
        3
    """

    def __init__(self, total: int, tell: Progress) -> None:
        self._left = total
        self._tell = tell
        self._lock = threading.Lock()
        tell(total)

    @contextmanager
    def file(self, size: int) -> Iterator[Callable[[int], None]]:
        """One file, which gives a function to say what has arrived of it.

        In the end all of it counts, whatever was said; after an exception nothing does.
        """
        so_far = 0

        def arrived(count: int) -> None:
            nonlocal so_far
            so_far += count
            self._arrived(count)

        try:
            yield arrived
        except BaseException:
            self._arrived(-so_far)
            raise
        self._arrived(size - so_far)

    def _arrived(self, count: int) -> None:
        with self._lock:
            self._left -= count
            self._tell(self._left)
