"""What we have put into the mirror of checkpoints: uploaded once each, and ours to delete.

Kept beside the experiment, so that a restored run neither sends them again nor takes for its own
what others have put there. Written before a checkpoint's first byte is sent and after its last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable

from tune_sync_plugin.engine.index import OUR_DIRECTORY


class Ledger:
    """The checkpoints in one mirror; a name is ``<trial directory>/<checkpoint directory>``.

    Args:
        experiment: The experiment's directory.
        mirror: Names the mirror, without credentials.
    """

    def __init__(self, experiment: str, mirror: str) -> None:
        digest = hashlib.sha256(mirror.encode()).hexdigest()[:12]
        self._path = os.path.join(experiment, OUR_DIRECTORY, f"mirror-{digest}.json")
        self._mirror = mirror
        self._files: dict[str, list[str]] = {}
        self._complete: set[str] = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)["checkpoints"]
            self._files = {name: list(entry["files"]) for name, entry in found.items()}
            self._complete = {name for name, entry in found.items() if entry["complete"]}

    def begin(self, name: str, files: Iterable[str]) -> None:
        """Note that files of a checkpoint are about to be sent."""
        self._files[name] = sorted({*files, *self._files.get(name, ())})
        self._save()

    def complete(self, name: str) -> None:
        """Note that a checkpoint has arrived."""
        self._complete.add(name)
        self._save()

    def incomplete(self, name: str) -> None:
        """Note that a checkpoint is about to be deleted, or has been found wanting."""
        self._complete.discard(name)
        self._save()

    def forget(self, name: str) -> None:
        """Note that nothing of a checkpoint is there any more."""
        self._files.pop(name, None)
        self._complete.discard(name)
        self._save()

    def has(self, name: str) -> bool:
        """Whether a checkpoint has arrived."""
        return name in self._complete

    def names(self) -> set[str]:
        """All of which anything may be there."""
        return set(self._files)

    def files(self, name: str) -> list[str]:
        """What of a checkpoint may be there, relative to its directory."""
        return self._files.get(name, [])

    def _save(self) -> None:
        entries = {
            name: {"complete": name in self._complete, "files": files}
            for name, files in self._files.items()
        }
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        partial = f"{self._path}.part"
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"mirror": self._mirror, "checkpoints": entries}, file)
        os.replace(partial, self._path)
