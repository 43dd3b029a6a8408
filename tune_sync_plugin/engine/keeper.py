"""Keeps the index in storage in step with the manifest, as part of a sync.

It is written when the set of paths has changed, at forced syncs when anything has, and now and then
during a long one; it is read once per manifest, or each time where several nodes write it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from tune_sync_plugin.engine import index as indexes
from tune_sync_plugin.engine.index import Entry, Index
from tune_sync_plugin.engine.manifest import Manifest
from tune_sync_plugin.engine.plan import Reason
from tune_sync_plugin.engine.pool import Limits, once
from tune_sync_plugin.engine.storage import Storage
from tune_sync_plugin.errors import describe


@dataclass(frozen=True)
class Indexing:
    """How a sync keeps the index.

    Attributes:
        writer: Names the disk that this runs on. An index that names it as its writer tells that
            nobody else has sent anything since, so that this disk's manifest knows best.
        shared: Whether others may have written the index since this disk last did.
        forced: Whether to write it also if only contents have changed.
        drivers: Tells, by their paths, files that are no artifacts; for a listing.
        also: What the index is to name besides: files that another sync takes to storage.
    """

    writer: str = ""
    shared: bool = False
    forced: bool = True
    drivers: Callable[[str], bool] = lambda path: False
    also: Mapping[str, Entry] = field(default_factory=dict)


@dataclass
class IndexKeeper:
    """The index of one destination during one sync.

    Attributes:
        warnings: What went wrong without losing anything.
    """

    indexing: Indexing
    storage: Storage
    manifest: Manifest
    limits: Limits
    warnings: list[str] = field(default_factory=list)
    _readable: bool = True

    def meet(self, paths: Iterable[str]) -> dict[str, Reason]:
        """What storage has, or may have, that the manifest has no record of: what to do about each.

        Args:
            paths: What there is no record of.
        """
        unrecorded: dict[str, Reason] = {}
        if not self.manifest.knows_index:
            # First, since it is not repeated once the index is known. Whoever sent files may have
            # been killed before they were in an index.
            try:
                self.manifest.see(once(self.storage.files, self._patience()))
            except BaseException:
                return dict.fromkeys(paths, Reason.FOREIGN)
            # What came from elsewhere is in an index of ours as well.
            theirs = self.manifest.foreigners().keys() - self.manifest.paths()
            found = self._read()
            if not self._readable:
                # Whatever is there may be somebody else's.
                return dict.fromkeys(paths, Reason.FOREIGN)
            # Written from this disk: not somebody else's files, but ours from before the manifest
            # was lost.
            if found and found.writer == self.indexing.writer:
                unrecorded = dict.fromkeys(found.entries.keys() - theirs, Reason.UNRECORDED)
        foreign = self.manifest.foreigners().keys() | self.manifest.seen()
        if self.manifest.index_writer not in (None, self.indexing.writer):
            # Others sent files, and may have been killed before they put them into the index.
            foreign.update(paths)
        return dict.fromkeys(foreign, Reason.FOREIGN) | unrecorded

    def _read(self) -> Index | None:
        try:
            found = once(
                lambda: indexes.read_or_rebuild(
                    self.storage,
                    self.manifest.run_id,
                    self.indexing.drivers,
                    self.warnings.append,
                ),
                self._patience(),
            )
        except BaseException as error:
            self._readable = False
            self.warnings.append(
                f"the index of {self.storage.name} can't be read, so it is not kept up to date: "
                f"{type(error).__name__}: {describe(error)}"
            )
            return None
        self.manifest.index_read(found)
        return found

    def _patience(self) -> Limits:
        """What asking may take: if storage hangs, the files themselves must have time left."""
        now = self.limits.clock()
        return replace(self.limits, deadline=now + (self.limits.deadline - now) / 4)

    def claim(self) -> BaseException | None:
        """Before anything is sent: note in the index that another disk has gone on.

        Otherwise the one that wrote it would believe its own records if the trial came back there,
        however much had been sent from here. Returns what it failed with.
        """
        theirs = self.manifest.index_writer not in (None, "", self.indexing.writer)
        if not self._readable or self.manifest.index_claimed or not theirs:
            return None
        return self._write({**self.manifest.foreigners(), **self.manifest.index_entries()})

    def keep(self, *, forced: bool) -> BaseException | None:
        """Write the index if it is due; returns what that failed with."""
        manifest = self.manifest
        if self.indexing.also:
            known = manifest.foreigners()
            new = {p: e for p, e in self.indexing.also.items() if p not in known}
            if new:
                manifest.meet(new)
        if not manifest.unindexed or not self._readable:
            return None
        same = manifest.paths_digest() == manifest.indexed_paths
        if same and not (forced and manifest.has_unindexed):
            return None
        return self._write({**manifest.foreigners(), **manifest.index_entries()})

    def _write(self, entries: dict[str, Entry]) -> BaseException | None:
        manifest = self.manifest
        writer = "" if self.indexing.shared else self.indexing.writer
        if self.indexing.shared or not manifest.knows_index:
            # Others know better what they sent; we know better what we have sent since.
            theirs = self._read()
            if not self._readable:
                return None
            entries = {**manifest.foreigners(), **entries, **(theirs.entries if theirs else {})}
            entries |= manifest.index_entries(only_new=True)
        try:
            index = Index(entries, writer)
            once(lambda: indexes.write(self.storage, index, manifest.run_id), self.limits)
        except BaseException as error:
            return error
        # Of what is known here now: reading theirs may have added to it.
        manifest.index_written()
        return None
