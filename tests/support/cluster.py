"""A Ray cluster of several real nodes on this machine, each with a disk (temp_dir) of its own.

What belongs here: starting, killing and removing nodes. What runs on them is the tests' business.
All nodes share one IP address: tell them apart by node id.
All paths are short because Ray puts unix sockets, limited to about 100 characters, below them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import ray
import ray._private.services
from ray.cluster_utils import Cluster

HOST = "127.0.0.1"  # with any other address, 127.0.0.2 too, Ray listens on all interfaces
REPOSITORY = Path(__file__).resolve().parents[2]
# Ray's own is ten seconds.
_METRICS = {"metrics_report_interval_ms": 500}
_DETECTION = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500}


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables of this process for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _python_path() -> str:
    """Where Ray's processes find `tune_sync_plugin` and `tests`."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def connect(address: str, **options: Any) -> None:
    """Make this process a driver of a :class:`LocalCluster`."""
    # ray.init would turn the loopback address into the machine's, where no node listens.
    with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", str):
        ray.init(address=address, _node_ip_address=HOST, logging_level="WARNING", **options)


class LocalCluster:
    """A head node, to which the driver connects, and worker nodes; a context manager.

    They nest: the driver belongs to the innermost, and goes back to the one around it after that.

    Workers are numbered from 1 in the order they were added, and keep their number when one
    dies. Unless told otherwise, number n offers the resource `workern`, to pin trials to it.

    Example:
        >>> with LocalCluster(workers=2) as cluster:  # doctest: +SKIP
        ...     ref = train.options(resources={"worker1": 1}).remote()
        ...     cluster.kill_node(1)

    Args:
        workers: How many worker nodes to start with.
        num_cpus: Of each worker node.
        head_num_cpus: Of the head node; 0 keeps all trials off it.
        resources: Custom resources of the first, second, ... worker.
        env_vars: Environment of all nodes' processes, on top of the driver's.
        object_store_mb: Of each node.
        log_to_driver: Whether the nodes' output appears in the test's output.
        metrics: Whether nodes export metrics, which takes ``ray[default]`` and seconds per node.
    """

    _entered: ClassVar[list[LocalCluster]] = []

    def __init__(
        self,
        workers: int = 2,
        *,
        num_cpus: float = 2,
        head_num_cpus: float = 0,
        resources: Sequence[Mapping[str, float]] = (),
        env_vars: Mapping[str, str] | None = None,
        object_store_mb: int = 80,
        log_to_driver: bool = False,
        metrics: bool = False,
    ) -> None:
        self._workers = workers
        self._num_cpus = num_cpus
        self._head_num_cpus = head_num_cpus
        self._resources = resources
        self._env_vars = dict(env_vars or {})
        self._object_store_bytes = object_store_mb * 1024 * 1024
        self._log_to_driver = log_to_driver
        self._metrics = metrics
        self._cluster: Any = None
        self._nodes: list[Any] = []  # the head first
        self._stack = contextlib.ExitStack()
        self.temp_dirs: list[Path] = []
        """Of the head node and then of each worker, by number."""

    def __enter__(self) -> LocalCluster:
        with contextlib.ExitStack() as stack:
            # Ray publishes its newest cluster's address below RAY_TMPDIR for all `ray.init()`
            # of the machine to join; ours is nobody else's.
            address_dir = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
            stack.callback(shutil.rmtree, address_dir, ignore_errors=True)
            (address_dir / "ray").mkdir()
            stack.enter_context(
                _environment(RAY_TMPDIR=str(address_dir), RAY_USAGE_STATS_ENABLED="0")
            )
            stack.callback(self._stop)
            self._cluster = Cluster()
            self._start_node(
                num_cpus=self._head_num_cpus,
                include_dashboard=False,
                no_monitor=True,
                _system_config=_DETECTION | (_METRICS if self._metrics else {}),
            )
            for _ in range(self._workers):
                self.add_node()
            if self._entered:
                ray.shutdown()
            self._entered.append(self)
            stack.callback(self._leave)
            connect(self.address, log_to_driver=self._log_to_driver)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _leave(self) -> None:
        ray.shutdown()
        self._entered.remove(self)
        if self._entered:
            connect(self._entered[-1].address, log_to_driver=self._entered[-1]._log_to_driver)

    def _stop(self) -> None:
        self._cluster.shutdown()
        for path in self.temp_dirs:
            shutil.rmtree(path, ignore_errors=True)

    def _start_node(self, env_vars: Mapping[str, str] | None = None, **options: Any) -> str:
        temp_dir = Path(tempfile.mkdtemp(prefix="ts", dir="/tmp"))
        self.temp_dirs.append(temp_dir)
        # What Ray looks for to see whether ray[default] is installed.
        hidden = {} if self._metrics else {"ray.dashboard.optional_deps": None}
        with mock.patch.dict(sys.modules, hidden):
            node = self._cluster.add_node(
                temp_dir=str(temp_dir),
                node_ip_address=HOST,
                object_store_memory=self._object_store_bytes,
                include_log_monitor=self._log_to_driver,
                env_vars={"PYTHONPATH": _python_path(), **self._env_vars, **(env_vars or {})},
                **options,
            )
        self._nodes.append(node)
        return str(node.node_id)

    def add_node(
        self,
        *,
        num_cpus: float | None = None,
        resources: Mapping[str, float] | None = None,
        env_vars: Mapping[str, str] | None = None,
    ) -> str:
        """Add a worker node and return its id, once the cluster knows it.

        Args:
            num_cpus: As given to the cluster when None.
            resources: Custom resources; `{"workern": 1}` when None.
            env_vars: Environment of the node's processes, on top of the cluster's `env_vars`.
        """
        number = len(self._nodes)
        if resources is None:
            given = self._resources[number - 1 : number]
            resources = given[0] if given else {f"worker{number}": 1}
        return self._start_node(
            env_vars,
            num_cpus=self._num_cpus if num_cpus is None else num_cpus,
            resources=dict(resources),
        )

    def kill_node(self, number: int) -> None:
        """Kill worker `number` (from 1) with SIGKILL, as a machine that loses power.

        Returns at once; the cluster marks the node dead some 2.5 s later.
        """
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def head_node_id(self) -> str:
        return str(self._nodes[0].node_id)

    @property
    def node_ids(self) -> list[str]:
        """The ids of all workers, killed ones too: worker n's is `node_ids[n - 1]`."""
        return [str(node.node_id) for node in self._nodes[1:]]
