"""Ends all replicas of a provisioner, before their machine is taken away."""

import asyncio
from contextlib import suppress

from lmaas.control.provisioners import Provisioner
from lmaas.errors import Unavailable
from lmaas.store.database import Database
from lmaas.store.replicas import desire_stop

#: The time that a replica may take to end in addition to its drain.
END_GRACE_S = 20.0


async def end_replicas(db: Database, provisioner: Provisioner, grace_s: float, hurry: asyncio.Event | None = None) -> None:
    """Drain every replica, and kill those that have not ended after `grace_s` seconds, or once `hurry` is set."""
    with suppress(Unavailable):
        for replica_id in await provisioner.list():
            await desire_stop(db, replica_id)
    deadline = asyncio.get_running_loop().time() + grace_s
    while replicas := await provisioner.list():
        if (hurry is not None and hurry.is_set()) or asyncio.get_running_loop().time() > deadline:
            for replica_id in replicas:
                await provisioner.kill(replica_id)
        await asyncio.sleep(0.2)
