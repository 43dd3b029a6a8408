"""The directories that are synced: made of random bytes, so that nothing compresses or repeats.

Nothing here knows how they are synced.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_BLOCK = 1 << 20


def flat(root: Path, count: int, size: int) -> None:
    """So many files of so many bytes in one directory."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        write(root / f"file_{number:05d}.bin", size)


def deep(root: Path, count: int, width: int = 10) -> None:
    """Files of about 200 bytes in directories five levels deep, five in each.

    The first level has ``width`` directories, all alike: one of them is a tenth of the whole.
    """
    leaves = list(itertools.product(range(width), range(5), range(2), range(2), range(5)))
    per_leaf = max(1, count // len(leaves))
    for levels in leaves[: max(1, count // per_leaf)]:
        directory = root.joinpath(*(f"level_{n}_{i}" for n, i in enumerate(levels)))
        directory.mkdir(parents=True)
        for number in range(per_leaf):
            (directory / f"{number}.txt").write_bytes(os.urandom(100).hex().encode())


def grouped(root: Path, count: int, size: int, per_directory: int = 100) -> list[Path]:
    """So many files in as many directories as it takes; returns them."""
    paths = []
    for number in range(count):
        directory = root / f"group_{number // per_directory:04d}"
        if number % per_directory == 0:
            directory.mkdir(parents=True)
        path = directory / f"file_{number:06d}.bin"
        path.write_bytes(os.urandom(size))
        paths.append(path)
    return paths


def write(path: Path, size: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as out:
        for offset in range(0, size, _BLOCK):
            out.write(os.urandom(min(_BLOCK, size - offset)))
