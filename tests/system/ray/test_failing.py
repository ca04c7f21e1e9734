"""A node on which no replica can begin: operators see the reason. Fake engines."""

import asyncio
from pathlib import Path

from lmaas.store.replicas import list_replicas
from tests.support.conditions import until
from tests.system.faults.conftest import Caller
from tests.system.ray.cluster import Fleet, service_on


async def test_a_node_that_cannot_be_written_is_the_reason(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with fleet.nodes_with(1, "failing", 1):
        async with service_on(fleet.address, ray_resources="failing=1", ray_node_home=tmp_path / "file" / "home") as service:
            (client,) = await service.clients("acme", 1, adapters=1, max_queued=10)
            waiting = asyncio.create_task(Caller(service, client).ask(model=client.models[1]))

            async def lost() -> list[str | None]:
                return [row.reason for row in await list_replicas(service.db, ended=True) if row.observed == "lost"]

            await until(lost)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            for reason in await lost():
                assert str(reason).startswith("its supervisor is gone: NotADirectoryError: [Errno 20] Not a directory")
