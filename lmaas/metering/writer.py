"""The metering writer: moves usage events from the pools' streams in Redis to the ledger in Postgres."""

import logging
from typing import Any

from redis.asyncio import Redis

from lmaas.metering.usage import parse_event
from lmaas.store.database import Database
from lmaas.store.usage import record_events

log = logging.getLogger(__name__)

BATCH = 500


async def write_events(redis: Redis, db: Database, pool_id: str) -> int:
    """Move what waits in one pool's stream; answers how many events.

    An event leaves the stream only after Postgres has it, and Postgres takes each request once: a crash between the two
    repeats the work without doubling anything. What cannot be parsed is logged and kept aside in `…:usage:bad`.
    """
    stream = f"lmaas:{{{pool_id}}}:usage"
    entries: Any = await redis.xrange(stream, count=BATCH)
    events = []
    for _, fields in entries:
        try:
            events.append(parse_event(fields["event"]))
        except (ValueError, KeyError, TypeError) as error:
            log.error("a usage event cannot be read", extra={"action": "meter", "pool_id": pool_id, "detail": str(error)})  # noqa: TRY400
            await redis.xadd(f"{stream}:bad", fields)
    await record_events(db, events)
    if entries:
        await redis.xdel(stream, *(entry for entry, _ in entries))
    return len(entries)
