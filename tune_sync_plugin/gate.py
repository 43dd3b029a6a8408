"""Promises: references that Ray's workers can wait for and that the driver fulfils.

A trial that starts again must not be restored before its old node has been flushed. When that is
the case is known to the driver alone, whose queue the flush stands in, retries included; and Ray
has no object whose value comes later. So a tiny actor waits in its stead.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tune_sync_plugin.errors import describe

logger = logging.getLogger(__name__)


class _Gates:
    """The actor: everybody who waits for a key is let through once it is open."""

    def __init__(self) -> None:
        self._events: dict[int, asyncio.Event] = {}

    def _event(self, key: int) -> asyncio.Event:
        return self._events.setdefault(key, asyncio.Event())

    async def wait(self, key: int) -> None:
        await self._event(key).wait()

    async def open(self, key: int) -> None:
        self._event(key).set()


class Gates:
    """Makes promises, and keeps them. The actor starts with the first one.

    Example:
        >>> gates = Gates()  # doctest: +SKIP
        >>> promise = gates.promise()  # doctest: +SKIP
        >>> gates.open(promise)  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._actor: Any = None
        self._keys: dict[Any, int] = {}
        self._numbers = itertools.count()

    def promise(self) -> Any:
        """A reference that becomes ready when it is given to :meth:`open`."""
        if self._actor is None:
            here = ray.get_runtime_context().get_node_id()
            self._actor = (
                ray.remote(_Gates)
                .options(
                    num_cpus=0,
                    max_concurrency=10_000,
                    # Those who wait when it dies are let through, those who come later wait again.
                    max_restarts=-1,
                    # The driver's node: if it dies, so does the driver.
                    scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
                )
                .remote()
            )
        key = next(self._numbers)
        reference = self._actor.wait.remote(key)
        self._keys[reference] = key
        return reference

    def open(self, promise: Any) -> None:
        """Fulfil a promise. One that is fulfilled, or was given up by :meth:`close`, stays so."""
        if self._actor is None or promise not in self._keys:
            return
        self._actor.open.remote(self._keys.pop(promise))

    def close(self) -> None:
        """End the actor; whoever still waits is let through with an error."""
        if self._actor is not None:
            try:
                ray.kill(self._actor)
            except Exception as error:
                logger.debug("ending the gates' actor failed: %s", describe(error))
            self._actor = None
