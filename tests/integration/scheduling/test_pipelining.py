"""Calls to Redis that are sent together, on a real server."""

import asyncio
from typing import Any

import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

from lmaas.scheduling import pipelining as module
from lmaas.scheduling.client import connect
from lmaas.scheduling.pipelining import PipelinedConnection
from lmaas.web.loop import Loop
from tests.support.conditions import until


async def at_once(pipelined: PipelinedConnection, *commands: tuple[str | int, ...]) -> list[Any]:
    """Send commands at once, and return the reply to each."""
    return await asyncio.gather(*(pipelined.send(*command) for command in commands), return_exceptions=True)


async def sent(redis: Redis, command: str) -> int:
    """Return how often the server received a command."""
    stats: Any = await redis.info("commandstats")
    return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])


class Between:
    """A proxy between a server and its client, which replaces one of the server's replies."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.instead = b""
        self.connections: list[asyncio.StreamWriter] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        answers, asks = await asyncio.open_unix_connection(self._path)

        async def answer() -> None:
            while said := await answers.read(2**16):
                writer.write(self.instead or said)
                self.instead = b""

        answering = asyncio.create_task(answer())
        while asked := await reader.read(2**16):
            asks.write(asked)
        answering.cancel()
        asks.close()
        writer.close()


@pytest.mark.parametrize("size", [1, 3, 128])
async def test_each_gets_its_own_reply_or_error(redis: Redis, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(module, "MAX_COMMANDS", size)
    pipelined = PipelinedConnection(redis)
    answers = await at_once(pipelined, *[("ECHO", f"é{number}") if number % 3 else ("NONSENSE", number) for number in range(20)])
    for number, answer in enumerate(answers):
        if number % 3:
            assert answer == f"é{number}"
        else:
            assert isinstance(answer, ResponseError)
    assert await pipelined.send("ECHO", 5) == "5"


async def test_somebody_who_leaves_takes_nobody_along(redis: Redis) -> None:
    pipelined = PipelinedConnection(redis)
    await pipelined.send("PING")
    await redis.client_pause(200)
    under_way = [asyncio.ensure_future(pipelined.send("INCR", "a")) for _ in range(3)]
    await asyncio.sleep(0)
    await until(lambda: not pipelined.unsent, every_s=0)
    waiting = [asyncio.ensure_future(pipelined.send("INCR", "b")) for _ in range(3)]
    await until(lambda: pipelined.unsent == 3, every_s=0)
    under_way[0].cancel()
    waiting[0].cancel()
    answers = await asyncio.gather(*under_way, *waiting, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError)
    assert isinstance(answers[3], asyncio.CancelledError)
    # Commands that were cancelled before they were sent were not sent; the replies to the others are not shifted.
    assert (answers[1:3], answers[4:]) == ([2, 3], [1, 2])


async def test_a_lost_connection_is_made_again(redis: Redis) -> None:
    pipelined = PipelinedConnection(redis)
    number = await pipelined.send("CLIENT", "ID")
    await redis.client_kill_filter(_id=str(number))
    assert await at_once(pipelined, ("ECHO", "a"), ("ECHO", "b")) == ["a", "b"]
    assert await pipelined.send("CLIENT", "ID") != number


async def test_a_server_that_stalls_fails_all_who_wait_and_is_asked_again(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.01))
    pipelined = PipelinedConnection(redis)
    await pipelined.send("PING")
    await redis.client_pause(600)
    first = asyncio.ensure_future(pipelined.send("ECHO", "a"))
    await until(lambda: pipelined.under_way and not pipelined.unsent, every_s=0)
    answers = await asyncio.gather(first, pipelined.send("ECHO", "b"), return_exceptions=True)
    assert [type(answer) for answer in answers] == [RedisTimeout, RedisTimeout]

    async def back() -> bool:
        try:
            return bool(await pipelined.send("ECHO", "c") == "c")  # never a late reply to another call
        except RedisError:
            return False

    await until(back, every_s=0.01)


async def test_however_often_it_is_tried_it_ends_in_time(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.05)
    monkeypatch.setattr(module, "GIVE_UP_S", 0.1)
    monkeypatch.setattr(module, "PAUSES_S", (0.0,) * 10_000)
    pipelined = PipelinedConnection(redis)
    await pipelined.send("PING")
    await redis.client_pause(60_000, all=False)
    async with asyncio.timeout(30):
        with pytest.raises(RedisTimeout):
            await pipelined.send("INCR", "a")
    await redis.client_unpause()


async def test_a_connection_that_was_cut_off_at_hand_is_not_taken(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 60.0)
    between = Between(valkey_url.removeprefix("unix://"))
    server = await asyncio.start_server(between, "127.0.0.1", 0)
    async with server, connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as redis:
        await redis.ping()
        between.connections[0].close()
        await asyncio.sleep(0.1)  # until its end is here
        pipelined = PipelinedConnection(redis)
        async with asyncio.timeout(module.ANSWER_S / 2):
            assert await pipelined.send("ECHO", "A") == "A"
        for connection in between.connections:
            connection.close()


async def test_replies_that_came_before_the_connection_was_lost_are_not_asked_for_again(redis: Redis) -> None:
    pipelined = PipelinedConnection(redis)
    before = await sent(redis, "incr")
    number = await pipelined.send("CLIENT", "ID")
    # The second command ends the connection before the third gets its reply.
    answers = await at_once(pipelined, ("INCR", "a"), ("CLIENT", "KILL", "ID", number, "SKIPME", "no"), ("ECHO", "x"))
    assert answers[0] == 1
    assert answers[2] == "x"
    assert await sent(redis, "incr") == before + 1


@pytest.mark.parametrize(
    "said",
    [
        b"-LOADING the dataset\r\n",
        b"-NOAUTH Authentication required.\r\n",
        b"+A\r\n+one too many\r\n",
        b"nonsense\r\n",
        b"$2\r\n\xff\xff\r\n",
    ],
)
async def test_a_reply_that_cannot_be_is_asked_for_on_a_new_connection(valkey_url: str, said: bytes) -> None:
    between = Between(valkey_url.removeprefix("unix://"))
    server = await asyncio.start_server(between, "127.0.0.1", 0)
    async with server, connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as redis:
        pipelined = PipelinedConnection(redis)
        assert await pipelined.send("ECHO", "A") == "A"
        between.instead = said
        assert await pipelined.send("ECHO", "A") == "A"
        assert await at_once(pipelined, ("ECHO", "B"), ("ECHO", "C")) == ["B", "C"]
        assert len(between.connections) == 2
        for connection in between.connections:
            connection.close()


@pytest.mark.parametrize(("said", "connections"), [(b"+one too many\r\n", 2), (b">2\r\n$4\r\nnews\r\n$2\r\nno\r\n", 1)])
async def test_what_nobody_asked_for_is_nobodys_reply(valkey_url: str, said: bytes, connections: int) -> None:
    between = Between(valkey_url.removeprefix("unix://"))
    server = await asyncio.start_server(between, "127.0.0.1", 0)
    async with server, connect(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0") as redis:
        pipelined = PipelinedConnection(redis)
        await pipelined.send("PING")
        between.connections[0].write(said)
        if connections == 2:
            await until(lambda: not pipelined.connected, every_s=0.01)
        answers = [await pipelined.send("ECHO", number) for number in range(50)]
        assert answers == [str(number) for number in range(50)]
        assert len(between.connections) == connections
        for connection in between.connections:
            connection.close()


async def test_who_has_gone_is_not_sent_again(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 0.2)
    pipelined = PipelinedConnection(redis)
    await pipelined.send("PING")
    await redis.client_pause(300)
    gone = pipelined.send("INCR", "gone")
    stays = asyncio.ensure_future(pipelined.send("INCR", "stays"))
    await until(lambda: not pipelined.unsent, every_s=0)
    gone.cancel()
    await stays
    # A command that was in flight may have been executed once; it is not sent a second time.
    assert int(await redis.get("gone") or 0) <= 1
    assert int(await redis.get("stays") or 0) >= 1


def test_on_the_gateways_loop_and_with_a_password(valkey_url: str) -> None:
    async def run() -> None:
        async with connect(valkey_url) as redis:
            await redis.acl_setuser("pipelined", enabled=True, passwords=["+secret"], categories=["+@all"], keys=["*"])
        path = valkey_url.removeprefix("unix://")
        async with connect(f"unix://pipelined:secret@{path}") as redis:
            pipelined = PipelinedConnection(redis)
            assert await at_once(pipelined, *[("ECHO", number) for number in range(300)]) == [str(number) for number in range(300)]
            number = await pipelined.send("CLIENT", "ID")
            await redis.client_kill_filter(_id=str(number), skipme=False)
            assert await at_once(pipelined, ("ECHO", "a"), ("ACL", "WHOAMI")) == ["a", "pipelined"]
            with pytest.raises(ResponseError):
                await pipelined.send("NONSENSE")

    uvloop.run(run(), loop_factory=Loop)


async def test_at_the_end_of_the_process_nobody_waits_for_ever(redis: Redis) -> None:
    pipelined = PipelinedConnection(redis)
    await redis.client_pause(100)
    waiting = [asyncio.ensure_future(pipelined.send("PING")) for _ in range(2)]
    await until(lambda: pipelined.under_way and not pipelined.unsent, every_s=0)
    [sending] = [task for task in asyncio.all_tasks() if task.get_name() == "redis-pipelining"]
    sending.cancel()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 2
    assert await pipelined.send("PING") in ("PONG", True)
