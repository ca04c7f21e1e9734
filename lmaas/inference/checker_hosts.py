"""The gateway's client for the hosts that run checkers. They have the models' files, and check grammars and read prompts without an
engine."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from lmaas.cancellation import unswallowed
from lmaas.engine.client import CONNECTION_ERRORS, EngineClient
from lmaas.engine.grammars.verdict import key_of

#: The time for which a checker's address is cached, and the time that an answer may take.
ADDRESS_S = 5.0
ANSWER_S = 150.0
CONNECT_S = 2.0
#: The time for which an unreachable checker is tried again, and the interval between attempts.
RETRY_S, AGAIN_S = 15.0, 0.25

T = TypeVar("T")


class NoCheckerError(Exception):
    """No host that runs checkers is known."""


class CheckerUnavailable(Exception):
    """The host does not respond, or Redis, which knows its address."""


class CheckerHosts:
    """Finds the host for a base model, and sends it questions."""

    def __init__(self, redis: Redis, client: EngineClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis, self._client, self._clock = redis, client, clock
        self._addresses: dict[str, tuple[float, str]] = {}

    async def address(self, model_id: str) -> str:
        """Return the URL of the host for this base model. Raises NoCheckerError, and CheckerUnavailable while Redis is away."""
        now = self._clock()
        found, url = self._addresses.get(model_id, (-math.inf, ""))
        if now - found > ADDRESS_S:
            try:
                with unswallowed():
                    url = str(await self._redis.get(key_of()) or await self._redis.get(key_of(model_id)) or "")
            except RedisError as error:
                raise CheckerUnavailable from error
            if not url:
                raise NoCheckerError
            self._addresses[model_id] = (now, url)
        return url

    async def ask(self, path: str, model_id: str, question: bytes, decode: Callable[[bytes], T]) -> T:
        """Return the host's answer. For RETRY_S, try repeatedly, because another host takes over when one ends.

        Raises CheckerUnavailable.
        """
        deadline = time.monotonic() + RETRY_S
        while True:
            try:
                return decode(await self._exchange(f"{await self.address(model_id)}{path}", model_id, question))
            except (NoCheckerError, *CONNECTION_ERRORS, msgspec.DecodeError) as error:
                self._addresses.pop(model_id, None)
                if time.monotonic() > deadline:
                    raise CheckerUnavailable from error
            await asyncio.sleep(AGAIN_S)

    async def _exchange(self, url: str, model_id: str, question: bytes) -> bytes:
        timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S)
        async with self._client.session.post(url, params={"model": model_id}, data=question, timeout=timeout) as response:
            answer = await response.read()
            if response.status != 200:
                raise CheckerUnavailable
            return answer
