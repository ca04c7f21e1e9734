"""A gateway whose servers cannot be reached, so that every response is made without them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.types import ASGIApp

from lmaas.adapters.objects import AdapterFiles
from lmaas.app import Services, build_gateway, object_store_url
from lmaas.config import Settings
from lmaas.keys import hash_key, new_key
from lmaas.scheduling.client import Scheduler, connect
from lmaas.store.database import Database
from lmaas.store.objects import Objects
from lmaas.types import Principal, Role
from lmaas.web import auth

OPERATOR = Principal("key_1", Role.OPERATOR, None, None, 0, "standard")
TENANT = Principal("key_2", Role.TENANT_ADMIN, "ten_1", "acme", 10, "standard")
INFERENCE = Principal("key_3", Role.INFERENCE, "ten_1", "acme", 10, "standard")


@dataclass(frozen=True)
class UnreachableGateway:
    """The gateway, and the key of each of its principals."""

    app: ASGIApp
    keys: dict[Principal, str]

    def client(self, principal: Principal) -> httpx.AsyncClient:
        """Return a client with the key of a principal."""
        headers = {"authorization": f"Bearer {self.keys[principal]}"}
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://gateway", headers=headers)


@asynccontextmanager
async def unreachable_gateway(home: Path) -> AsyncIterator[UnreachableGateway]:
    """Build a gateway that finds three keys, and can reach no server."""
    settings = Settings(home=home)
    db = Database("postgresql://nobody@127.0.0.1:1/none")
    redis = connect(f"unix://{home}/none.sock")
    keys = {principal: new_key() for principal in (OPERATOR, TENANT, INFERENCE)}
    known = {hash_key(key): principal for principal, key in keys.items()}

    async def find(_: Database, key_hash: str) -> Principal | None:
        return known.get(key_hash)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "find_principal", find)
        objects = Objects(object_store_url(settings))
        app, _ = build_gateway(settings, Services(db, redis, Scheduler(redis), objects, AdapterFiles(objects)))
        yield UnreachableGateway(app, keys)
    await redis.aclose()
    await db.close()
