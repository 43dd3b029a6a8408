"""Makes the notebooks of examples/ out of its scripts, so that each text is written down once.

A script is in the "percent" format that editors run cell by cell: ``# %%`` begins a cell of code,
``# %% [markdown]`` one of text in comments. ``python -m tests.support.notebooks`` writes the
notebooks anew; ``tests/test_examples.py`` sees that they are up to date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = {
    "02_object_storage.ipynb": "object_storage.py",
    "03_surviving_failures.ipynb": "surviving_failures.py",
    "04_real_model.ipynb": "real_model.py",
}
_CELL = re.compile(r"^# %%(?P<text> \[markdown\])?$", re.MULTILINE)


def notebook_of(script: str) -> str:
    """The notebook, without outputs, that has the script's cells."""
    before, *parts = _CELL.split(script)
    if before.strip():
        raise ValueError("there is something before the first cell")
    cells = []
    for number, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        lines = body.strip("\n").split("\n")
        if kind:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell = {"cell_type": "markdown" if kind else "code", "id": f"c{number:02}", "metadata": {}}
        cell |= {} if kind else {"execution_count": None, "outputs": []}
        cells.append({**cell, "source": "\n".join(lines).splitlines(keepends=True)})
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for notebook, script in NOTEBOOKS.items():
        (EXAMPLES / notebook).write_text(notebook_of((EXAMPLES / script).read_text()))
