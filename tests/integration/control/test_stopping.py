"""Stopping a controller whose replicas end with it."""

import asyncio
import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from lmaas import app
from lmaas.config import Settings
from lmaas.control.controller import Controller
from lmaas.store.database import Database
from lmaas.store.leadership import leading
from tests.support.conditions import until
from tests.support.provisioners import Nowhere


@pytest.mark.parametrize("stands_by", [False, True])
async def test_it_ends_its_replicas_also_if_it_does_not_lead(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch, stands_by: bool
) -> None:
    made: list[Controller] = []
    ended: list[float] = []

    class Known(Controller):
        def __init__(self, *parts: Any, **more: Any) -> None:
            super().__init__(*parts, **more)
            made.append(self)

    async def end_replicas(_db: Database, _where: object, grace_s: float) -> None:
        ended.append(grace_s)

    monkeypatch.setattr(app, "Controller", Known)
    monkeypatch.setattr(app, "provisioner", lambda _: Nowhere())
    monkeypatch.setattr(app, "end_replicas", end_replicas)

    async def told_to_stop() -> None:
        running = asyncio.create_task(app.run_controller(replace(settings, controller_ends_replicas=True)))
        await until(lambda: made and (made[0].active or stands_by))
        os.kill(os.getpid(), signal.SIGTERM)
        await running
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)

    if stands_by:
        async with leading(db):
            await told_to_stop()
    else:
        await told_to_stop()
    assert len(ended) == 1
