"""What storage holds of one directory, remembered on the node's disk (SQLite).

The manifest may claim less than storage holds, never more: a path's record is withdrawn before its
upload starts and written after it has ended, so a sync killed at any moment only costs a re-upload.
It also remembers what storage holds that came from elsewhere, for the index (see ``index.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from tune_sync_plugin.engine.index import Entry, Index
from tune_sync_plugin.engine.plan import Record
from tune_sync_plugin.engine.scan import Fingerprint, State

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    path TEXT PRIMARY KEY,
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,
    checksum TEXT, racy INTEGER, root TEXT, etag TEXT, rolling TEXT,
    uploading INTEGER,  -- withdrawn: what storage holds is not certain
    indexed INTEGER     -- whether the index in storage has this very row
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS foreigners (
    path TEXT PRIMARY KEY, size INTEGER, checksum TEXT, root TEXT
) WITHOUT ROWID;
-- Seen in a listing of storage, and neither sent from here nor in the index: whose, nobody knows.
CREATE TABLE IF NOT EXISTS seen (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
"""

_RECORDS = (
    "SELECT path, uploading, size, mtime_ns, ctime_ns, inode, checksum, racy, root, etag, rolling "
    "FROM files"
)
# Something of it has arrived in storage, or may have.
_SENT = "(size >= 0 OR NOT uploading)"
# So many parameters fit into one statement, with any SQLite.
_PARAMETERS = 900

# ValueError: an error's own text may quote a damaged file, and not be decodable.
_UNUSABLE = (sqlite3.Error, OSError, ValueError)

# Equal to no real file's: what a path has while it is being uploaded.
_UNFINISHED = Fingerprint(-1, -1, -1, -1)


def sent_below(path: str, directory: str) -> dict[str, Record]:
    """What another sync of this disk has sent from ``directory``, by paths relative to it.

    Only looks: that one may be using its manifest, at ``path``, at the same time.
    """
    prefix = f"{directory}/"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as db:
            rows = db.execute(f"{_RECORDS} WHERE substr(path, 1, ?) = ?", (len(prefix), prefix))
            return {key.removeprefix(prefix): record for key, record in map(_record, rows)}
    except _UNUSABLE:
        return {}


def _record(row: tuple[Any, ...]) -> tuple[str, Record]:
    path, uploading, size, mtime_ns, ctime_ns, inode, checksum, racy, *rest = row
    fingerprint = _UNFINISHED if uploading else Fingerprint(size, mtime_ns, ctime_ns, inode)
    return path, Record(fingerprint, checksum, bool(racy), *rest)


