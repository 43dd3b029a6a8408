"""Storages that fail, hang, meddle, count or kill, each around a real one.

What belongs here: faults, as implementations of ``Storage``. The bytes always land in a real
directory, so that a test looks at files and never at what a fake remembers.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tune_sync_plugin.engine.source import CHUNK_BYTES, Content, Memory, Source, Tail
from tune_sync_plugin.engine.storage import Stat, Storage


class Around:
    """Passes everything on to another storage; the others override what they break."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def has_directories(self) -> bool:
        return self.inner.has_directories

    @property
    def has_checksums(self) -> bool:
        return self.inner.has_checksums

    @property
    def append_from(self) -> int | None:
        return self.inner.append_from

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        return self.inner.write(path, source, run_id)

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        return self.inner.append(path, tail, etag)

    def stat(self, path: str) -> Stat | None:
        return self.inner.stat(path)

    def read(self, path: str) -> Iterator[bytes]:
        return self.inner.read(path)

    def files(self) -> dict[str, int]:
        return self.inner.files()

    def copy(self, path: str, to: str) -> None:
        self.inner.copy(path, to)

    def remove(self, path: str) -> None:
        self.inner.remove(path)

    def discard_partial(self, path: str, run_id: str) -> None:
        self.inner.discard_partial(path, run_id)


