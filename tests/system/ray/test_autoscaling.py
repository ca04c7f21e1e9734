"""Nodes from zero: Ray's autoscaler adds one for the demand of lmaas, and removes it when nothing runs there any more. Fake engines."""

import contextlib

import psutil

from tests.support.conditions import until
from tests.system.faults.conftest import Caller
from tests.system.ray.cluster import autoscaled, service_on


def raylets(address: str) -> int:
    """Return the number of the cluster's nodes, including its head."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            command = process.cmdline()
            found += command[:1] != [] and command[0].endswith("/raylet") and f"--gcs-address={address}" in command
    return found


async def test_a_node_comes_for_a_request_and_goes_when_it_is_idle() -> None:
    with autoscaled({"CPU": 1}, most=2) as address:
        assert raylets(address) == 1
        async with service_on(address, idle_timeout_s=2, engine_max_replicas=1) as service:
            (client,) = await service.clients("acme", 1, adapters=1, max_queued=256)
            caller = Caller(service, client)
            response = await caller.ask(model=client.models[1])
            assert response.status_code == 200, response.text + service.logs()
            assert raylets(address) == 2
            await until(lambda: not service.supervisors())
            await until(lambda: raylets(address) == 1, 120)
            assert service.ended() == {}
