"""Deletion of what the service keeps only for a time: responses of idempotency keys, tenants' stored responses, conversations and files."""

import asyncio
import logging
import time

from lmaas.errors import Unavailable
from lmaas.files.service import Files
from lmaas.store.batches import delete_old_batches
from lmaas.store.database import Database
from lmaas.store.deliveries import delete_old_deliveries
from lmaas.store.idempotency import delete_old, delete_surplus
from lmaas.store.retention import delete_expired, delete_oldest, stored_bytes, table_bytes

log = logging.getLogger(__name__)

SWEEP_S = 60.0
#: The interval at which the bytes of tenants are counted, which reads every row, though not its text.
COUNT_S = 600.0
#: The part of a tenant's bound by which the tables may grow before they are counted earlier. What takes the place of deleted rows does not
#: make them grow, and needs no more disk.
GROWTH = 0.1


class Sweeper:
    """Deletes in portions, so that no statement runs for long. Its work may stop at any place, and be done by another controller."""

    def __init__(self, db: Database, max_stored_bytes: int) -> None:
        self._db, self._max_stored_bytes = db, max_stored_bytes
        #: The bytes of all stored responses and conversations, None before they were counted.
        self.stored_bytes: int | None = None

    async def run(self) -> None:
        """Sweep once a minute until cancelled."""
        counted_at, counted_size = float("-inf"), 0
        while True:
            try:
                while await delete_old(self._db) or await delete_surplus(self._db) or await delete_expired(self._db):
                    pass
                while await delete_old_batches(self._db) or await delete_old_deliveries(self._db):
                    pass
                size = await table_bytes(self._db)
                if time.monotonic() - counted_at >= COUNT_S or size - counted_size >= self._max_stored_bytes * GROWTH:
                    # Also if it fails: what took too long now would take too long in a minute.
                    counted_at, counted_size = time.monotonic(), size
                    await self.bound()
            except Unavailable as error:
                log.warning("stored data cannot be deleted now", extra={"action": "sweep", "detail": str(error)})
            await asyncio.sleep(SWEEP_S)

    async def bound(self) -> None:
        """Count the bytes of each tenant, and delete the oldest of those that have too many. Raises Unavailable."""
        sizes = await stored_bytes(self._db)
        for tenant_id, size in sizes.items():
            surplus = size - self._max_stored_bytes
            if surplus > 0:
                log.warning("a tenant's oldest responses are deleted early", extra={"tenant_id": tenant_id, "action": "sweep"})
            while surplus > 0 and (deleted := await delete_oldest(self._db, tenant_id, surplus)) > 0:
                surplus -= deleted
            sizes[tenant_id] = min(size, self._max_stored_bytes + max(surplus, 0))
        self.stored_bytes = sum(sizes.values())


class FileSweeper:
    """Deletes expired files, and contents in the object store that no file has. An object store that is away delays nothing else."""

    def __init__(self, files: Files) -> None:
        self._files = files
        #: The number of all files and their bytes, None before they were counted.
        self.stored: tuple[int, int] | None = None

    async def run(self) -> None:
        """Sweep once a minute until cancelled."""
        counted_at = float("-inf")
        while True:
            try:
                while await self._files.sweep():
                    pass
                if time.monotonic() - counted_at >= COUNT_S:
                    counted_at = time.monotonic()
                    self.stored = await self._files.stored()
            except Unavailable as error:
                log.warning("files cannot be deleted now", extra={"action": "sweep", "detail": str(error)})
            await asyncio.sleep(SWEEP_S)
