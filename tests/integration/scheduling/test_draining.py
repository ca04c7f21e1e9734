"""A replica that drains: interactive tickets may end, background tickets are put back."""

from msgspec.structs import replace

from lmaas.scheduling.client import Scheduler
from lmaas.states import Observed
from tests.integration.scheduling.build import Pool, ticket


async def test_background_tickets_on_a_draining_replica_are_put_back(scheduler: Scheduler) -> None:
    pool = Pool(scheduler)
    await pool.beat(slots=40)
    lines = [replace(ticket(number), background=True, durable=True) for number in range(20)]
    assert set(await pool.submit(*lines)) == {"granted"}
    assert await pool.submit(ticket(99, "b")) == ["granted"]
    # One call puts back its maximum; the supervisor calls again until nothing runs.
    assert await scheduler.drain("p", "x") == 5
    assert await scheduler.drain("p", "x") == 1
    states = await pool.states()
    assert states.pop("r99") == "granted"
    assert set(states.values()) == {"yielded"}
    stats = await scheduler.stats("p")
    # The replica reserves no slot because of this: no interactive ticket lacked room.
    assert stats["background"] == {"queued": 0, "load": 0, "yields": 20, "reserve": 0}
    assert stats["replicas"]["x"]["state"] == Observed.DRAINING
    await pool.check()
    assert await scheduler.release(ticket(99, "b"), "", None)
    assert await scheduler.drain("p", "x") == 0


async def test_a_background_ticket_whose_adapter_is_loading_waits_again(scheduler: Scheduler) -> None:
    pool = Pool(scheduler)
    await pool.beat(slots=4)
    line = replace(ticket(1, adapter="a"), background=True, durable=True)
    assert await pool.submit(line) == ["loading"]
    assert await scheduler.drain("p", "x") == 0
    assert await pool.states() == {"r1": "queued"}
    await pool.check()
