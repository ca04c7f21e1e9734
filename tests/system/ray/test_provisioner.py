"""The provisioner on a real Ray cluster, with supervisors that end soon, because they get no database."""

import contextlib
import fcntl
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from lmaas.config import Settings
from lmaas.control.provisioners.ray import RayProvisioner
from lmaas.control.provisioners.ray_node import KEPT, forget_ended
from lmaas.errors import Unavailable
from lmaas.types import Resources
from tests.support.conditions import until
from tests.system.ray.cluster import Fleet

ONE = Resources(1, 0)


@pytest.fixture(scope="module")
def node_with_two(fleet: Fleet) -> Iterator[Fleet]:
    """The cluster with one node of two CPUs."""
    with fleet.nodes_with(2, "plain", 1):
        yield fleet


@pytest.fixture
async def settings(node_with_two: Fleet, tmp_path: Path) -> AsyncIterator[Settings]:
    """Settings of a stack of this test's own, on the cluster."""
    yield Settings(
        home=tmp_path / "controller",
        provisioner="ray",
        ray_address=node_with_two.address,
        ray_namespace=tmp_path.name,
        ray_node_home=tmp_path / "node",
        ray_resources="plain=1",
    )
    provisioner = RayProvisioner(Settings(ray_address=node_with_two.address, ray_namespace=tmp_path.name))
    for replica in await provisioner.list():
        await provisioner.kill(replica)
    ray.shutdown()


async def test_a_replica_is_listed_until_its_supervisor_ends(settings: Settings) -> None:
    provisioner = RayProvisioner(settings)
    assert await provisioner.list() == {}
    await provisioner.start("rep_1", "mod_a", ONE)
    assert await provisioner.list() == {"rep_1": "mod_a"}
    log = settings.ray_node_home / "replicas" / "rep_1" / "supervisor.log"

    async def ended() -> bool:
        return await provisioner.list() == {}

    await until(ended)
    assert "LMAAS_DATABASE_URL" in log.read_text(), "it has run on the node"


async def test_why_one_is_gone_is_known(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ill_homed = RayProvisioner(replace(settings, ray_node_home=tmp_path / "file" / "home"))
    provisioner = RayProvisioner(settings)
    for each, replica in ((ill_homed, "rep_1"), (provisioner, "rep_2")):
        await each.start(replica, "mod_a", ONE)

    async def gone() -> bool:
        return await provisioner.list() == {}

    await until(gone)
    assert (await ill_homed.last_words("rep_1")).startswith("NotADirectoryError: [Errno 20] Not a directory")
    assert "LMAAS_DATABASE_URL" in await provisioner.last_words("rep_2")
    # The provisioner knows nothing of a replica that another process has started, nor of one whose end it has reported.
    assert await provisioner.last_words("rep_1") == await provisioner.last_words("rep_2") == ""


async def test_one_that_has_no_node_yet_is_listed_and_can_be_killed(settings: Settings) -> None:
    provisioner = RayProvisioner(settings)
    await provisioner.start("rep_1", "mod_a", Resources(1000, 0))
    assert await RayProvisioner(settings).list() == {"rep_1": "mod_a"}
    await provisioner.kill("rep_1")
    await provisioner.kill("rep_1")

    async def gone() -> bool:
        return await provisioner.list() == {}

    await until(gone)


async def test_stacks_do_not_see_each_other(settings: Settings, node_with_two: Fleet) -> None:
    other = RayProvisioner(Settings(ray_address=node_with_two.address, ray_namespace="another"))
    await RayProvisioner(settings).start("rep_1", "mod_a", Resources(1000, 0))
    assert await other.list() == {}
    await other.kill("rep_1")
    assert await RayProvisioner(settings).list() == {"rep_1": "mod_a"}


async def test_what_machines_hold(settings: Settings, node_with_two: Fleet) -> None:
    def provisioner(**changes: object) -> RayProvisioner:
        return RayProvisioner(Settings(ray_address=node_with_two.address, **changes))  # type: ignore[arg-type]

    assert await provisioner().capacity() is None
    assert await provisioner(ray_nodes="fixed").capacity() == Resources(2.0, 0)
    assert await provisioner(ray_cpus=64.0, ray_accelerators=8).capacity() == Resources(64.0, 8)


@pytest.mark.skipif(" " in sys.executable, reason="Ray's client cannot start its server if the path of Python has a space")
async def test_from_outside_through_rays_client(settings: Settings, client_port: int) -> None:
    ray.shutdown()
    outside = RayProvisioner(
        Settings(ray_address=f"ray://127.0.0.1:{client_port}", ray_namespace=settings.ray_namespace, ray_node_home=settings.ray_node_home),
        call_s=120,
    )

    async def started() -> bool:
        # Ray starts a server for each client, and gives up when that takes 30 s on a busy machine.
        with contextlib.suppress(OSError):
            await outside.start("rep_1", "mod_a", Resources(1000, 0))
            return True
        return False

    await until(started, 300)
    assert await outside.list() == {"rep_1": "mod_a"}
    await outside.kill("rep_1")

    async def gone() -> bool:
        return await outside.list() == {}

    await until(gone)


async def test_without_ray_nobody_knows_what_runs() -> None:
    ray.shutdown()
    provisioner = RayProvisioner(Settings(ray_address="ray.invalid:port"))
    with pytest.raises(Unavailable, match="Ray"):
        await provisioner.list()
    with pytest.raises(OSError, match="Ray"):
        await provisioner.start("rep_1", "mod_a", ONE)


async def test_a_ray_that_does_not_answer_stops_nobody(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    provisioner = RayProvisioner(settings, call_s=5.0)
    await provisioner.list()
    answer = threading.Event()

    def silent(**_: object) -> list[dict[str, str]]:
        answer.wait()
        return []

    monkeypatch.setattr(ray.util, "list_named_actors", silent)
    provisioner = RayProvisioner(settings, call_s=0.05)
    with pytest.raises(Unavailable, match="not responded"):
        await provisioner.list()
    answer.set()


def test_what_ended_replicas_leave_on_a_node(tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        folder = tmp_path / f"rep_{number}"
        (folder / "adapters").mkdir(parents=True)
        (folder / "engine.log").touch()
        os.utime(folder, (number, number))
    running = tmp_path / "rep_0"
    with (running / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(running, (0, 0))
        forget_ended(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"rep_0", *(f"rep_{number}" for number in range(3, KEPT + 3))}
    assert [path.parent.name for path in tmp_path.glob("*/adapters")] == ["rep_0"]
