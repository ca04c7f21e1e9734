"""What the tests of a supervisor share."""

import asyncio

import pytest

from lmaas.engine.client import EngineClient


@pytest.fixture
def may_start(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Until this is set, engines start: none is found healthy, however long the test takes to look."""
    healthy, may_start = EngineClient.healthy, asyncio.Event()

    async def gated(client: EngineClient, url: str) -> bool:
        return may_start.is_set() and await healthy(client, url)

    monkeypatch.setattr(EngineClient, "healthy", gated)
    return may_start
