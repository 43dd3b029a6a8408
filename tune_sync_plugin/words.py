"""Numbers as a person reads them."""

from __future__ import annotations


def human_bytes(count: float) -> str:
    """A byte count in decimal units, as storage providers bill them.

    Example:
        >>> human_bytes(1_234_567)
        '1.2 MB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if count < (1000 if unit == "B" else 999.95):  # no "1000.0 KB"
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_of(count: int, what: str) -> str:
    """So many of something.

    Example:
        >>> count_of(1, "file"), count_of(2, "file")
        ('1 file', '2 files')
    """
    return f"{count} {what}{'s' * (count != 1)}"
