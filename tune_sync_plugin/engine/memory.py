"""A bound on what of files' contents is in memory at once, for all uploads of a process together.

It is one bound, whichever client sends: the user's training needs the rest.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Memory:
    """Keeps what is read into memory at once within a bound, in bytes."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        """Wait for room; what is larger than all there is waits for all."""
        size = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


# Two large files and a few small ones.
bound = Memory(110 << 20)
