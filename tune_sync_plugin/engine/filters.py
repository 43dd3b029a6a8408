"""Which paths a sync takes: the include and exclude globs of SyncConfig."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fsspec.utils import glob_translate


def _regex(pattern: str) -> str:
    if not isinstance(pattern, str) or not pattern.strip("/"):
        raise ValueError(f"{pattern!r} is not a glob pattern")
    if pattern.startswith("/") or ".." in pattern.split("/"):
        raise ValueError(f"{pattern!r} must be relative to the trial directory and stay inside it")
    pattern = pattern.removeprefix("./").rstrip("/")
    # What matches a directory covers everything below it, as in .gitignore.
    regex = f"{glob_translate(pattern)}|{glob_translate(pattern + '/**')}"
    # fsspec's [!a] matches a slash as well.
    return regex.replace("[^", "[^/")


def _compile(patterns: Iterable[str]) -> re.Pattern[str] | None:
    regexes = [_regex(pattern) for pattern in patterns]
    return re.compile("|".join(regexes)) if regexes else None


@dataclass(frozen=True)
class Filter:
    """Include and exclude globs, relative to the synced directory. Exclude wins.

    ``*`` and ``?`` stay within one path component, ``**`` spans any number of them, and a pattern
    that matches a directory covers all that is in it. No include pattern means everything.

    Raises:
        ValueError: A pattern is absolute, leaves the directory or is malformed.

    Example:
        >>> keep = Filter(include=("**/*.png", "logs"), exclude=("**/tmp",))
        >>> [p for p in ("a/b.png", "logs/1/x", "a/tmp/b.png", "c.txt") if keep(p)]
        ['a/b.png', 'logs/1/x']
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "_include", _compile(self.include))
        object.__setattr__(self, "_exclude", _compile(self.exclude))

    _include: re.Pattern[str] | None = None
    _exclude: re.Pattern[str] | None = None

    def __call__(self, path: str) -> bool:
        """Whether the file at ``path`` is to be synced."""
        if self._exclude and self._exclude.match(path):
            return False
        return self._include is None or bool(self._include.match(path))

    def prunes(self, directory: str) -> bool:
        """Whether nothing below ``directory`` can be wanted, so that it need not be walked."""
        return bool(self._exclude and self._exclude.match(directory))
