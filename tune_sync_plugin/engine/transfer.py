"""Uploads the planned files, and believes storage only what it can show.

Every upload is checked: storage is asked for the file's size and, where it offers one, its
checksum. A file of somebody else's is never overwritten; it is given another name first.
"""

from __future__ import annotations

import itertools
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tune_sync_plugin.engine.checksum import checksum_of, etag_matches
from tune_sync_plugin.engine.plan import Reason, Record, Upload
from tune_sync_plugin.engine.pool import Health, Limits, run
from tune_sync_plugin.engine.source import Source
from tune_sync_plugin.engine.storage import Stat, Storage, holds
from tune_sync_plugin.errors import SourceChangedError, describe, is_denied


class Outcome(NamedTuple):
    """What became of one planned upload. Exactly one of the first four after it is set.

    ``set_aside`` is the new name, and what is stored there, of a file of somebody else's that was
    in the way. ``bytes_sent`` are the file's, or those that were appended.
    """

    upload: Upload
    stored: Record | None = None
    same: Record | None = None
    deferred: str | None = None
    error: BaseException | None = None
    set_aside: tuple[str, Stat] | None = None
    bytes_sent: int = 0


def is_as_sent(source: Source, sent: Record) -> bool:
    """Whether a file's content is still what was sent."""
    return source.size == sent.size and source.matches(sent.rolling or sent.checksum)


@dataclass
class Transfer:
    """Carries out uploads to one storage.

    Attributes:
        storage: Where to.
        run_id: Names this sync in the names of temporary files.
        scanned_ns: When the files were scanned, in nanoseconds since the epoch.
        shared: Whether others may have overwritten what was sent from here.
        read_back: Whether to read each upload back and compare contents, where storage offers no
            checksum of its own.
    """

    storage: Storage
    run_id: str
    scanned_ns: int
    read_back: bool = False
    shared: bool = False
    # Learned on the way: encrypted objects have ETags that are no checksums, and some credentials
    # may write but not read.
    _etags_tell: bool = field(default=True, init=False)
    unchecked: str | None = field(default=None, init=False)
    # A file of one of their names may be about to be sent.
    _uploads: Sequence[Upload] = field(default=(), init=False)
    # By path, since a later try finds our own file where somebody else's was.
    _aside: dict[str, tuple[str, Stat]] = field(default_factory=dict, init=False)

    def __call__(self, uploads: Sequence[Upload], limits: Limits) -> Iterator[Outcome]:
        """Yields each upload's outcome, in the order in which they end.

        What is not done at the deadline comes out with a ``TimeoutError``; see :mod:`.pool`.
        """
        self._uploads = uploads
        for upload, result in run(uploads, self._upload, limits):
            if isinstance(result, Outcome):
                yield result
            elif isinstance(result, SourceChangedError):
                yield Outcome(upload, deferred=str(result))
            else:
                yield Outcome(upload, error=result)

    def _upload(self, upload: Upload, health: Health) -> Outcome:
        path, sent = upload.entry.path, upload.sent
        with Source(upload.entry, etags=self.storage.has_checksums) as source:

            def record(checksum: str, etag: str | None, rolling: str) -> Record:
                racy = source.fingerprint.is_racy(self.scanned_ns)
                root = upload.entry.root
                return Record(source.fingerprint, checksum, racy, root, etag or "", rolling)

            if upload.reason is Reason.UNPROVEN and is_as_sent(source, sent):
                return Outcome(upload, same=record(sent.checksum, sent.etag, sent.rolling))
            if upload.reason is Reason.APPENDED and (tail := self._append(upload, source)):
                health.succeeded()
                return Outcome(upload, stored=record(*tail), bytes_sent=source.size - sent.size)
            found = self._found(upload)
            if found:
                checksum = source.compute_checksum()
                # At worst an encrypted one is kept twice.
                if holds(self.storage, path, found, source.size, checksum, sure=False):
                    health.succeeded()
                    return Outcome(upload, same=record(checksum, found.etag, source.rolling))
                if upload.reason is not Reason.UNRECORDED:
                    self._aside[path] = (self._set_aside(path, found), found)
            etag = self.storage.write(path, source, self.run_id)
            etag = self._check(path, source.size, source.checksum, etag)
            health.succeeded()
            return Outcome(
                upload,
                stored=record(source.checksum, etag, source.rolling),
                set_aside=self._aside.get(path),
                bytes_sent=source.size,
            )

    def _append(self, upload: Upload, source: Source) -> tuple[str, str | None, str] | None:
        """Send only what has been appended, if there is no doubt that the rest is in storage.

        Returns the whole file's checksum, ETag and rolling checksum; ``None`` if it was not done.
        """
        path, sent, least = upload.entry.path, upload.sent, self.storage.append_from
        if least is None or not least <= sent.size < source.size:
            return None
        if not (sent.etag and sent.rolling):
            return None
        tail = source.tail(sent.size, sent.rolling)
        if not tail or not self.storage.append(path, tail, sent.etag):
            return None
        return tail.rolling, self._check(path, source.size, tail.rolling, None), tail.rolling

    def _found(self, upload: Upload) -> Stat | None:
        """What storage has under the path, if that may be anything but what was sent from here."""
        path, sent = upload.entry.path, upload.sent
        if path in self._aside:
            return None  # an earlier try has looked
        if upload.reason in (Reason.FOREIGN, Reason.UNRECORDED):
            return self.storage.stat(path)
        if not self.shared or upload.reason is Reason.NEW:
            return None
        found = self.storage.stat(path)
        if not found or found.size != sent.size:
            return found
        if sent.etag and found.etag:
            return found if found.etag != sent.etag else None
        return found if etag_matches(sent.checksum, found.etag) is False else None

    def _set_aside(self, path: str, theirs: Stat) -> str:
        for number in itertools.count(1):
            name = f"{path}.before-{number}"
            if any(upload.entry.path == name for upload in self._uploads):
                continue  # looked for one by one: this is rare, and uploads may be very many
            found = self.storage.stat(name)
            if found is None:
                self.storage.copy(path, name)
                return name
            if found.size == theirs.size:
                # Perhaps this very one: an earlier try may have come so far and then failed.
                checksum = checksum_of(self.storage.read(path))
                if holds(self.storage, name, found, theirs.size, checksum):
                    return name
        raise AssertionError  # not reached

    def _check(self, path: str, size: int, checksum: str, etag: str | None) -> str | None:
        """Ask storage what it has now, if it has not said so already; returns the ETag.

        Raises:
            OSError: It is not this; worth a retry.
        """
        if etag and self._etags_tell and etag_matches(checksum, etag):
            return etag
        try:
            found = self.storage.stat(path)
        except Exception as error:
            if not is_denied(error):
                raise
            self.unchecked = (
                f"storage takes files but does not let them be looked at: {describe(error)}"
            )
            return etag
        if found is None:
            raise OSError(f"storage accepted {posixpath.basename(path)} but does not have it")
        if found.size != size:
            raise OSError(f"storage holds {found.size} bytes, {size} were sent")
        verdict = etag_matches(checksum, found.etag) if self._etags_tell else None
        if verdict or (verdict is None and not self.read_back):
            return found.etag
        if checksum_of(self.storage.read(path), like=checksum) != checksum:
            raise OSError("storage holds other bytes than were sent")
        self._etags_tell = self._etags_tell and verdict is None
        return found.etag
