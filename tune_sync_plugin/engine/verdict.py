"""Decides what a restore does about one stored file, by a look at the directory; nothing else."""

from __future__ import annotations

import os
import posixpath
from enum import Enum

from tune_sync_plugin.engine.index import is_ours
from tune_sync_plugin.engine.plan import Record


class Verdict(Enum):
    """What to do about one stored file, and why."""

    MISSING = "it is not here: bring it back"
    SENT = "what is here was sent to storage, where others may have gone on with it: compare"
    KEPT = "what is here is what storage has, or what was written on top of it"
    LOCAL = "what is here is not from there: it stays, and so does what storage has"
    REFUSED = "it would be written outside the directory"


def judge(path: str, root: str, record: Record | None, *, nobody_else: bool) -> Verdict:
    """Decide about one stored file, by what is in ``root`` now and what was sent from here.

    | here      | sent from here | by others since | verdict                                     |
    |-----------|----------------|-----------------|---------------------------------------------|
    | any, and the path leads out of ``root``      | REFUSED                                     |
    | nothing   | any            | any             | MISSING                                     |
    | something | no             | any             | LOCAL                                       |
    | something | yes            | nothing         | KEPT                                        |
    | something | yes            | perhaps         | SENT: the index lags, only storage can tell |

    Raises:
        OSError: Not even that can be found out.
    """
    if not is_inside(root, path):
        return Verdict.REFUSED
    try:
        os.lstat(os.path.join(root, path))
    except (FileNotFoundError, NotADirectoryError):
        return Verdict.MISSING
    if record is None:
        return Verdict.LOCAL
    return Verdict.KEPT if nobody_else else Verdict.SENT


def is_inside(root: str, path: str) -> bool:
    """Whether ``path``, taken literally or through the links in ``root``, stays below it."""
    parts = path.split("/")
    if "\0" in path or not all(parts) or {".", ".."} & set(parts) or is_ours(path):
        return False
    parent = os.path.realpath(os.path.join(root, posixpath.dirname(path)))
    root = os.path.realpath(root)
    return parent == root or parent.startswith(root + os.sep)
