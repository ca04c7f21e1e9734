"""Calls to Redis that wait at the same moment, sent together: the client library costs more than the server."""

import asyncio
from typing import Any

from redis.asyncio import Redis

#: A bound for the replies that one pipeline holds, and for how long the first call waits for the last one's reply.
MAX_BATCH = 128

Command = tuple[str | int, ...]


class Batch:
    """Sends commands as non-transactional pipelines: what is asked for while one is under way goes out with the next.

    A lone command goes out at once. Each is answered by its own reply or error; nobody's cancellation reaches the others.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def call(self, *command: str | int) -> Any:
        """The reply. Raises redis.exceptions.RedisError."""
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, reply))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="redis-batch")
        return await reply

    async def _send(self) -> None:
        batch: list[tuple[Command, asyncio.Future[Any]]] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                # Who was cancelled before it was sent wants nothing any more.
                batch = [(command, reply) for command, reply in batch if not reply.done()]
                if batch:
                    await self._exchange(batch)
        finally:
            # Cancelled only when the process ends: then nobody must wait for ever.
            for _, reply in (*batch, *self._waiting):
                reply.cancel()
            self._waiting, self._sending = [], None

    async def _exchange(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for command, _ in batch:
            pipeline.execute_command(*command)
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001 (whatever it is, each caller hears it)
            replies = [error] * len(batch)
        for (_, reply), value in zip(batch, replies, strict=True):
            if reply.done():
                continue  # its caller was cancelled
            if isinstance(value, Exception):
                reply.set_exception(value)
            else:
                reply.set_result(value)
