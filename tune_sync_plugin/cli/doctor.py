"""Whether this machine, or every node of a Ray cluster, can use a storage; and what to do if not.

Each writes, reads and deletes a small object, by ``preflight.py``. Ray is imported only where a
cluster is asked for.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tune_sync_plugin.cli.places import Place
from tune_sync_plugin.errors import SyncError, describe
from tune_sync_plugin.preflight import LIMIT_S, START_S, Finding, Preflight, try_storage

_STEP_S = 0.05
_CONNECT_S = 10.0


@dataclass(frozen=True)
class Checked:
    """What came of one machine's try.

    Attributes:
        node: Who: the node's id, or ``"this machine"``.
        address: The node's IP address.
        error: What does not work, and what to do; ``None`` if all does.
        ahead_s: Seconds that its clock is ahead of this machine's, or behind if negative.
    """

    node: str
    address: str = ""
    error: str | None = None
    ahead_s: float = 0.0

    @property
    def is_well(self) -> bool:
        """Whether there is nothing to do."""
        return self.error is None and not self.ahead_s

    def __str__(self) -> str:
        who = f"node {self.node[:8]} ({self.address})" if self.address else self.node
        wrong = [self.error] if self.error else []
        if self.ahead_s:
            way = "ahead of" if self.ahead_s > 0 else "behind"
            wrong.append(
                f"its clock is {abs(self.ahead_s):.0f} s or more {way} this machine's. Files' "
                "times are compared with it: set it, as by NTP"
            )
        return f"{who}: {'; '.join(wrong) or 'ok'}"


def check_here(place: Place) -> Checked:
    """Try the storage from this machine.

    Example:
        >>> import tempfile
        >>> print(check_here(Place(tempfile.mkdtemp())))
        this machine: ok
    """
    error, _ = try_storage(place)
    return Checked("this machine", error=error)


def check_cluster(place: Place, address: str) -> list[Checked]:
    """Try the storage from every node of a Ray cluster that is alive.

    Args:
        place: The storage; its options travel to the nodes.
        address: As ``ray.init`` takes it: ``"auto"``, ``"host:port"``.

    Raises:
        SyncError: There is no such cluster.
    """
    import ray

    from tune_sync_plugin.executor import RayExecutor

    with _connected(address):
        addresses = {
            node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]
        }
        executor = RayExecutor(place, ray.get_runtime_context().get_node_id())
        try:
            found = _ask(executor, list(addresses))
        finally:
            executor.close()
    return [
        Checked(node, addresses[node], finding.error, finding.ahead_s)
        for node, finding in sorted(found.items(), key=lambda each: addresses[each[0]])
    ]


def _ask(executor: Any, nodes: list[str]) -> dict[str, Finding]:
    preflight = Preflight(executor)
    for node in nodes:
        preflight.check(node)
    found = dict(preflight.findings)
    end = time.monotonic() + 2 * (START_S + LIMIT_S)
    while len(found) < len(nodes) and time.monotonic() < end:
        found |= preflight.poll()
        time.sleep(_STEP_S)
    missing = Finding("it did not answer. Is it alive, and not overloaded?")
    return {node: found.get(node, missing) for node in nodes}


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    import ray

    from tune_sync_plugin.tune_internals import cluster_address

    if ray.is_initialized():  # whoever calls us is a driver already
        yield
        return
    try:
        with socket.create_connection(cluster_address(address), timeout=_CONNECT_S):
            pass
        # Nothing of the nodes' own output, which may be what a program reads.
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except Exception as error:
        raise SyncError(
            f"no Ray cluster at {address}: {describe(error)}. Start one (ray start --head), or "
            "correct --address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
