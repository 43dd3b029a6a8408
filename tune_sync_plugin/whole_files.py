"""Copies of the files at the top of a directory, each whole, whatever is written there since.

Ray writes the experiment's state in place, over and over: who reads it meanwhile, in another
process, gets half of one state or the parts of two.
"""

from __future__ import annotations

import contextlib
import os
import shutil


def copy_files(directory: str, to: str) -> None:
    """Bring the copies up to date; a copy of what has not changed since stays as it is.

    Each is replaced in one step, so that its own readers are never at a loss. Hidden files are left
    out, and what vanishes meanwhile.

    Raises:
        OSError: One can't be copied. No older copy of it is left.

    Example:
        >>> import tempfile
        >>> there = tempfile.mkdtemp()
        >>> os.mkdir(f"{there}/a"); _ = open(f"{there}/a/state.json", "w").write("{}")
        >>> copy_files(f"{there}/a", f"{there}/b"); os.listdir(f"{there}/b")
        ['state.json']
    """
    os.makedirs(to, exist_ok=True)
    for entry in os.scandir(directory):
        if entry.is_file() and not entry.name.startswith("."):
            with contextlib.suppress(FileNotFoundError):
                _copy(entry, os.path.join(to, entry.name), f"{to}.part")


def _copy(entry: os.DirEntry[str], to: str, partial: str) -> None:
    status = entry.stat()
    with contextlib.suppress(FileNotFoundError):
        known = os.stat(to)
        if (known.st_mtime_ns, known.st_size) == (status.st_mtime_ns, status.st_size):
            return  # left as it is, so that it counts as unchanged
    try:
        shutil.copy2(entry.path, partial)
        os.replace(partial, to)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(to)
        raise
