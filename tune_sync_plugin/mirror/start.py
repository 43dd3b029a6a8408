"""Whether an experiment is mirrored, and with which options."""

from __future__ import annotations

import logging
import os

import ray

from tune_sync_plugin import tune_internals
from tune_sync_plugin.config import SyncConfig
from tune_sync_plugin.engine.local_storage import LocalStorage
from tune_sync_plugin.engine.storage import storage_at
from tune_sync_plugin.engine.sync import SyncOptions
from tune_sync_plugin.engine.urls import below, protocol_of, without_secrets
from tune_sync_plugin.errors import SyncError
from tune_sync_plugin.mirror.actor import Mirror, MirrorSettings
from tune_sync_plugin.mirror.tasks import MirrorRun

logger = logging.getLogger(__name__)

# Options that clients find by themselves where one of these variables is set.
_CREDENTIALS = {"key", "secret", "token", "username", "password", "account_key", "sas_token"}
_ENVIRONMENT = (
    *("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"),
)


def start_mirror(
    storage: tune_internals.Storage, config: SyncConfig, options: SyncOptions
) -> Mirror | None:
    """Start mirroring an experiment; ``None`` if that is not wanted.

    Raises:
        SyncError: It is wanted and can't be done; says why, and what to do.
    """
    if config.upload_dir is None:
        return None
    source = storage_at(storage.filesystem, storage.experiment_path)
    if not isinstance(source, LocalStorage):
        if storage.resumed:
            logger.info("SyncCallback: restored from %s, so there is no upload_dir", source.name)
            return None
        raise SyncError(
            f"upload_dir mirrors a storage_path that is a directory, of this machine or shared by "
            f"all nodes; {source.name} is none. Leave upload_dir out, or give such a storage_path"
        )
    name = os.path.basename(storage.experiment_path.rstrip("/"))
    run = MirrorRun(
        storage.experiment_path,
        tune_internals.STORAGE_MARK,
        below(config.upload_dir, name),
        storage_options(config),
        storage.session_subdir,
        options,
    )
    settings = MirrorSettings(
        config.sync_period,
        config.sync_timeout,
        config.max_syncs_per_node,
        config.keep_up == "all",
        config.preflight,
    )
    mirror = Mirror(run, settings, ray.get_runtime_context().get_node_id())
    if config.preflight:
        try:
            mirror.check()
        except SyncError:
            mirror.close()
            raise
    return mirror


def storage_options(config: SyncConfig) -> dict[str, object]:
    """Those that were given, and those of the environment that fsspec reads.

    Raises:
        SyncError: The experiment was restored, and some that it began with are missing.
    """
    from fsspec.config import conf

    protocol = protocol_of(config.upload_dir or "")
    options = {**conf.get(protocol, {}), **(config.storage_options or {})}
    missing = set(config.missing_options) - set(options)
    if any(os.environ.get(name) for name in _ENVIRONMENT):
        missing -= _CREDENTIALS
    if missing:
        raise SyncError(
            f"upload_dir {without_secrets(config.upload_dir or '')} was used with the "
            f"storage_options {', '.join(sorted(missing))}, which are never saved. Give them to "
            f"the process that restores, in its environment: FSSPEC_{protocol.upper()}="
            f"'{{\"{min(missing)}\": ...}}'"
        )
    return options
