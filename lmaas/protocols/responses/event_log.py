"""Follows the event logs of responses in the background, for clients that stream them from any gateway."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from lmaas.errors import InvalidRequest, NotFound, OverLimit, Unavailable
from lmaas.protocols.responses.background import error_event
from lmaas.states import BackgroundStatus
from lmaas.store.database import Database
from lmaas.store.event_logs import FIRST_EVENT, Log, Piece, progress, read_log

log = logging.getLogger(__name__)

#: The interval at which the progress of all responses that are followed is read: one short statement for each tenant.
LOOK_S = 0.5
#: Logs that are read at a time. The other connections are for other requests.
AT_ONCE = 2
#: The streams that follow responses of one tenant, on one gateway.
MAX_STREAMS = 200
#: The interval of comments in a stream without events. Proxies close connections that are silent for a minute.
COMMENT_EVERY_S = 10.0
COMMENT = b": waiting for the next event\n"
#: The time for which a stream waits for a database that is away.
PATIENCE_S = 30.0
_END = b"\n\n"


class _Follower:
    """One stream: what it has seen of the response's progress, and whether there may be more."""

    def __init__(self) -> None:
        self.seen: tuple[int, bool] | None = None
        self.news = asyncio.Event()


class EventLogs:
    """The event logs that one gateway's streams follow. `run` looks for news, and must be running while there are streams."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._reading = asyncio.Semaphore(AT_ONCE)
        #: By tenant and response.
        self._followers: dict[str, dict[str, set[_Follower]]] = {}
        self._wanted = asyncio.Event()

    async def run(self) -> None:
        """Look for news of all responses that are followed, until cancelled."""
        while True:
            await self._wanted.wait()
            for tenant_id, responses in list(self._followers.items()):
                try:
                    found = await progress(self._db, tenant_id, list(responses))
                except Unavailable as error:
                    log.warning("event logs cannot be read now", extra={"action": "follow", "detail": str(error)})
                    break
                for response_id, followers in responses.items():
                    for follower in followers:
                        if found.get(response_id) != follower.seen:
                            follower.news.set()
            await asyncio.sleep(LOOK_S)

    async def follow(self, tenant_id: str, response_id: str, after: int | None) -> AsyncIterator[bytes]:
        """Return the events of a response after the event with the number `after`, or all, as they are logged.

        Raises NotFound if there is no log, InvalidRequest for a number that no event has yet, and OverLimit if the tenant has too many
        streams.
        """
        streams = sum(map(len, self._followers.get(tenant_id, {}).values()))
        if streams >= MAX_STREAMS:
            raise OverLimit(
                f"You have {streams} streams of responses in the background, the maximum of a gateway. Close some, or retry after 5 s.",
                code="too_many_streams",
                retry_after_s=5,
            )
        cursor = -1 if after is None else after
        first = await self._read(tenant_id, response_id, cursor)
        if first is None:
            raise NotFound(
                "The events of this response are not kept any more. Retrieve it without 'stream'.", code="events_not_found", param="stream"
            )
        last = first.next_event if first.has_ended else first.next_event - 1
        if cursor > last:
            raise InvalidRequest(
                f"'starting_after' is {cursor}, but the latest event has the number {first.next_event - 1}. Send the number of the last "
                "event that you have received.",
                code="invalid_cursor",
                param="starting_after",
            )
        return self._events(tenant_id, response_id, cursor, first)

    async def _read(self, tenant_id: str, response_id: str, cursor: int) -> Log | None:
        async with self._reading:
            return await read_log(self._db, tenant_id, response_id, cursor)

    async def _events(self, tenant_id: str, response_id: str, cursor: int, found: Log | None) -> AsyncIterator[bytes]:
        with self._following(tenant_id, response_id) as follower:
            while True:
                if found is None:
                    yield error_event(cursor + 1, "response_deleted", "The response was deleted.")
                    return
                ending = _ending(found, cursor)
                if ending is not None:
                    yield ending
                    return
                if found.pieces:
                    for piece in found.pieces:
                        yield rest_of(piece, cursor)
                        cursor = piece.last
                    found = replace(found, pieces=())
                    if cursor >= found.next_event - 1:
                        continue
                elif found.has_ended:
                    return
                else:
                    follower.seen = (found.next_event, found.has_ended)
                    async for comment in self._until_news(follower):
                        yield comment
                try:
                    found = await self._again(tenant_id, response_id, cursor)
                except Unavailable as error:
                    # With the number of the last event, after which the client can go on.
                    yield error_event(max(cursor, 0), error.error_code, error.message)
                    return

    async def _until_news(self, follower: _Follower) -> AsyncIterator[bytes]:
        while True:
            try:
                async with asyncio.timeout(COMMENT_EVERY_S):
                    await follower.news.wait()
            except TimeoutError:
                yield COMMENT
            else:
                follower.news.clear()
                return

    async def _again(self, tenant_id: str, response_id: str, cursor: int) -> Log | None:
        """Read more of a log. A database that is away for a while does not end the stream. Raises Unavailable after PATIENCE_S."""
        began = time.monotonic()
        while True:
            try:
                return await self._read(tenant_id, response_id, cursor)
            except Unavailable:
                if time.monotonic() - began > PATIENCE_S:
                    raise
                await asyncio.sleep(LOOK_S)

    @contextmanager
    def _following(self, tenant_id: str, response_id: str) -> Iterator[_Follower]:
        follower = _Follower()
        responses = self._followers.setdefault(tenant_id, {})
        responses.setdefault(response_id, set()).add(follower)
        self._wanted.set()
        try:
            yield follower
        finally:
            responses[response_id].discard(follower)
            if not responses[response_id]:
                del responses[response_id]
            if not responses:
                del self._followers[tenant_id]
            if not self._followers:
                self._wanted.clear()


def rest_of(piece: Piece, cursor: int) -> bytes:
    """Return the events of a piece after the one with the number `cursor`."""
    if cursor < piece.first:
        return piece.events
    return _END.join(piece.events.split(_END)[cursor - piece.first + 1 :])


def _ending(found: Log, cursor: int) -> bytes | None:
    """Return the event that ends a stream after the event `cursor` for another reason than the response's own end, if there is one."""
    if FIRST_EVENT <= cursor < found.first_event - 1:
        return error_event(
            found.first_event - 1,
            "response_restarted",
            "The process that ran this response died, so the response runs again from its beginning. Discard its earlier output, and "
            "stream it again after this event.",
        )
    if found.pieces:
        return None
    if found.status is BackgroundStatus.CANCELLED and cursor < found.next_event:
        return error_event(found.next_event, "response_cancelled", "The response was cancelled.")
    if not found.is_whole:
        return error_event(
            found.next_event,
            "event_log_full",
            "The response has more events than are kept. Retrieve it without 'stream' once it has ended.",
        )
    return None
