"""SyncConfig: Ray's four settings plus ours, and their validation. Nothing here does I/O."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ray import tune

from tune_sync_plugin.engine.filters import Filter
from tune_sync_plugin.engine.sync import SyncOptions

_SWITCHES = (
    "sync_artifacts",
    "sync_artifacts_on_checkpoint",
    "follow_symlinks",
    "restore_artifacts",
    "verify_content",
    "strict",
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

    def __post_init__(self) -> None:
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
        return replace(given)  # checked again: a field may have been assigned since
    return SyncConfig(**_ray_fields(given)) if given else SyncConfig()


def plain(config: SyncConfig) -> tune.SyncConfig:
    """Only Ray's part: it can be unpickled on a node where this package is not installed."""
    return tune.SyncConfig(**_ray_fields(config))


def _ray_fields(config: tune.SyncConfig) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in fields(tune.SyncConfig)}
