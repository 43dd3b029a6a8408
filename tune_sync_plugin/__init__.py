"""Incremental, non-blocking, safe file syncing for Ray Tune, as one callback.

The public names and nothing else. They are imported on first use, so that a sync task, which needs
only the engine, does not pay for importing Ray Tune.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_sync_plugin.callback import SyncCallback
    from tune_sync_plugin.config import SyncConfig
    from tune_sync_plugin.errors import SyncError
    from tune_sync_plugin.report import ExperimentReport, FileFailure, SyncReport

__version__ = "0.1.0"

__all__ = [
    "ExperimentReport",
    "FileFailure",
    "SyncCallback",
    "SyncConfig",
    "SyncError",
    "SyncReport",
    "__version__",
]

_HOME = {
    "SyncCallback": "callback",
    "SyncConfig": "config",
    "SyncError": "errors",
    "ExperimentReport": "report",
    "FileFailure": "report",
    "SyncReport": "report",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
