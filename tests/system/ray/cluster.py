"""Real Ray clusters of several nodes on this machine, and services whose replicas run on them."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray._private.node import Node
from ray.cluster_utils import Cluster

from tests.support.conditions import until
from tests.support.processes import free_port
from tests.system.chaos.service import Service

#: Environment variables of Ray and its child processes.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray does not limit memory here: other processes of the machine use it as well.
    "RAY_memory_monitor_refresh_ms": "0",
    # Turns off progress bars and tips.
    "RAY_LOG_TO_DRIVER": "0",
    # Ray ignores a token that this user has for other clusters.
    "RAY_AUTH_MODE": "disabled",
}
#: The smallest object store that Ray accepts; lmaas stores nothing there.
STORE_BYTES = 80 * 2**20
#: A node is dead after 1.5 s instead of 15.
ATTENTIVE = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}


class Fleet:
    """A cluster whose nodes the test adds and kills. Its head holds no replica."""

    def __init__(self, folder: Path, *, client_port: int) -> None:
        self.folder = folder
        head = {"num_cpus": 0, "include_dashboard": False, "ray_client_server_port": client_port, "_system_config": ATTENTIVE}
        with untidy():
            self._cluster = Cluster(True, head_node_args=head | {"object_store_memory": STORE_BYTES}, shutdown_at_exit=False)
        self.address = str(self._cluster.address)
        self.nodes: list[Node] = []

    @contextmanager
    def nodes_with(self, cpus: float, resource: str, count: int) -> Iterator[None]:
        """Add this many nodes, each with one of `resource`; those that are left end with the block."""
        added = [self._add(cpus, {resource: 1}) for _ in range(count)]
        try:
            yield
        finally:
            for node in added:
                if node in self.nodes:
                    self.kill(node)

    def _add(self, cpus: float, resources: dict[str, float]) -> Node:
        with untidy():
            node = self._cluster.add_node(num_cpus=cpus, resources=resources, object_store_memory=STORE_BYTES, include_dashboard=False)
        self.nodes.append(node)
        return node

    def processes(self, node: Node) -> list[psutil.Process]:
        """Return the node's raylet, and all processes that it has started."""
        (raylet,) = node.all_processes["raylet"]
        top = psutil.Process(raylet.process.pid)
        return [top, *top.children(recursive=True)]

    def node_of(self, process: psutil.Process) -> Node:
        """Return the node that a process runs on."""
        (node,) = [node for node in self.nodes if process in self.processes(node)]
        return node

    def kill(self, node: Node) -> None:
        """Kill a node without any message from it, as a power cut does."""
        # All are stopped first, so that none of them sees another die.
        doomed = self.processes(node)
        for step in (signal.SIGSTOP, signal.SIGKILL):
            for process in doomed:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(step)
        self.nodes.remove(node)
        with untidy():
            self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End every node, the head last."""
        # A test may have left a driver's connection, which holds the head.
        with untidy():
            ray.shutdown()
            self._cluster.shutdown()


@contextmanager
def untidy() -> Iterator[None]:
    """Ignore the logs that Ray leaves open for the processes that it starts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


@contextmanager
def temporary_ray() -> Iterator[Path]:
    """Provide a folder of their own for Ray's processes that are started in the block; they are gone at its end."""
    # Short: a Unix socket's path may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    ours = {"RAY_TMPDIR": str(folder), **QUIET}
    before = {name: os.environ.get(name) for name in (*ours, "RAY_ADDRESS")}
    os.environ.update(ours)
    os.environ.pop("RAY_ADDRESS", None)
    try:
        yield folder
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
        _kill_all(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _kill_all(folder: Path) -> None:
    """Kill every process that has the folder in its environment, until there is none: some start others again."""
    while True:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("RAY_TMPDIR") == str(folder):
                    process.kill()
                    found.append(process)
        gone, _ = psutil.wait_procs(found, timeout=10)
        if not gone:
            return


@contextmanager
def autoscaled(nodes: dict[str, float], most: int) -> Iterator[str]:
    """Start a head alone, with an autoscaler that adds up to `most` nodes with such resources; provide its address.

    `ray.cluster_utils.AutoscalingCluster` does this too, but it ends every Ray on the machine, and needs a file that Ray's wheel lacks.
    """
    with temporary_ray() as folder:
        address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        types = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": nodes | {"object_store_memory": STORE_BYTES}, "node_config": {}, "min_workers": 0, "max_workers": most},
        }
        provider: dict[str, Any] = {"type": "fake_multinode", "gcs_address": address}
        provider |= {"use_node_id_as_ip": True, "disable_node_updaters": True, "disable_launch_config_check": True}
        config = {
            "cluster_name": "fake_multinode",
            "max_workers": most,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": 0.05,
        }
        # These nodes need no installation, but Ray requires the fields.
        config |= {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False}
        steps = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        config |= {f"{step}_commands": [] for step in steps} | {"rsync_exclude": [], "rsync_filter": []}
        (folder / "autoscaler.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=0", f"--port={address.rpartition(':')[2]}"]
        command += [f"--autoscaling-config={folder / 'autoscaler.json'}", f"--object-store-memory={STORE_BYTES}"]
        command += [
            f"--node-ip-address={address.rpartition(':')[0]}",
            "--include-dashboard=false",
            "--disable-usage-stats",
            f"--ray-client-server-port={free_port()}",
        ]
        environment = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        started = subprocess.run(command, env=environment, check=False, timeout=120, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert started.returncode == 0, started.stdout.decode()
        yield address


@asynccontextmanager
async def service_on(address: str, *, fake: str = "", **changes: Any) -> AsyncIterator[Service]:
    """Run a service whose replicas run on the cluster at `address`. Their homes on the nodes are the service's own folder."""
    home = Path(tempfile.mkdtemp(prefix="lmaas-ray-"))
    on_ray: dict[str, Any] = {"provisioner": "ray", "ray_address": address, "ray_namespace": home.name, "ray_node_home": home}
    service = Service(home, fake, on_ray | changes)
    async with AsyncExitStack() as exits:
        exits.callback(service.close)
        await service.bootstrap()
        exits.push_async_callback(service.db.close)
        exits.push_async_callback(service.scheduler.redis.aclose)
        for gateway in service.gateways:
            await until(partial(answers, service.url(gateway)))
        yield service


def restart_ended(service: Service) -> None:
    """Restart ended processes, as an init system does. On one machine Ray attaches a controller to any of the nodes, and if that node died,
    the controller has died with it."""
    for name in service.ended():
        service.start(name)


async def answers(url: str) -> bool:
    """Return whether a gateway is ready."""
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient() as http:
            return (await http.get(f"{url}/readyz")).status_code == 200
    return False
