"""Include and exclude globs."""

from __future__ import annotations

import pickle

import pytest

from tune_sync_plugin.engine.filters import Filter


@pytest.mark.parametrize(
    ("pattern", "matches", "misses"),
    [
        ("a.txt", ["a.txt", "a.txt/in/it"], ["b/a.txt", "a.txtx", "xa.txt", "a_txt"]),
        ("*.txt", ["a.txt", ".txt.txt", "new\nline.txt", "d.txt/x"], ["d/a.txt", "a.txt.gz"]),
        ("**/*.txt", ["a.txt", "d/a.txt", "d/e/f/a.txt"], ["a.txtx"]),
        ("logs", ["logs", "logs/a", "logs/a/b"], ["logs2", "a/logs"]),
        ("logs/", ["logs/a", "logs/a/b"], ["logs2"]),
        ("./logs", ["logs/a"], ["x/logs"]),
        ("**/tmp", ["tmp", "tmp/x", "a/tmp/x"], ["a/tmp2", "xtmp"]),
        ("a/*/c", ["a/b/c", "a/b/c/d"], ["a/c", "a/b/b/c"]),
        ("a/**/c", ["a/c", "a/b/c", "a/b/b/c"], ["ac", "a/b"]),
        ("?.x", ["a.x", "ü.x", "\n.x"], ["ab.x", ".x"]),
        ("[ab].x", ["a.x", "b.x"], ["c.x", "[ab].x"]),
        ("[!a]x", ["bx", "\nx"], ["ax", "x"]),
        ("v[!0]log", ["v1log"], ["v0log", "v/log"]),
        ("[[]x]", ["[x]"], ["x"]),
        ("**", ["a", "a/b", ".hidden/x"], []),
        ("a+b (1)", ["a+b (1)"], ["aab (1)", "a+b 1"]),
    ],
)
def test_patterns(pattern: str, matches: list[str], misses: list[str]) -> None:
    include, exclude = Filter(include=(pattern,)), Filter(exclude=(pattern,))
    for path in matches:
        assert include(path), path
        assert not exclude(path), path
    for path in misses:
        assert not include(path), path
        assert exclude(path), path


def test_no_patterns_take_everything() -> None:
    assert Filter()("any/thing")
    assert not Filter().prunes("any")


def test_exclude_wins() -> None:
    keep = Filter(include=("**/*.png", "logs"), exclude=("logs/secret", "**/tmp"))
    paths = ["a.png", "logs/x", "logs/secret", "logs/secret/x", "b/tmp/a.png", "x"]
    assert [path for path in paths if keep(path)] == ["a.png", "logs/x"]


def test_prunes_only_what_is_excluded_whole() -> None:
    keep = Filter(include=("deep/down/*.txt",), exclude=("cache", "logs/*.tmp"))
    assert keep.prunes("cache")
    assert not keep.prunes("deep")
    assert not keep.prunes("logs")


def test_pruning_never_loses_a_wanted_file() -> None:
    directories, names = ["a", "b", "a/b", "b/a", "a/a"], ["a", "b", "a.x", "b.x"]
    for exclude in ("a", "*", "**", "a/*", "**/b", "*/a.x", "?", "[!a]", "a/**/b.x"):
        keep = Filter(exclude=(exclude,))
        for directory in directories:
            if keep.prunes(directory):
                assert not any(keep(f"{directory}/{name}") for name in names), exclude


@pytest.mark.parametrize("pattern", ["", "/", "/abs", "../up", "a/../../b", "a**b", 3, None])
def test_bad_patterns_are_named(pattern: object) -> None:
    with pytest.raises(ValueError, match=r"\*\*|pattern|relative"):
        Filter(include=(pattern,))  # type: ignore[arg-type]


def test_survives_pickling() -> None:
    keep = pickle.loads(pickle.dumps(Filter(include=("*.txt",), exclude=("b*",))))
    assert [path for path in ("a.txt", "b.txt", "a.png") if keep(path)] == ["a.txt"]
