"""The metering writer: moves usage events from the pools' streams in Redis to the ledger in Postgres."""

import logging
from collections.abc import Iterable
from typing import Any

from redis.asyncio import Redis

from lmaas.metering.usage import parse_event
from lmaas.store.database import Database
from lmaas.store.usage import UnrecordableEventError, UsageEvent, record_events

log = logging.getLogger(__name__)

#: Events that are moved together.
EVENTS_AT_ONCE = 500
#: The most unreadable events that are kept for a pool.
MAX_BAD = 10_000
#: The reason of a kept event that another release may be able to read.
UNREADABLE = "unreadable"


async def write_events(redis: Redis, db: Database, pool_id: str) -> int:
    """Move the waiting events of one pool's stream to the ledger. Returns their number.

    An event leaves the stream only after Postgres has stored it, and Postgres stores each request once, so a crash between the two
    repeats work without doubling anything. An event that cannot be read or recorded is logged and moved to `…:usage:bad`, so that it does
    not block the others.
    """
    stream = f"lmaas:{{{pool_id}}}:usage"
    entries: Any = await redis.xrange(stream, count=EVENTS_AT_ONCE)
    if not entries:
        return 0
    events: list[tuple[dict[str, str], UsageEvent]] = []
    for _, fields in entries:
        try:
            events.append((fields, parse_event(fields["event"])))
        except (ValueError, KeyError, TypeError) as error:
            await _set_aside(redis, stream, fields | {"why": UNREADABLE}, error)
    try:
        await record_events(db, [event for _, event in events])
    except UnrecordableEventError:
        for fields, event in events:
            try:
                await record_events(db, [event])
            except UnrecordableEventError as error:
                await _set_aside(redis, stream, fields | {"why": "unrecordable"}, error)
    await redis.xdel(stream, *(entry for entry, _ in entries))
    return len(entries)


async def waiting_events(redis: Redis, pool_ids: Iterable[str]) -> dict[str, int]:
    """Return the number of events in each pool's stream. Raises RedisError."""
    return {pool_id: int(await redis.xlen(f"lmaas:{{{pool_id}}}:usage")) for pool_id in pool_ids}


async def take_back(redis: Redis, pool_id: str) -> int:
    """Move events that an older release could not read, and this one can, back into the pool's stream. Returns their number."""
    stream = f"lmaas:{{{pool_id}}}:usage"
    entries: Any = await redis.xrange(f"{stream}:bad")
    count = 0
    for entry, fields in entries:
        if fields.get("why") == UNREADABLE and _readable(fields):
            # A crash between the two calls doubles the event, and the ledger stores it once.
            await redis.xadd(stream, {"event": fields["event"]})
            await redis.xdel(f"{stream}:bad", entry)
            count += 1
    return count


def _readable(fields: dict[str, str]) -> bool:
    try:
        parse_event(fields["event"])
    except (ValueError, KeyError, TypeError):
        return False
    return True


async def _set_aside(redis: Redis, stream: str, fields: Any, error: Exception) -> None:
    log.error("a usage event cannot be recorded", extra={"action": "meter", "detail": f"{stream}: {error}"})
    await redis.xadd(f"{stream}:bad", fields, maxlen=MAX_BAD, approximate=True)
