"""Replicas of a machine that shuts down are killed if they do not end, with or without a database."""

import asyncio

from lmaas.control.ending import end_replicas
from lmaas.store.database import Database
from tests.support.machine import Machine


async def test_what_does_not_end_is_killed(no_database: Database) -> None:
    machine = Machine("rep_1", "rep_2", deaf=True)
    await end_replicas(no_database, machine, 0.01)  # type: ignore[arg-type]
    assert sorted(machine.killed) == ["rep_1", "rep_2"]


async def test_hurry(no_database: Database) -> None:
    hurry = asyncio.Event()
    hurry.set()
    machine = Machine("rep_1", deaf=True)
    await end_replicas(no_database, machine, 3600, hurry)  # type: ignore[arg-type]
    assert machine.killed == ["rep_1"]
