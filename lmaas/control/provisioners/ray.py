"""Runs replicas as Ray actors. Ray places each actor on a node, and its autoscaler adds nodes for actors that do not fit yet.

Each replica is a detached actor named `<pool id>/<replica id>` in the stack's namespace, so that it outlives the controller and the next
controller finds it. Ray never restarts an actor: the controller decides whether there is another replica. An actor that waits for a node is
listed as well, because it will run.
"""

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import RayError

from lmaas.config import Settings
from lmaas.control.provisioners.ray_node import NodeReplica
from lmaas.control.provisioners.resources import parse_resources
from lmaas.engine.zygote.policy import FIRST_START_S
from lmaas.errors import Unavailable
from lmaas.types import Resources

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The time that a call to Ray may take, including the connection.
CALL_S = 30.0
#: Settings that nodes do not get. Each node has its own home and its own engine address, and replicas do not need operators' or tenants'
#: keys.
NOT_FOR_NODES = frozenset({"LMAAS_HOME", "LMAAS_ENGINE_HOST", "LMAAS_OPERATOR_KEY", "LMAAS_API_KEY"})
#: Nodes run no zygote, because Ray would not account for its memory.
ON_NODES = {"LMAAS_ZYGOTE": "off"}
#: The time that the reason of an actor's end may take to arrive. The node knows it when the actor has ended.
WORDS_S = 2.0
#: The number of ended replicas whose reason is kept until it is read.
ENDS_KEPT = 100
#: The exceptions that Ray raises when it cannot be reached or refuses a call.
FAILURES = (RayError, OSError, RuntimeError, ValueError)


class RayProvisioner:
    """Starts supervisors on the nodes of a Ray cluster.

    Ray's API blocks and has one connection for the whole process, so a single thread makes all calls.
    """

    def __init__(self, settings: Settings, call_s: float = CALL_S) -> None:
        self._settings, self._call_s = settings, call_s
        self._resources = parse_resources(settings.ray_resources)
        self._environment = {name: value for name, value in settings.environment().items() if name not in NOT_FOR_NODES} | ON_NODES
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        #: The results of the replicas started by this process: what their actors return, or what Ray reports. Used only by the thread.
        self._ends: dict[str, ObjectRef[str]] = {}

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Start an actor on a node with the needed resources, now or when there is one. Raises OSError if Ray refuses."""
        try:
            await self._call(self._start, replica_id, pool_id, needs)
        except Unavailable as error:
            raise OSError(error.message) from error

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, or remove it from Ray's queue. Killing a replica that has ended is no error."""
        await self._call(self._kill, replica_id)

    async def list(self) -> dict[str, str]:
        """Return the replicas that have an actor, on a node or waiting for one: replica id → pool id. Raises Unavailable if Ray does not
        respond, because the running replicas are then unknown."""
        return await self._call(self._list)

    async def last_words(self, replica_id: str) -> str:
        """Return the reason why a replica has ended, as its supervisor or Ray reports it. Empty for a replica that another controller
        started."""
        return await self._call(self._last_words, replica_id)

    def start_delay_s(self) -> float:
        """Return the seconds that a start takes longer at present than usual."""
        return 0.0

    def first_start_s(self) -> float:
        """Return the duration of a start in seconds, without that delay, for a base model without earlier starts. Nodes run no zygote."""
        return FIRST_START_S["plain"]

    async def capacity(self) -> Resources | None:
        """Return the configured capacity, or else the nodes' capacity if their number is fixed, or else None, because Ray may add nodes."""
        settings = self._settings
        if settings.ray_cpus is not None:
            return Resources(settings.ray_cpus, settings.ray_accelerators or 0)
        return await self._call(self._held) if settings.ray_nodes == "fixed" else None

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        future: Future[T] = Future()
        self._calls.put((future, functools.partial(self._connected, function, *arguments)))
        if self._thread is None:
            # A daemon thread, because the threads of an executor are joined at exit, and a call that hangs would keep the controller from
            # exiting.
            self._thread = threading.Thread(target=self._work, name="ray", daemon=True)
            self._thread.start()
        try:
            async with asyncio.timeout(self._call_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Unavailable(f"Ray has not responded within {self._call_s:.0f} s. See whether its head node is up.") from None

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            # The caller may have given up a call that was queued behind one that hung.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = call()
            except BaseException as error:  # noqa: BLE001 (the caller gets it)
                future.set_exception(error)
            else:
                future.set_result(found)

    def _connected(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            if not ray.is_initialized():
                ray.init(self._settings.ray_address, log_to_driver=False, configure_logging=False)
            return function(*arguments)
        except FAILURES as error:
            # After a failure, the connection may belong to a cluster that has gone.
            ray.shutdown()
            self._ends.clear()
            raise Unavailable(f"Ray: {error}") from error

    def _start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        settings = self._settings
        resources = dict(self._resources)
        memory = resources.pop("memory", None)
        actor = ray.remote(NodeReplica).options(
            name=f"{pool_id}/{replica_id}",
            namespace=settings.ray_namespace,
            lifetime="detached",
            max_restarts=0,
            num_cpus=needs.cpus,
            num_gpus=needs.accelerators,
            memory=memory,
            resources=resources,
            scheduling_strategy="SPREAD",
        )
        handle = actor.remote(replica_id, self._environment, str(settings.ray_node_home))
        # Through Ray's client, the actor does not exist before its id does, and the next `list` must have it.
        handle._actor_id.hex()
        self._ends[replica_id] = handle.watch.remote()

    def _kill(self, replica_id: str) -> None:
        for name in self._names():
            if name.rpartition("/")[2] == replica_id:
                try:
                    ray.kill(ray.get_actor(name, namespace=self._settings.ray_namespace), no_restart=True)
                except ValueError:
                    log.info("a replica has ended before it was killed", extra={"action": "kill", "replica_id": replica_id})

    def _list(self) -> dict[str, str]:
        found = {replica_id: pool_id for pool_id, _, replica_id in (name.rpartition("/") for name in self._names())}
        for replica_id in [one for one in self._ends if one not in found][:-ENDS_KEPT]:
            del self._ends[replica_id]
        return found

    def _last_words(self, replica_id: str) -> str:
        end = self._ends.pop(replica_id, None)
        if end is None or not ray.wait([end], timeout=WORDS_S)[0]:
            return ""
        try:
            return str(ray.get(end))
        except RayError as error:
            # The text is a traceback, and its last line is the cause.
            return str(error).strip().rpartition("\n")[2].strip()

    def _names(self) -> set[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in actors if actor["namespace"] == self._settings.ray_namespace}

    def _held(self) -> Resources:
        held = ray.cluster_resources()
        return Resources(float(held.get("CPU", 0.0)), int(held.get("GPU", 0.0)))
