"""The uploads that are Python calls, ours first, each as its own users would write it.

This is imported in the warm child process (``worker.py``), where a factory does the client's
imports, so that they are not timed, and returns the call that is. Nothing is measured here.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Call = Callable[[Job], dict[str, Any]]


def ours() -> Call:
    """A sync as ``tune_sync_plugin.tasks`` does one for a trial, in the worker of a Ray task.

    Other jobs are for comparison in the same process: ``do="walk"`` reads all directories and
    inodes and does nothing with them.
    """
    from pyarrow.fs import FileSystem

    # What a worker has loaded that has run a task of ours before: no part of Ray Tune.
    import tune_sync_plugin.tasks  # noqa: F401
    from tune_sync_plugin.engine.keeper import Indexing
    from tune_sync_plugin.engine.storage import storage_at
    from tune_sync_plugin.engine.sync import sync
    from tune_sync_plugin.tune_internals import is_drivers, is_rays

    def run(job: Job) -> dict[str, Any]:
        if job.get("do") == "walk":
            return {"files": _walk(job["root"])}
        filesystem, path = FileSystem.from_uri(job["uri"])  # as Ray makes it
        report = sync(
            [job["root"]],
            storage_at(filesystem, path),
            job["manifest"],
            pickle.loads(base64.b64decode(job["options"])),  # SyncConfig()'s
            label="bench",
            taken=is_rays,
            indexing=Indexing(writer="bench", forced=True, drivers=is_drivers),
        )
        if report.failures:
            raise RuntimeError("; ".join(map(str, report.failures[:3])))
        return {
            "files_uploaded": report.files_uploaded,
            "bytes_uploaded": report.bytes_uploaded,
            "files_unchanged": report.files_unchanged,
        }

    return run


def _walk(root: str) -> int:
    count, todo = 0, [root]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                else:
                    entry.stat()
                    count += 1
    return count


def ray() -> Call:
    """What Ray's ``_FilesystemSyncer`` runs for a directory: ``_upload_to_fs_path``."""
    from ray.train._internal.storage import _upload_to_fs_path, get_fs_and_path

    def run(job: Job) -> dict[str, Any]:
        filesystem, path = get_fs_and_path(job["uri"])
        _upload_to_fs_path(local_path=job["root"], fs=filesystem, fs_path=path)
        return {}

    return run


def fsspec() -> Call:
    """``fsspec``'s ``put`` with all its defaults."""
    import s3fs

    def run(job: Job) -> dict[str, Any]:
        # Source with a slash at its end: the content, not the directory itself.
        _s3fs(s3fs, job).put(job["root"] + "/", f"{job['bucket']}/{job['prefix']}", recursive=True)
        return {}

    return run


def s3fs() -> Call:
    """s3fs as fast as it was found to go: pairs of paths, 32 at once, as many connections."""
    import s3fs

    def run(job: Job) -> dict[str, Any]:
        filesystem = _s3fs(s3fs, job, config_kwargs={"max_pool_connections": 32})
        pairs = list(_pairs(job))
        filesystem.put([here for here, _ in pairs], [there for _, there in pairs], batch_size=32)
        return {}

    return run


def _s3fs(module: Any, job: Job, **options: Any) -> Any:
    return module.S3FileSystem(
        key=job["key"],
        secret=job["secret"],
        endpoint_url=job["endpoint"],
        client_kwargs={"region_name": job["region"]},
        skip_instance_cache=True,
        use_listings_cache=False,
        **options,
    )


def _pairs(job: Job) -> Iterator[tuple[str, str]]:
    for directory, _, names in os.walk(job["root"]):
        below = os.path.relpath(directory, job["root"])
        for name in names:
            here = os.path.join(directory, name)
            yield here, os.path.normpath(os.path.join(job["bucket"], job["prefix"], below, name))


def obstore() -> Call:
    """obstore as fast as it was found to go: ``put_async``, 64 at once."""
    import obstore as library
    from obstore.store import S3Store

    async def put_all(job: Job) -> None:
        store = S3Store(
            job["bucket"],
            access_key_id=job["key"],
            secret_access_key=job["secret"],
            endpoint=job["endpoint"],
            region=job["region"],
            client_options={"allow_http": True},
        )
        slots = asyncio.Semaphore(64)

        async def put(here: str, there: str) -> None:
            async with slots:
                await library.put_async(store, there.partition("/")[2], Path(here))

        await asyncio.gather(*(put(here, there) for here, there in _pairs(job)))

    def run(job: Job) -> dict[str, Any]:
        asyncio.run(put_all(job))
        return {}

    return run


CLIENTS: dict[str, Callable[[], Call]] = {
    factory.__name__: factory for factory in (ours, ray, fsspec, s3fs, obstore)
}


def load(name: str) -> Call:
    """Do the client's imports; returns its call."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return CLIENTS[name]()
