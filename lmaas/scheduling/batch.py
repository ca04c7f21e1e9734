"""Calls to Redis that wait at the same moment, sent together: the client library costs more than the server."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeout

#: A bound for what is sent at once, and so for how long a call waits for those before it.
MAX_BATCH = 128
#: How long the server may take to answer all of it, on one connection; and how long that is tried in all: clients wait for it.
ANSWER_S = 3.0
GIVE_UP_S = 5.0
#: How long to wait before each attempt. Each but the first is on a new connection.
PAUSES_S = (0.0, 0.05, 0.2)

Command = tuple[bytes | str | int, ...]
Waiting = tuple[bytes, "asyncio.Future[Any]"]


class Batch:
    """Sends commands on one connection, without a transaction: what is asked for while some are under way goes out after them, together.

    A lone command goes out at once. Each is answered by its own reply or error, and nobody's cancellation reaches the others. Commands
    whose reply was lost with the connection are sent again: they must bear it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: deque[Waiting] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None

    async def call(self, *command: bytes | str | int) -> Any:
        """The reply. Raises redis.exceptions.RedisError."""
        return await self.send(*command)

    def send(self, *command: bytes | str | int) -> "asyncio.Future[Any]":
        """Have a command go out, whether or not somebody waits; the future gets the reply or the error."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Packed here: what cannot be packed is its caller's own error.
        self._waiting.append((_pack(command), reply))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="redis-batch")
        return reply

    async def _send(self) -> None:
        batch: deque[Waiting] = deque()
        try:
            while self._waiting:
                # Who was cancelled before it was sent wants nothing any more.
                taken = (self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH)))
                batch = deque((packed, reply) for packed, reply in taken if not reply.done())
                if batch:
                    await self._exchange(batch)
        except Exception as error:  # noqa: BLE001 (whatever it is, each caller hears it)
            # Those behind too: they would wait as long for the same server.
            for _, reply in (*batch, *self._waiting):
                if not reply.done():
                    reply.set_exception(error)
        finally:
            # Something is left only if this was cancelled, at the end of the process: then nobody must wait for ever.
            for _, reply in (*batch, *self._waiting):
                reply.cancel()
            self._waiting.clear()
            self._sending = None

    async def _exchange(self, batch: deque[Waiting]) -> None:
        """Answer the batch, and take out of it whoever is answered. Raises RedisError for the others."""
        lost: RedisError | None = None
        deadline = asyncio.get_running_loop().time() + GIVE_UP_S
        for pause_s in PAUSES_S:
            if pause_s:
                await asyncio.sleep(pause_s)
            connection = await self._connected(deadline)
            try:
                # The connection closes itself when it fails or is cut off here: no late reply is taken for another's.
                async with asyncio.timeout_at(_soon(deadline)):
                    await connection.send_packed_command(b"".join(packed for packed, _ in batch), check_health=False)
                    while batch:
                        answer = await _reply(connection)
                        _, reply = batch.popleft()
                        if reply.done():
                            continue  # its caller was cancelled
                        if isinstance(answer, ResponseError):
                            reply.set_exception(answer)
                        else:
                            reply.set_result(answer)
            except RedisConnectionError as error:
                lost = error
            except TimeoutError:
                lost = RedisTimeout(f"no answer within {ANSWER_S:.0f} s")
            else:
                return
        raise lost or RedisTimeout("not sent")

    async def _connected(self, deadline: float) -> AbstractConnection:
        """The connection, by the loop's time. Raises RedisError if there is none to be had, which has been tried more than once then."""
        try:
            # The library tries to connect for much longer by itself, the first time as well.
            async with asyncio.timeout_at(_soon(deadline)):
                if self._connection is None:
                    connection: AbstractConnection = await self._redis.connection_pool.get_connection()  # type: ignore[no-untyped-call]
                    # One timeout for the whole batch is ours. The library's own, for each reply, cost more than the reply.
                    connection.socket_timeout = None
                    self._connection = connection
                elif not self._connection.is_connected:
                    await self._connection.connect()  # type: ignore[no-untyped-call]
        except TimeoutError:
            raise RedisTimeout("no connection in time") from None
        return self._connection


def _soon(deadline: float) -> float:
    return min(asyncio.get_running_loop().time() + ANSWER_S, deadline)


def _pack(command: Command) -> bytes:
    pack: Callable[[Any], bytes] = pack_command  # hiredis describes a tuple of one element
    return pack(command)


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
