"""vLLM itself on a cluster of two nodes: the node of the engine is killed while requests run and wait."""

import asyncio
from typing import Any

import pytest
from rich.console import Console

from lmaas.config import Settings
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.replicas import list_replicas
from lmaas.store.tenants import create_key
from lmaas.types import Role
from lmaas.up.bootstrap import register_model
from tests.integration.gateway.stack import Stream
from tests.support.conditions import until
from tests.system.chaos.service import Service
from tests.system.e2e.conftest import MODEL, ROOT, START_S
from tests.system.faults.conftest import Caller
from tests.system.ray.cluster import Fleet, restart_ended, service_on

ADAPTER = ROOT / "tenants" / "adapters" / "acme-json"
SLOTS = 2
TOKENS = 100


@pytest.mark.usefixtures("model_folder")
async def test_a_node_with_vllm_dies_and_what_waits_is_answered_by_the_next(fleet: Fleet) -> None:
    changes: dict[str, Any] = {
        "engine_module": Settings().engine_module,
        "engine_max_num_seqs": SLOTS,
        "engine_max_model_len": 512,
        "engine_kv_cache_bytes": 2**28,
        "engine_max_replicas": 1,
        "engine_cpus": 2.0,
        "ray_resources": "vllm=1",
        "queue_deadline_s": START_S,
    }
    with fleet.nodes_with(2, "vllm", 2):
        async with service_on(fleet.address, **changes) as service:
            await lose_a_node(fleet, service)


async def lose_a_node(fleet: Fleet, service: Service) -> None:
    """Run the test, once there are nodes."""
    service.model = await register_model(service.settings, service.db, Console(quiet=True))
    (client,) = await service.clients("acme", 1, adapters=0, max_queued=256)
    admin = new_key()
    await create_key(service.db, client.tenant_id, Role.TENANT_ADMIN, "admin", hash_key(admin), shown_prefix(admin))
    caller = Caller(service, client)
    async with caller.http("gateway-0", admin) as http:
        files = {
            part: (ADAPTER / name).read_bytes()
            for part, name in (("adapter_config", "adapter_config.json"), ("adapter_model", "adapter_model.safetensors"))
        }
        answer = await http.post("/v1/adapters", data={"name": "json-bot", "base_model": MODEL}, files=files)
        assert answer.status_code in (200, 201), answer.text
    streams = [Stream() for _ in range(3 * SLOTS)]
    tasks = [caller.stream(stream, tokens=TOKENS, model=("json-bot", MODEL)[number % 2]) for number, stream in enumerate(streams)]
    await until(lambda: sum(1 for stream in streams if stream.raw) >= SLOTS, START_S)
    (supervisor,) = service.supervisors().values()
    engines = supervisor.children(recursive=True)
    await asyncio.to_thread(fleet.kill, fleet.node_of(supervisor))

    async def all_ended() -> bool:
        restart_ended(service)
        return all(task.done() for task in tasks)

    await until(all_ended, START_S)
    await asyncio.gather(*tasks)
    assert not any(engine.is_running() for engine in engines), "no process of the node is left"
    cut = [stream for stream in streams if not stream.done]
    assert len(cut) <= SLOTS
    assert all(stream.tokens > 0 and stream.error is not None for stream in cut)
    assert all(0 < stream.tokens <= TOKENS for stream in streams)
    ledger = await caller.ledger(*(stream.headers["x-request-id"] for stream in streams))
    assert sorted(event.status for event in ledger.values()) == sorted(["failed"] * len(cut) + ["completed"] * (len(streams) - len(cut)))
    states = sorted(row.observed for row in await list_replicas(service.db, ended=True))
    assert states == ["lost", "ready"]
