"""How many bytes had been sent when: a curve of bounded length, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_POINTS = 2000


@dataclass
class History:
    """Cumulative bytes over time.

    It keeps at most ``MOST_POINTS`` points. When there are more, every other one between the first
    and the last is dropped: the older part of a long run gets coarser, never wrong.

    Attributes:
        points: Pairs of seconds since the epoch and the bytes sent until then.

    Example:
        >>> history = History()
        >>> history.add(10.0, 5)
        >>> history.add(11.0, 7)
        >>> history.points
        [(10.0, 5), (11.0, 12)]
    """

    points: list[tuple[float, int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Bytes sent in all."""
        return self.points[-1][1] if self.points else 0

    def add(self, time_s: float, count: int) -> None:
        """Count bytes that were sent until ``time_s``; none leave no point."""
        if count <= 0:
            return
        self.points.append((time_s, self.total + count))
        if len(self.points) > MOST_POINTS:
            del self.points[1:-1:2]