class Manifest:
    """The records of one destination.

    Opening never fails. A corrupt file is set aside, under its name with ``.corrupt-`` and the
    time behind it; one that describes another destination is emptied; where nothing can be written
    the records live in memory for one sync. ``warning`` says so.

    Args:
        path: The SQLite file. Its directory is made if missing. Only one process may use it at a
            time; the dispatcher sees to that.
        destination: Names the storage and the prefix that the records are about.

    Attributes:
        damaged: Whether records were lost, so that storage holds more than this knows.

    Example:
        >>> manifest = Manifest(":memory:", "local:/results/trial")
        >>> manifest.withdraw(["a.txt"])
        >>> manifest.record({"a.txt": Record(Fingerprint(3, 1, 1, 7), "9003d1df22eb4d38")})
        >>> manifest.load()["a.txt"].fingerprint.size
        3
    """

    def __init__(self, path: str, destination: str) -> None:
        self.warning: str | None = None
        self.damaged = False
        self._path = path
        self._destination = destination
        self.run_id = uuid.uuid4().hex[:12]
        self._settled: set[State] = set()
        try:
            self._open(path)
        except _UNUSABLE as error:
            self._replace(error)
        if self._meta("destination") not in (None, destination):
            with self._transaction() as db:
                for table in ("files", "foreigners", "seen", "meta"):
                    db.execute(f"DELETE FROM {table}")
            self._settled = set()

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
            rows = self._db.execute(
                "SELECT path, size, mtime_ns, ctime_ns, inode FROM files "
                "WHERE NOT (uploading OR racy)"
            )
            self._settled = set(rows)
            self.foreigners()
        except BaseException:
            self._db.close()
            raise

    def _replace(self, error: Exception) -> None:
        """Begin anew, since what is there can't be read."""
        self.damaged = True
        try:
            kept = self._set_aside()
            self._open(self._path)
            self.warning = (
                f"the sync manifest {self._path} was unreadable ({error}); it was set aside as "
                f"{kept} and is built anew by comparing files with what storage holds"
            )
        except _UNUSABLE as second:
            self._do_without(second)

    def _set_aside(self) -> str:
        # Kept, since somebody may want to know what happened; the journal belongs to it.
        kept = f"{self._path}.corrupt-{time.time_ns()}"
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._path + suffix, kept + suffix)
        return kept

    def _unlink(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path + suffix)

    def _do_without(self, error: Exception) -> None:
        self._open(":memory:")
        self.damaged = True
        # Without the names that an OSError brings along, which differ each time.
        problem = getattr(error, "strerror", None) or error
        self.warning = (
            f"the sync manifest {self._path} can't be used ({problem}): every sync compares or "
            "uploads everything again until Ray's session directory on this node is writable"
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

    # -- what was sent from here ----------------------------------------------------------------

    def take_settled(self) -> set[State]:
        """What was found on opening: paths and fingerprints that prove their files unchanged.

        Can be had once: there may be very many.
        """
        settled, self._settled = self._settled, set()
        return settled

    def load(self) -> dict[str, Record]:
        """All records. A path whose upload never ended has one that no file matches."""
        return dict(map(_record, self._db.execute(_RECORDS)))

    def records(self, paths: Collection[str]) -> dict[str, Record]:
        """The records of these paths, of those that have one."""
        found: dict[str, Record] = {}
        todo = iter(paths)
        try:
            while some := list(itertools.islice(todo, _PARAMETERS)):
                marks = ",".join("?" * len(some))
                rows = self._db.execute(f"{_RECORDS} WHERE path IN ({marks})", some)
                found.update(map(_record, rows))
        except _UNUSABLE as error:
            self._db.close()
            self._replace(error)
            return {}
        return found

    def paths(self) -> set[str]:
        """All paths that there is a record of."""
        return {path for (path,) in self._db.execute("SELECT path FROM files")}

    def interrupted(self) -> tuple[str, list[str]] | None:
        """The run id and the paths of an earlier sync that did not end as it should."""
        run_id = self._meta("run_id")
        if not run_id:
            return None  # the usual case, which need not read the table
        paths = [p for (p,) in self._db.execute("SELECT path FROM files WHERE uploading")]
        return (run_id, paths) if paths else None

    def withdraw(self, paths: Iterable[str]) -> None:
        """Forget what storage holds under ``paths``: they are about to be overwritten."""
        with self._transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                [("destination", self._destination), ("run_id", self.run_id)],
            )
            # The old row stays: it tells what storage has still, if all goes wrong.
            db.executemany(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, '', 0, '', '', '', 1, 0) "
                "ON CONFLICT (path) DO UPDATE SET uploading = 1, indexed = 0",
                [(path, *_UNFINISHED) for path in paths],
            )
            self._mark_unindexed(db)

    def record(self, records: Mapping[str, Record]) -> None:
        """Remember files that storage now holds."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('destination', ?)", [self._destination])
            db.executemany(
                f"INSERT OR REPLACE INTO files VALUES ({'?, ' * 10}0, 0)",
                [(path, *record.fingerprint, *record[1:]) for path, record in records.items()],
            )
            for table in ("foreigners", "seen"):
                db.executemany(f"DELETE FROM {table} WHERE path = ?", [(p,) for p in records])
            self._mark_unindexed(db)

    def forget(self, paths: Iterable[str]) -> None:
        """Drop paths that are no longer in storage."""
        with self._transaction() as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(p,) for p in paths])

    def settle(self) -> None:
        """Note that no half-written file is left behind: from now on nothing is interrupted."""
        with self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = 'run_id'")

    # -- what the index is about ----------------------------------------------------------------

    @property
    def knows_index(self) -> bool:
        """Whether the index in storage has been read since this manifest was made."""
        return self._meta("index_read") is not None

    @property
    def index_writer(self) -> str | None:
        """Whom the index in storage named as its writer when it was last read."""
        return self._meta("index_writer")

    @property
    def index_claimed(self) -> bool:
        """Whether the index has been written from here since this manifest was made."""
        return self._meta("indexed_paths") is not None

    def index_read(self, index: Index | None) -> None:
        """Take in the index in storage, or that there is none."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('index_read', '1')")
            # Whoever wrote it since has to hear of us anew.
            db.execute("DELETE FROM meta WHERE key = 'indexed_paths'")
            if index:
                db.execute("INSERT OR REPLACE INTO meta VALUES ('index_writer', ?)", [index.writer])
        self.meet(index.entries if index else {})

    def meet(self, entries: Mapping[str, Entry]) -> None:
        """Storage holds these: what of them we did not send came from elsewhere."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('destination', ?)", [self._destination])
            ours = {path for (path,) in db.execute("SELECT path FROM files")}
            self._add_foreigners(db, {p: e for p, e in entries.items() if p not in ours})

    def disown(self, entries: Mapping[str, Entry]) -> None:
        """Storage holds these now, and not what we sent: somebody else went on with them."""
        with self._transaction() as db:
            db.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in entries])
            self._add_foreigners(db, entries)

    def doubt(self) -> None:
        """Others may have gone on with any of it, and they could not be asked."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO foreigners SELECT path, NULL, '', root FROM files",
            )
            db.execute(
                "UPDATE files SET size = ?, mtime_ns = ?, ctime_ns = ?, inode = ?, uploading = 1",
                _UNFINISHED,
            )
            db.execute("DELETE FROM meta WHERE key IN ('index_read', 'indexed_paths')")

    @staticmethod
    def _add_foreigners(db: sqlite3.Connection, entries: Mapping[str, Entry]) -> None:
        db.executemany(
            "INSERT OR REPLACE INTO foreigners VALUES (?, ?, ?, ?)",
            [(path, *entry) for path, entry in entries.items()],
        )
        if entries:
            Manifest._mark_unindexed(db)

    @staticmethod
    def _mark_unindexed(db: sqlite3.Connection) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('unindexed', '1')")

    @property
    def unindexed(self) -> bool:
        """Whether anything has changed since the index was written."""
        return self._meta("unindexed") is not None

    def see(self, paths: Iterable[str]) -> None:
        """Note what a listing of storage shows."""
        with self._transaction() as db:
            db.execute("DELETE FROM seen")
            ours = {path for (path,) in db.execute("SELECT path FROM files WHERE NOT uploading")}
            others = [(path,) for path in paths if path not in ours]
            db.executemany("INSERT OR REPLACE INTO seen VALUES (?)", others)

    def seen(self) -> set[str]:
        """What a listing showed that was not sent from here."""
        return {path for (path,) in self._db.execute("SELECT path FROM seen")}

    def foreigners(self) -> dict[str, Entry]:
        """What storage holds that was not sent from here."""
        rows = self._db.execute("SELECT path, size, checksum, root FROM foreigners")
        return {path: Entry(*facts) for path, *facts in rows}

    def index_entries(self, *, only_new: bool = False) -> dict[str, Entry]:
        """What the index has to say of the files sent from here, or of those it has not yet."""
        # Without a size: an upload of which nobody knows how it ended.
        rows = self._db.execute(
            "SELECT path, CASE uploading WHEN 0 THEN size END, "
            f"CASE uploading WHEN 0 THEN checksum ELSE '' END, root FROM files WHERE {_SENT}"
            + (" AND NOT indexed" if only_new else "")
        )
        return {path: Entry(*facts) for path, *facts in rows}

    def paths_digest(self) -> str:
        """Stands for the set of paths that the index has to name."""
        digest = sha256()
        query = f"SELECT path FROM files WHERE {_SENT} UNION SELECT path FROM foreigners"
        for (path,) in self._db.execute(f"{query} ORDER BY path"):
            digest.update(path.encode() + b"\0")
        return digest.hexdigest()

    @property
    def has_unindexed(self) -> bool:
        """Whether the index has not yet what is to be said of some of these files."""
        query = f"SELECT 1 FROM files WHERE {_SENT} AND NOT indexed LIMIT 1"
        return self._db.execute(query).fetchone() is not None

    def stored(self) -> tuple[int, int]:
        """How many files storage holds, wherever they came from, and their bytes."""
        files, size = self._db.execute(
            "SELECT count(*), sum(size) FROM (SELECT size FROM files WHERE size >= 0 "
            "UNION ALL SELECT size FROM foreigners)"
        ).fetchone()
        return files, size or 0

    @property
    def indexed_paths(self) -> str | None:
        """What :meth:`index_written` was given last."""
        return self._meta("indexed_paths")

    def index_written(self) -> None:
        """The index in storage has all of this."""
        digest = self.paths_digest()
        with self._transaction() as db:
            db.execute("UPDATE files SET indexed = 1 WHERE NOT indexed")
            db.execute("INSERT OR REPLACE INTO meta VALUES ('indexed_paths', ?)", [digest])
            db.execute("DELETE FROM meta WHERE key = 'unindexed'")

    def close(self) -> None:
        """Close the file; the manifest can't be used afterwards."""
        self._db.close()
