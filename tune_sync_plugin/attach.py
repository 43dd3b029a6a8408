"""What runs in a trial's own actor before its training does.

Imports as little as it can: each trial of a run waits for it. Only those that start again need the
engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tune_sync_plugin import tune_internals

if TYPE_CHECKING:
    from tune_sync_plugin.report import RestoreReport
    from tune_sync_plugin.restoring import Restoring


class Attached(NamedTuple):
    """What attaching to a trial found out: see :func:`tune_internals.attach`."""

    logdir: str
    nodes: list[str]
    restored: RestoreReport | None


def attach(trainable: Any, restoring: Restoring | None) -> Attached:
    """Take over a trial's artifacts, and bring back those that this node lacks.

    Runs inside the trial's actor before its training code does. Restoring never fails it.
    """
    restored = None
    if restoring:
        from tune_sync_plugin.restoring import bring_back

        restored = bring_back(restoring)
    return Attached(*tune_internals.attach(trainable), restored)
