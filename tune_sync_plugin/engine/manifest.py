"""What storage holds of one directory, remembered on the node's disk (SQLite).

The manifest may claim less than storage holds, never more: a path's record is withdrawn before its
upload starts and written after it has ended, so a sync killed at any moment only costs a re-upload.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping

from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.scan import Fingerprint

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY,
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, digest BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
"""

# ValueError: an error's own text may quote a damaged file, and not be decodable.
_UNUSABLE = (sqlite3.Error, OSError, ValueError)

# Equal to no real file's: what a path has while it is being uploaded.
_UNFINISHED = Fingerprint(-1, -1, -1, -1)


class Manifest:
    """The records of one destination.

    Opening never fails. A corrupt file, or one that describes another destination, is replaced;
    where nothing can be written the records live in memory for one sync, and ``warning`` says so.

    Args:
        path: The SQLite file. Its directory is made if missing. Only one process may use it at a
            time; the dispatcher sees to that.
        destination: Names the storage and the prefix that the records are about.

    Example:
        >>> manifest = Manifest(":memory:", "local:/results/trial")
        >>> manifest.withdraw(["a.txt"])
        >>> manifest.record({"a.txt": Record(Fingerprint(3, 1, 1, 7))})
        >>> manifest.load()["a.txt"].fingerprint.size
        3
    """

    def __init__(self, path: str, destination: str) -> None:
        self.warning: str | None = None
        self._path = path
        self._destination = destination
        self.run_id = uuid.uuid4().hex[:12]
        try:
            self._open(path)
        except _UNUSABLE as first:
            try:
                self._unlink()
                self._open(path)
                self.warning = f"the sync manifest {path} was unreadable and was replaced ({first})"
            except _UNUSABLE as error:
                self._do_without(error)
        if self._meta("destination") not in (None, destination):
            with self._transaction() as db:
                db.execute("DELETE FROM files")
                db.execute("DELETE FROM meta")

    def _open(self, path: str) -> None:
        if path != ":memory:":
            os.makedirs(os.path.dirname(path), exist_ok=True)
        # autocommit off via the connection's context manager: one transaction per `with`.
        self._db = sqlite3.connect(path, timeout=10)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            # Survives a killed process. After a power cut the newest transactions may be missing:
            # the files they are about have changed since the ones before, and are sent again.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            # Reads every row, so that damage is found here and not in the midst of a sync.
            self._meta("destination")
            for _ in self._rows():
                pass
        except BaseException:
            self._db.close()
            raise

    def _unlink(self) -> None:
        # Ours, and useless: a fresh one costs one full upload.
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path + suffix)

    def _do_without(self, error: Exception) -> None:
        self._open(":memory:")
        self.warning = (
            f"the sync manifest {self._path} can't be used ({error}): every sync uploads "
            "everything again until Ray's session directory on this node is writable"
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One change, whole or not at all; one that can't be written, on a full disk say,
        costs the manifest, since what it still claims is about to become untrue."""
        try:
            with self._db:
                yield self._db
        except _UNUSABLE as error:
            self._db.close()
            with contextlib.suppress(OSError):
                self._unlink()
            self._do_without(error)

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def load(self) -> dict[str, Record]:
        """All records. A path whose upload never ended has one that no file matches."""
        return {path: Record(Fingerprint(*facts), digest) for path, *facts, digest in self._rows()}

    def _rows(self) -> sqlite3.Cursor:
        return self._db.execute("SELECT path, size, mtime_ns, ctime_ns, inode, digest FROM files")

    def interrupted(self) -> tuple[str, list[str]] | None:
        """The run id and the paths of an earlier sync that did not end as it should."""
        run_id = self._meta("run_id")
        if not run_id:
            return None  # the usual case, which need not read the table
        paths = [p for (p,) in self._db.execute("SELECT path FROM files WHERE size = -1")]
        return (run_id, paths) if paths else None

    def withdraw(self, paths: Iterable[str]) -> None:
        """Forget what storage holds under ``paths``: they are about to be overwritten."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [("destination", self._destination), ("run_id", self.run_id)],
            )
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, NULL)",
                [(path, *_UNFINISHED) for path in paths],
            )

    def record(self, records: Mapping[str, Record]) -> None:
        """Remember files that storage now holds."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)",
                [(path, *record.fingerprint, record.digest) for path, record in records.items()],
            )

    def forget(self, paths: Iterable[str]) -> None:
        """Drop paths that are no longer in storage."""
        with self._transaction() as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(p,) for p in paths])

    def settle(self) -> None:
        """Note that no half-written file is left behind: from now on nothing is interrupted."""
        with self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = 'run_id'")

    def close(self) -> None:
        """Close the file; the manifest can't be used afterwards."""
        self._db.close()
