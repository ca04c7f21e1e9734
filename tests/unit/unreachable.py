"""A gateway whose servers cannot be reached: whatever it answers to a request, it answers without them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from lmaas.adapters.objects import AdapterFiles
from lmaas.app import Services, build_gateway, object_store_url
from lmaas.config import Settings
from lmaas.gateway import auth
from lmaas.keys import hash_key, new_key
from lmaas.scheduling.client import Scheduler, connect
from lmaas.store.database import Database
from lmaas.types import Principal, Role

TENANT = Principal("key_1", Role.TENANT_ADMIN, "ten_1", "acme", 10, "standard")
OPERATOR = Principal("key_2", Role.OPERATOR, None, None, 0, "standard")


@asynccontextmanager
async def client_of(principal: Principal, home: Path, **changes: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key of `principal`, which is all that the gateway knows. `changes` are other settings."""
    settings = Settings(home=home, **changes)  # type: ignore[arg-type]
    db = Database("postgresql://nobody@127.0.0.1:1/none")
    redis = connect(f"unix://{home}/none.sock")
    key = new_key()

    async def known(_: Database, key_hash: str) -> Principal | None:
        return principal if key_hash == hash_key(key) else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "find_principal", known)
        app, _ = build_gateway(settings, Services(db, redis, Scheduler(redis), AdapterFiles(object_store_url(settings))))
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers={"authorization": f"Bearer {key}"}) as client:
            yield client
    await redis.aclose()
    await db.close()