class Counting(Around):
    """Counts what is asked of the storage, and how many writes run at the same time.

    ``asked`` has every request by its kind and path; ``requests`` is their number.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.writes: list[str] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self._count("write", path)
        with self._lock:
            self.writes.append(path)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            return super().write(path, source, run_id)
        finally:
            with self._lock:
                self._busy -= 1

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        self._count("append", path)
        return super().append(path, tail, etag)

    def _count(self, kind: str, path: str) -> None:
        with self._lock:
            self.asked[kind, path] += 1

    @property
    def requests(self) -> int:
        return self.asked.total()

    def kinds(self) -> dict[str, int]:
        """How many requests of each kind."""
        found: Counter[str] = Counter()
        for (kind, _), count in self.asked.items():
            found[kind] += count
        return dict(found)

    def stat(self, path: str) -> Stat | None:
        self._count("stat", path)
        return super().stat(path)

    def read(self, path: str) -> Iterator[bytes]:
        self._count("read", path)
        return super().read(path)

    def files(self) -> dict[str, int]:
        self._count("files", "")
        return super().files()

    def copy(self, path: str, to: str) -> None:
        self._count("copy", path)
        super().copy(path, to)

    def remove(self, path: str) -> None:
        self._count("remove", path)
        super().remove(path)

    def discard_partial(self, path: str, run_id: str) -> None:
        self._count("discard_partial", path)
        super().discard_partial(path, run_id)


class Failing(Around):
    """Fails the first ``times`` writes of each path that ``affects`` picks."""

    def __init__(
        self,
        inner: Storage,
        error: Callable[[str], BaseException],
        *,
        times: float = float("inf"),
        affects: Callable[[str], bool] = lambda path: True,
    ) -> None:
        super().__init__(inner)
        self.attempts: Counter[str] = Counter()
        self._error, self._times, self._affects = error, times, affects

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self.attempts[path] += 1
        if self._affects(path) and self.attempts[path] <= self._times:
            raise self._error(path)
        return super().write(path, source, run_id)


class Hanging(Around):
    """Writes of ``hangs`` never answer before ``release`` is called."""

    def __init__(self, inner: Storage, hangs: set[str]) -> None:
        super().__init__(inner)
        self._hangs = hangs
        self._released = threading.Event()

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        if path in self._hangs and not self._released.wait(60):
            raise RuntimeError("the test never released the hung write")
        return super().write(path, source, run_id)

    def release(self) -> None:
        self._released.set()


class Meeting(Around):
    """No write ends before ``parties`` of them are under way, or ``patience_s`` have passed."""

    def __init__(self, inner: Storage, parties: int, patience_s: float) -> None:
        super().__init__(inner)
        self._barrier = threading.Barrier(parties)
        self._patience_s = patience_s

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self._barrier.wait(self._patience_s)
        return super().write(path, source, run_id)


class Watched(Around):
    """Calls back before and after each write and between chunks."""

    def __init__(self, inner: Storage, on_moment: Callable[[str, str], None]) -> None:
        super().__init__(inner)
        self._on_moment = on_moment

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self._on_moment("before", path)
        watched = _WatchedSource(source, lambda: self._on_moment("during", path))
        etag = super().write(path, watched, run_id)
        self._on_moment("after", path)
        return etag

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        self._on_moment("before", path)
        watched = _WatchedTail(tail, lambda: self._on_moment("during", path))
        appended = super().append(path, watched, etag)
        self._on_moment("after", path)
        return appended


class _WatchedSource(Source):
    """A source that calls back after each chunk it hands out."""

    def __init__(self, source: Source, between: Callable[[], None]) -> None:
        self.__dict__.update(source.__dict__)
        self._source, self._between = source, between

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        for chunk in self._source.chunks(chunk_bytes):
            yield chunk
            self._between()


class _WatchedTail(Tail):
    """Likewise, byte by byte."""

    def __init__(self, tail: Tail, between: Callable[[], None]) -> None:
        self.__dict__.update(tail.__dict__)
        self._tail, self._between = tail, between

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        for chunk in self._tail.chunks(1):
            yield chunk
            self._between()


class Killing(Around):
    """Kills this process, for real, at the ``countdown``-th step of the sync."""

    def __init__(self, inner: Storage, countdown: int) -> None:
        super().__init__(inner)
        self._left = countdown
        self._lock = threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        self.step()
        etag = super().write(path, _WatchedSource(source, self.step), run_id)
        self.step()
        return etag

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        self.step()
        appended = super().append(path, _WatchedTail(tail, self.step), etag)
        self.step()
        return appended

    def remove(self, path: str) -> None:
        self.step()
        super().remove(path)
        self.step()

    def discard_partial(self, path: str, run_id: str) -> None:
        self.step()
        super().discard_partial(path, run_id)
        self.step()

    def wrap(self, function: Callable[..., None]) -> Callable[..., None]:
        """Make any other function a place where the sync may be killed, before and after."""

        def step_around(*args: object, **kwargs: object) -> None:
            self.step()
            function(*args, **kwargs)
            self.step()

        return step_around


class ObjectStorage:
    """A flat mapping of keys to whole objects, as S3 is; on disk, so that a killed sync's stay."""

    has_directories = False
    has_checksums = True
    append_from = 3

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.name = f"objects:{directory}"
        directory.mkdir(exist_ok=True)

    def write(self, path: str, source: Content, run_id: str) -> str | None:
        content = b"".join(source.chunks())
        return self._put(path, hashlib.md5(content).hexdigest(), content)

    def _put(self, path: str, etag: str, content: bytes) -> str:
        target = self._key(path)
        unseen = target.with_suffix(f".{threading.get_ident()}")
        unseen.write_bytes(b"\0".join([path.encode(), etag.encode(), content]))
        unseen.replace(target)
        return etag

    def append(self, path: str, tail: Tail, etag: str) -> bool:
        """As a multipart upload of two parts, the first one copied from what is there."""
        if not self._key(path).exists():
            return False
        _, known, before = self._key(path).read_bytes().split(b"\0", 2)
        if known.decode() != etag:
            return False
        after = tail.read()
        digests = [hashlib.md5(part).digest() for part in (before, after)]
        self._put(path, hashlib.md5(b"".join(digests)).hexdigest() + "-2", before + after)
        return True

    def _key(self, path: str) -> Path:
        return self._directory / hashlib.sha256(path.encode()).hexdigest()

    def stat(self, path: str) -> Stat | None:
        if not self._key(path).exists():
            return None
        _, etag, content = self._key(path).read_bytes().split(b"\0", 2)
        return Stat(len(content), etag.decode())

    def read(self, path: str) -> Iterator[bytes]:
        if not self._key(path).exists():
            raise FileNotFoundError(path)
        yield self._key(path).read_bytes().split(b"\0", 2)[2]

    def files(self) -> dict[str, int]:
        return {path: len(content) for path, content in self.contents().items()}

    def copy(self, path: str, to: str) -> None:
        self.write(to, Memory(next(self.read(path))), "")

    def remove(self, path: str) -> None:
        raise AssertionError("nothing is ever in the way on an object store")

    def discard_partial(self, path: str, run_id: str) -> None:
        raise AssertionError("an object store holds no partial files")

    def contents(self) -> dict[str, bytes]:
        """Every object."""
        found = {}
        for file in self._directory.iterdir():
            if not file.suffix:
                key, _, content = file.read_bytes().split(b"\0", 2)
                found[key.decode()] = content
        return found


def tree(root: Path | str) -> dict[str, bytes]:
    """The content of every regular file below ``root``, links to directories not followed."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            location = os.path.join(directory, name)
            with open(location, "rb") as file:
                found[os.path.relpath(location, root)] = file.read()
    return found
