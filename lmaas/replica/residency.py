"""The adapters on one engine: fetches, loads, and unloads them."""

import asyncio
import contextlib
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from lmaas.adapters.objects import AdapterFiles
from lmaas.engine.client import CONNECTION_ERRORS, EngineClient, EngineError
from lmaas.scheduling.client import Scheduler

log = logging.getLogger(__name__)

LOADS_AT_ONCE = 4


class Residency:
    """Loads the adapters that the scheduler requests. At most `capacity` stay on the engine; the least recently used one is unloaded first.

    The files are in `folder`, one folder for each adapter, for as long as the engine may read them. `on_granted` is called when requests
    that waited for a load have started to run.
    """

    def __init__(
        self,
        pool: str,
        replica: str,
        scheduler: Scheduler,
        client: EngineClient,
        files: AdapterFiles,
        folder: Path,
        capacity: int,
        on_granted: Callable[[], None],
    ):
        self._pool, self._replica = pool, replica
        self._scheduler, self._client, self._files = scheduler, client, files
        self._folder = folder
        self._capacity = capacity
        self._on_granted = on_granted
        self._limit = asyncio.Semaphore(LOADS_AT_ONCE)
        self._making_room = asyncio.Lock()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._awaited: dict[str, str] = {}
        self._fetching: dict[str, asyncio.Task[None]] = {}
        #: Adapters that are being loaded. They count towards the capacity.
        self._arriving: set[str] = set()
        self.resident: set[str] = set()

    def prepare(self, awaited: dict[str, str]) -> None:
        """Fetch the files of the adapters that requests are waiting for, while the engine starts."""
        self._awaited = awaited
        for adapter, source in awaited.items():
            if adapter not in self._fetching:
                task = asyncio.create_task(self._fetch(adapter, source), name=f"fetch-{adapter}")
                self._fetching[adapter] = task
                task.add_done_callback(_seen)

    @property
    def awaits(self) -> bool:
        """True if there are prepared adapters for `warm` to load."""
        return bool(self._awaited)

    async def warm(self, url: str) -> None:
        """Load the prepared adapters as soon as the engine accepts them. A failure here is reported to the first request that needs the
        adapter."""
        self.want(url, self._awaited, {})
        if self._loading:
            await asyncio.wait(self._loading.values())

    def want(self, url: str, loads: dict[str, str], used_ms_ago: dict[str, float]) -> None:
        """Start the loads that are missing. `loads` maps adapters to their place in the store, `used_ms_ago` to the time since each was
        last granted."""
        for adapter, source in loads.items():
            if adapter not in self._loading:
                task = asyncio.create_task(self._load(url, adapter, source, dict(used_ms_ago)), name=f"load-{adapter}")
                self._loading[adapter] = task
                task.add_done_callback(functools.partial(self._loaded, adapter))

    def _loaded(self, adapter: str, task: asyncio.Task[None]) -> None:
        del self._loading[adapter]
        self._arriving.discard(adapter)
        if not task.cancelled() and task.exception() is not None:
            # Redis was unavailable when the load was reported. The next heartbeat repeats the request.
            log.warning("a load was not reported", extra={"action": "load", "adapter": adapter, "detail": repr(task.exception())})

    async def _load(self, url: str, adapter: str, source: str, used_ms_ago: dict[str, float]) -> None:
        extra = {"action": "load", "replica_id": self._replica, "adapter": adapter}
        try:
            async with self._limit:
                self._arriving.add(adapter)
                await self._make_room(url, used_ms_ago)
                path = self._folder / adapter
                if adapter in self._fetching:
                    await asyncio.wait([self._fetching.pop(adapter)])
                await self._fetch(adapter, source)
                await self._client.load_adapter(url, adapter, str(path))
                self.resident.add(adapter)
            granted = await self._scheduler.loaded(self._pool, self._replica, adapter)
            if granted:
                self._on_granted()
            log.info("adapter loaded", extra=extra | {"detail": f"{granted} requests waited for it"})
        except CONNECTION_ERRORS as error:
            # The engine failed, not the adapter. The requests move to another replica when this one ends, or the next heartbeat repeats the
            # request.
            log.warning("a load was cut", extra=extra | {"detail": repr(error)})
        except (OSError, EngineError) as error:
            # Only requests for this adapter fail. The error contains paths, which tenants must not see.
            log.error("adapter could not be loaded", extra=extra | {"detail": repr(error)})  # noqa: TRY400 (expected: no trace)
            reason = "its files are missing" if isinstance(error, FileNotFoundError) else "the engine rejected it"
            await self._scheduler.load_failed(self._pool, self._replica, adapter, reason)

    async def _fetch(self, adapter: str, source: str) -> None:
        path = self._folder / adapter
        if not path.exists():
            await self._files.fetch(source, path)

    async def _make_room(self, url: str, used_ms_ago: dict[str, float]) -> None:
        async with self._making_room:
            for adapter in sorted(self.resident, key=lambda name: -used_ms_ago.get(name, float("inf"))):
                if len(self.resident | self._arriving) <= self._capacity:
                    return
                if await self._scheduler.evict(self._pool, self._replica, adapter):
                    # The engine may have unloaded it already.
                    with contextlib.suppress(EngineError):
                        await self._client.unload_adapter(url, adapter)
                    self.resident.discard(adapter)
                    await asyncio.to_thread(shutil.rmtree, self._folder / adapter, ignore_errors=True)

    async def close(self) -> None:
        """Stop loading, and delete the files."""
        tasks = [*self._loading.values(), *self._fetching.values()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await task
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _seen(task: "asyncio.Task[None]") -> None:
    """Ignore the error of an early fetch. The load tries again and reports it."""
    if not task.cancelled() and task.exception() is not None:
        log.warning("an adapter could not be fetched yet", extra={"action": "fetch", "detail": repr(task.exception())})
