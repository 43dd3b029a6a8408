"""SyncConfig: Ray's four settings plus ours, and their validation. Nothing here does I/O."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ray import tune

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.engine.urls import without_secrets

_SWITCHES = (
    "sync_artifacts",
    "sync_artifacts_on_checkpoint",
    "follow_symlinks",
    "restore_artifacts",
    "verify_content",
    "strict",
    "preflight",
)


@dataclass
class SyncConfig(tune.SyncConfig):
    """How files get into ``RunConfig(storage_path)``; extends ``ray.tune.SyncConfig``.

    Args:
        sync_period: Seconds, default 300. At least so long between the starts of two syncs of the
            same trial, or of the experiment directory, that nothing forced. The first is due at
            once.
        sync_timeout: Seconds, default 1800. A sync that has run this long is killed, reported as
            ``TimeoutError`` and resumed by the next one. The end of the experiment (Ray's last
            snapshot, the final flush, the summary) takes at most this long and twenty seconds.
        sync_artifacts: Default ``False``. Whether what a trial writes into its directory on the
            worker is synced.
        sync_artifacts_on_checkpoint: Default ``True``. Whether a checkpoint forces a sync of the
            trial's artifacts, one that starts after the checkpoint was reported.
        include: Globs of the artifacts to sync, relative to the trial directory; ``**`` spans
            directories, a directory stands for all that is in it. Default: everything.
        exclude: Globs of artifacts to leave out; they win over ``include``. Default: none.
        follow_symlinks: Default ``False``. Whether links to directories are walked into. Links to
            files always count as files.
        max_concurrent_transfers: Default 64. Files that one sync has on their way at once. What
            of them is in memory on the way to S3 stays below 120 MB.
        max_syncs_per_node: Default 2. Trials' syncs that run at once on a node. Each is a process
            of about 100 MB, at a lower priority than training's; a second one is started only
            when the first is kept busy.
        restore_artifacts: Default ``True``. Whether a trial that starts again on a node that lacks
            its artifacts gets them back before its training goes on. Counts with
            ``sync_artifacts`` only.
        verify_content: Default ``False``. Every upload is checked by asking storage for its size
            and, on S3, its checksum. With this, what other storages hold is read back and compared.
        experiment_sync_period: Seconds, default ``None``: as ``sync_period``. The period of the
            driver's directory alone.
        strict: Default ``False``. Whether ``Tuner.fit`` raises ``SyncError`` at the end if
            something could not be synced. Otherwise it is logged and in ``SyncCallback.report``.
        upload_dir: URL of any fsspec protocol, default ``None``. Where the experiment is mirrored
            to, as ``<upload_dir>/<experiment's name>``, in Ray's own layout and with its
            checkpoints. ``storage_path`` is then the fast tier: a local directory, or one that all
            nodes share. ``Tuner.restore`` of the mirror works at any time.
        storage_options: fsspec's options for that URL, as ``{"key": ..., "secret": ...}``; default
            none. They are never written anywhere: a restored experiment takes them from the
            environment (``FSSPEC_S3='{"key": ...}'``, or what the storage's own clients read).
        keep_up: ``"latest"`` (default) or ``"all"``. Which checkpoints are mirrored when there are
            more than the link can take: those that the newest state names, or each that was
            reported, kept on disk (by hard links) until it is there.
        preflight: Default ``True``. Whether every node tries the storage when it is first used.
            What it can't reach is said at once; see ``upload_dir``.

    Raises:
        ValueError: A value makes no sense; the message names the field.

    Example:
        >>> SyncConfig(sync_artifacts=True, sync_period=60, exclude=["**/*.tmp"]).sync_timeout
        1800
        >>> SyncConfig(sync_period=-1)
        Traceback (most recent call last):
        ValueError: SyncConfig.sync_period must be a number of seconds >= 0, not -1
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    follow_symlinks: bool = False
    max_concurrent_transfers: int = 64
    max_syncs_per_node: int = 2
    restore_artifacts: bool = True
    verify_content: bool = False
    experiment_sync_period: float | None = None
    strict: bool = False
    upload_dir: str | None = None
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    keep_up: Literal["latest", "all"] = "latest"
    preflight: bool = True

    def __post_init__(self) -> None:
        # Names of the options that were given, and are not here since this was unpickled.
        self.missing_options: tuple[str, ...] = ()
        self._seconds("sync_period", self.sync_period, positive=False)
        self._seconds("sync_timeout", self.sync_timeout, positive=True)
        if self.experiment_sync_period is not None:
            self._seconds("experiment_sync_period", self.experiment_sync_period, positive=False)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, "True or False")
        for name in ("max_concurrent_transfers", "max_syncs_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._error(name, "a whole number >= 1")
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not isinstance(patterns, Sequence):
                raise self._error(name, "a list of glob patterns")
            try:
                Filter(include=tuple(patterns))
            except ValueError as error:
                raise ValueError(f"SyncConfig.{name}: {error}") from error
            setattr(self, name, tuple(patterns))
        self._check_upload_dir()

    def _check_upload_dir(self) -> None:
        if self.keep_up not in ("latest", "all"):
            raise self._error("keep_up", '"latest" or "all"')
        options = self.storage_options
        if options is not None and not isinstance(options, Mapping):  # whose values are not shown
            raise ValueError("SyncConfig.storage_options must be a mapping of fsspec's options")
        if self.upload_dir is None:
            if options:
                raise ValueError(
                    "SyncConfig.storage_options are those of upload_dir; give that too"
                )
        elif not isinstance(self.upload_dir, str) or not self.upload_dir.strip("/"):
            raise self._error("upload_dir", "a URL of any fsspec protocol, as s3://bucket/dir")
        elif "@" in self.upload_dir.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "SyncConfig.upload_dir has a user or a password in it, which would be written down "
                f"with the experiment: {without_secrets(self.upload_dir)}; use storage_options"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles its RunConfig to storage; it copies it as well (see __copy__).
        given = tuple(sorted(self.storage_options or ())) or self.missing_options
        return {**vars(self), "storage_options": None, "missing_options": given}

    def __copy__(self) -> SyncConfig:
        copied = replace(self)
        copied.missing_options = self.missing_options
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncConfig:
        return self.__copy__()

    def _seconds(self, name: str, value: object, *, positive: bool) -> None:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared, which nan fails; math.isfinite raises OverflowError for huge integers.
        if not numeric or not 0 <= value <= sys.float_info.max or (positive and value == 0):  # type: ignore[operator]
            raise self._error(name, f"a number of seconds {'>' if positive else '>='} 0")

    def _error(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"SyncConfig.{name} must be {wanted}, not {getattr(self, name)!r}")

    def options(self) -> SyncOptions:
        """What the engine needs to know of this to sync a trial's artifacts."""
        return SyncOptions(
            keep=Filter(tuple(self.include), tuple(self.exclude)),
            follow_symlinks=self.follow_symlinks,
            concurrency=self.max_concurrent_transfers,
            timeout_s=self.sync_timeout,
            read_back=self.verify_content,
        )


def resolve(given: tune.SyncConfig | None) -> SyncConfig:
    """Our settings for whatever the user gave: a copy of ours, or Ray's with our defaults.

    Raises:
        ValueError: A value makes no sense; the message names the field.
    """
    if isinstance(given, SyncConfig):
        return copy.copy(given)  # checked again: a field may have been assigned since
    return SyncConfig(**_ray_fields(given)) if given else SyncConfig()


def plain(config: SyncConfig) -> tune.SyncConfig:
    """Only Ray's part: it can be unpickled on a node where this package is not installed."""
    return tune.SyncConfig(**_ray_fields(config))


def _ray_fields(config: tune.SyncConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(tune.SyncConfig)}
