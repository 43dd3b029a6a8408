"""examples/BEHAVIOUR.md tells the truth: its tests exist, its messages are those of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "examples" / "BEHAVIOUR.md").read_text()
# What stands for something that is filled in, in a message's source and, as <words>, on the page.
HOLE = "\0"


def section(title: str) -> str:
    """The text under a heading of the page, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = {number for number, cells in enumerate(tables) if set(cells[0]) <= set("-| ")}
    heads = {number - 1 for number in rules}
    return [cells for number, cells in enumerate(tables) if number not in rules | heads]


@cache
def names_in(file: str) -> set[str]:
    """The tests of a file, as pytest names them after the file; it is not imported."""
    path = REPOSITORY / file
    if not path.is_file():
        return set()

    def named(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                yield f"{prefix}{node.name}"
            elif isinstance(node, ast.ClassDef):
                yield f"{prefix}{node.name}"  # all of its tests
                yield from named(node.body, f"{node.name}::")
            elif isinstance(node, ast.Assign):  # hypothesis's state machines
                yield from (t.id for t in node.targets if isinstance(t, ast.Name))

    return set(named(ast.parse(path.read_text()).body, ""))


TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", PAGE)))
PROMISES = section("What is promised")
MESSAGES = rows(section("Troubleshooting by error message"))


def test_the_page_is_read() -> None:
    assert len(TESTS) > 100
    assert len(rows(PROMISES)) > 40
    assert len(MESSAGES) > 40


def test_each_test_that_is_named_exists() -> None:
    assert [f"{file}::{name}" for file, name in TESTS if name not in names_in(file)] == []


def test_each_row_names_its_tests() -> None:
    for row in rows(PROMISES) + MESSAGES:
        named = re.findall(r"`([^`]*)`", row[-1])
        assert named, row
        assert all(re.fullmatch(r"tests/[\w/]+\.py::[\w:]+", name) for name in named), named


def _templates() -> Iterator[str]:
    """Every text in the package, with a hole where something is filled in."""
    for path in (REPOSITORY / "tune_sync_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else HOLE for part in node.values
                ]
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sd]|\{\}", HOLE, node.value)


TEMPLATES = list(_templates())


def test_each_message_is_in_the_package() -> None:
    unknown = []
    for row in MESSAGES:
        messages = re.findall(r"`([^`]*)`", row[0])
        assert messages, row
        for message in messages:
            wanted = re.sub(r"<[^<>]+>", HOLE, message)
            assert len(wanted.replace(HOLE, "").split()) > 1, f"{message} says too little"
            if not any(wanted in template for template in TEMPLATES):
                unknown.append(message)
    assert unknown == []


def test_a_message_that_changed_would_be_noticed() -> None:
    """Holes match holes only, so a word that is filled in can't hide a changed one."""
    wanted = "node \0 is gone; \0, what was written since is lost"
    assert any(wanted in template for template in TEMPLATES)
    assert not any(wanted.replace("gone", "away") in template for template in TEMPLATES)
    assert not any(wanted.replace(HOLE, "1a2b", 1) in template for template in TEMPLATES)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (REPOSITORY / "examples" / target).exists(), target


def test_every_setting_is_in_it() -> None:
    from dataclasses import fields

    from tune_sync_plugin import SyncConfig

    missing = [field.name for field in fields(SyncConfig) if f"`{field.name}" not in PROMISES]
    assert not missing
