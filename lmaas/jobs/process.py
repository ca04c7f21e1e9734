"""A job runner with what must run beside it: the leases of its requests, and the endpoints of its status."""

import asyncio
import contextlib
from dataclasses import dataclass

from lmaas.config import Settings
from lmaas.inference.cache import Changes
from lmaas.inference.serving import Inferences
from lmaas.jobs.runner import Runner
from lmaas.jobs.status import serve_status
from lmaas.observability import GatewayMetrics


@dataclass(frozen=True, slots=True)
class Jobs:
    """The parts of the process, built in the composition root."""

    settings: Settings
    runner: Runner
    inferences: Inferences
    changes: Changes
    metrics: GatewayMetrics

    async def run(self, stopping: asyncio.Event) -> None:
        """Do durable work until `stopping` is set. If a part fails, the error ends this."""
        settings, leases = self.settings, self.inferences.leases
        async with self.inferences.client, asyncio.TaskGroup() as group:
            keepers = [group.create_task(leases.run(), name="leases"), group.create_task(self.changes.run(), name="changes")]
            if settings.jobs_port is not None:
                serving = serve_status(self.runner, self.metrics.registry, settings.host, settings.jobs_port)
                keepers.append(group.create_task(serving, name="status"))
            await self.runner.run(stopping)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.drain_timeout_s):
                    await leases.drained()
            for keeper in keepers:
                keeper.cancel()
