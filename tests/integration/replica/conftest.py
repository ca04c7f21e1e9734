"""Fixtures for the tests of a supervisor."""

import asyncio

import pytest

from lmaas.engine.client import EngineClient


@pytest.fixture
def may_start(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """An event that delays starts: until it is set, no engine is found healthy, so a test can observe a start for as long as it needs."""
    healthy, may_start = EngineClient.healthy, asyncio.Event()

    async def gated(client: EngineClient, url: str) -> bool:
        return may_start.is_set() and await healthy(client, url)

    monkeypatch.setattr(EngineClient, "healthy", gated)
    return may_start
