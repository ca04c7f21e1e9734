"""Replicas as Ray actors: Ray finds each a node, and its autoscaler adds nodes for those that have none yet.

Every replica is a detached actor, named `<pool id>/<replica id>` in the stack's namespace, so that it outlives the controller and the
next controller finds it. Ray restarts none of them: whether there is a next replica is the controller's decision. An actor without a node
is listed as well, for it is on its way.
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
from lmaas.errors import Unavailable
from lmaas.types import Resources

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long Ray may take for a call, connecting included.
CALL_S = 30.0
#: A node has a home of its own, and an address that its engine listens on; and keys of people are no business of replicas.
NOT_FOR_NODES = frozenset({"LMAAS_HOME", "LMAAS_ENGINE_HOST", "LMAAS_OPERATOR_KEY", "LMAAS_API_KEY"})
#: Nobody keeps a zygote on a node: its memory would be nobody's in Ray's books.
ON_NODES = {"LMAAS_ZYGOTE": "off"}
#: Why an actor is gone is known when it is; this is for the word to come here.
WORDS_S = 2.0
#: Of so many that have ended it is remembered why, for when somebody asks.
ENDS_KEPT = 100
#: What Ray raises when it cannot be reached, or when its answer is no.
FAILURES = (RayError, OSError, RuntimeError, ValueError)


class RayProvisioner:
    """Starts supervisors on the nodes of a Ray cluster.

    Ray's API blocks, and holds one connection for the whole process: a single thread of our own makes all calls.
    """

    def __init__(self, settings: Settings, call_s: float = CALL_S) -> None:
        self._settings, self._call_s = settings, call_s
        self._resources = parse_resources(settings.ray_resources)
        self._environment = {name: value for name, value in settings.environment().items() if name not in NOT_FOR_NODES} | ON_NODES
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        #: How those end that we have started ourselves: what their actors answer then, or Ray says of them. Our thread's own.
        self._ends: dict[str, ObjectRef[str]] = {}

    async def start(self, replica_id: str, pool_id: str, needs: Resources) -> None:
        """Have an actor started on a node that has what the replica needs, now or later. Raises OSError if Ray does not take it."""
        try:
            await self._call(self._start, replica_id, pool_id, needs)
        except Unavailable as error:
            raise OSError(error.message) from error

    async def kill(self, replica_id: str) -> None:
        """End a replica's processes now, or take it from Ray's queue. Killing one that is gone is no error."""
        await self._call(self._kill, replica_id)

    async def list(self) -> dict[str, str]:
        """The replicas that have an actor, on a node or waiting for one: replica id → pool id. Raises Unavailable if Ray does not answer:
        nobody knows then what runs."""
        return await self._call(self._list)

    async def last_words(self, replica_id: str) -> str:
        """Why it is gone: as its supervisor said, or Ray says of its actor. Empty for one that another controller has started."""
        return await self._call(self._last_words, replica_id)

    async def capacity(self) -> Resources | None:
        """By setting; else what the nodes hold now if their number is fixed; else unknown, for Ray's autoscaler may add nodes."""
        settings = self._settings
        if settings.ray_cpus is not None:
            return Resources(settings.ray_cpus, settings.ray_accelerators or 0)
        return await self._call(self._held) if settings.ray_nodes == "fixed" else None

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        future: Future[T] = Future()
        self._calls.put((future, functools.partial(self._connected, function, *arguments)))
        if self._thread is None:
            # Nobody waits for it at the end, as for an executor's: a call that hangs would keep the controller from ending.
            self._thread = threading.Thread(target=self._work, name="ray", daemon=True)
            self._thread.start()
        try:
            async with asyncio.timeout(self._call_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise Unavailable(f"Ray has not answered within {self._call_s:.0f} s.") from None

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            # Nobody waits any more for one that was queued behind a call that hung.
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = call()
            except BaseException as error:  # noqa: BLE001 (whoever waits gets it)
                future.set_exception(error)
            else:
                future.set_result(found)

    def _connected(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            if not ray.is_initialized():
                ray.init(self._settings.ray_address, log_to_driver=False, configure_logging=False)
            return function(*arguments)
        except FAILURES as error:
            # A connection that has failed once may be one to a cluster that is gone.
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
        # Through Ray's client, the actor is not there before its id is: the next list must have it.
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
            # The whole is a traceback; its end is the cause.
            return str(error).strip().rpartition("\n")[2].strip()

    def _names(self) -> set[str]:
        actors = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in actors if actor["namespace"] == self._settings.ray_namespace}

    def _held(self) -> Resources:
        held = ray.cluster_resources()
        return Resources(float(held.get("CPU", 0.0)), int(held.get("GPU", 0.0)))
