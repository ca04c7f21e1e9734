"""A client with the operator's key for the stack of a test."""

from collections.abc import AsyncIterator

import httpx
import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.gateway.stack import Stack
from tests.integration.schemas import CHECKED


@pytest.fixture
async def operator_key(stack: Stack) -> str:
    key = new_key()
    await create_key(stack.db, None, Role.OPERATOR, "test", hash_key(key), shown_prefix(key))
    return key


@pytest.fixture
async def operator(stack: Stack, operator_key: str) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {operator_key}"}
    async with httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60, event_hooks=CHECKED) as client:
        yield client
