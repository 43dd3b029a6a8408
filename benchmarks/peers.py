"""Who is compared with whom: one entry per client, and how to call those that are commands.

Commands are started once per job and their wall time includes that (tens of milliseconds for s5cmd
and rclone, half a second for aws); Python clients run in a warm process (``clients.py``).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AWS = "TUNE_SYNC_BENCH_AWS"

Job = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A client.

    Attributes:
        title: As it is called in tables.
        argv: For a command: the arguments that bring a directory to storage, by the job.
        needs: The module that must be importable, for a Python client.
    """

    title: str
    argv: Callable[[str, Job], list[str]] | None = None
    needs: str = ""


def _s5cmd(program: str, job: Job) -> list[str]:
    verb = "sync" if job.get("again") else "cp"
    target = f"s3://{job['bucket']}/{job['prefix']}/"
    options = ["--endpoint-url", job["endpoint"], "--numworkers", "256", "--log", "error"]
    return [program, *options, verb, f"{job['root']}/", target]


def _rclone(program: str, job: Job) -> list[str]:
    target = f":s3:{job['bucket']}/{job['prefix']}"
    return [program, "copy", "--transfers", "32", "--quiet", job["root"], target]


def _aws(program: str, job: Job) -> list[str]:
    target = f"s3://{job['bucket']}/{job['prefix']}"
    options = ["--endpoint-url", job["endpoint"], "--only-show-errors", "--no-progress"]
    return [program, "s3", "sync", *options, job["root"], target]


PEERS: dict[str, Peer] = {
    "ours": Peer("tune_sync_plugin"),
    "ray": Peer("Ray (pyarrow `copy_files`)", needs="ray"),
    "s5cmd": Peer("s5cmd, 256 workers", _s5cmd),
    "obstore": Peer("obstore `put_async`, 64 at once", needs="obstore"),
    "rclone": Peer("rclone copy, 32 transfers", _rclone),
    "s3fs": Peer("s3fs, 32 at once", needs="s3fs"),
    "fsspec": Peer("fsspec `put`, defaults", needs="s3fs"),
    "aws": Peer("aws s3 sync", _aws),
}


def program(name: str) -> str | None:
    """The path of a command line peer; ``None`` if it is not on this machine."""
    if name == "aws" and (given := os.environ.get(AWS)):
        return given if os.access(given, os.X_OK) else None
    beside_python = Path(sys.executable).parent / name
    return str(beside_python) if os.access(beside_python, os.X_OK) else shutil.which(name)


def missing(name: str) -> str | None:
    """Why a client can't be measured here; ``None`` if it can."""
    peer = PEERS[name]
    if peer.argv and not program(name):
        return f"`{name}` is not on PATH" + (f" nor in ${AWS}" if name == "aws" else "")
    if peer.needs and not importlib.util.find_spec(peer.needs):
        return f"{peer.needs} is not installed"
    return None


def command(name: str, job: Job) -> dict[str, Any]:
    """What the launcher has to start: a command line and its environment."""
    peer, path = PEERS[name], program(name)
    if not peer.argv or not path:
        raise ValueError(f"name: {name!r} is no command here")
    environment = {
        "AWS_ACCESS_KEY_ID": job["key"],
        "AWS_SECRET_ACCESS_KEY": job["secret"],
        "AWS_REGION": job["region"],
        "AWS_DEFAULT_REGION": job["region"],
        "RCLONE_S3_PROVIDER": "Other",
        "RCLONE_S3_ENV_AUTH": "true",
        "RCLONE_S3_ENDPOINT": job["endpoint"],
        "RCLONE_S3_NO_CHECK_BUCKET": "true",
        # Nobody's own settings.
        "RCLONE_CONFIG": "/dev/null",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return {"argv": peer.argv(path, job), "env": environment}
