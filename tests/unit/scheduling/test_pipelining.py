"""A server that accepts connections and sends nothing."""

import asyncio

import pytest
from redis.exceptions import TimeoutError as RedisTimeout

from lmaas.scheduling import pipelining as module
from lmaas.scheduling.client import connect
from lmaas.scheduling.pipelining import PipelinedConnection


async def test_a_first_connection_that_says_nothing_ends_in_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library by itself would try for 20 s."""
    monkeypatch.setattr(module, "ANSWER_S", 0.1)
    monkeypatch.setattr(module, "GIVE_UP_S", 0.2)
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    async with silent, connect(f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}/0") as away:
        pipelined = PipelinedConnection(away)
        async with asyncio.timeout(15):
            for _ in range(2):
                with pytest.raises(RedisTimeout):
                    await pipelined.send("PING")
        assert accepted
        for writer in accepted:
            writer.close()
