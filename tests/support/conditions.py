"""Waiting for a condition, and a limit on the duration of a block."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest


@asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Fail if the block takes `seconds` or longer. Time in which this process was not scheduled counts for at most 20 ms at once, so that a
    busy machine does not fail the test. Processor time counts in full."""
    spent = 0.0

    async def run() -> None:
        nonlocal spent
        now, worked = time.monotonic(), time.process_time()
        while True:
            await asyncio.sleep(0.005)
            before, now = now, time.monotonic()
            worked_before, worked = worked, time.process_time()
            spent += min(now - before, 0.02 + worked - worked_before)

    task = asyncio.create_task(run(), name="within")
    try:
        yield
    finally:
        task.cancel()
    assert spent < seconds


async def until(condition: object, timeout_s: float = 60.0, every_s: float = 0.05) -> None:
    """Wait until `condition()` (plain or async) is true. Fails the test after `timeout_s` seconds."""
    assert callable(condition)
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return
        if asyncio.get_running_loop().time() > deadline:
            pytest.fail(f"not so after {timeout_s:.0f} s: {getattr(condition, '__name__', condition)}")
        await asyncio.sleep(every_s)
