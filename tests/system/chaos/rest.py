"""Waiting until a service is at rest."""

from typing import Any

from tests.support.conditions import until
from tests.system.chaos.service import Service


async def comes_to_rest(service: Service) -> None:
    """Wait until no slot is taken, no request waits, and Valkey knows of no request any more: the ledger has everything."""
    redis = service.scheduler.redis

    async def rest() -> bool:
        for model in service.models:
            stats = await service.scheduler.stats(model.id)
            busy = [replica for replica in stats["replicas"].values() if replica["load"] or replica["running"]]
            if stats["queued"] or stats["load"] or busy:
                return False
        return not await _requests_in(redis)

    try:
        await until(rest)
    except BaseException:
        print(await service.scheduler.stats(service.model.id), await _requests_in(redis))  # noqa: T201
        raise


async def _requests_in(redis: Any) -> list[str]:
    """Return everything in Valkey that names a request: tickets, leases, queues, checkpoints, usage events."""
    found = []
    async for key in redis.scan_iter("*"):
        kind = await redis.type(key)
        match kind:
            case "hash":
                text = str(await redis.hkeys(key))  # some values are bytes
            case "zset":
                text = str(await redis.zrange(key, 0, -1))
            case "stream":
                text = str(await redis.xrange(key))
            case "set":
                text = str(await redis.smembers(key))
            case "list":
                text = str(await redis.lrange(key, 0, -1))
            case _:
                text = str(await redis.get(key))
        if "req_" in text or "req_" in key:
            found.append(f"{key}: {text[:500]}")
    return found
