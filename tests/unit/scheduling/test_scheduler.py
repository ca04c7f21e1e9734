"""A scheduler without a server."""

import pytest

from lmaas.errors import Unavailable
from lmaas.scheduling.client import Bounds, Scheduler, Ticket, connect


async def test_a_server_that_is_away_is_unavailable(tmp_path_factory: pytest.TempPathFactory) -> None:
    client = connect(f"unix://{tmp_path_factory.mktemp('none')}/none.sock")
    with pytest.raises(Unavailable) as caught:
        await Scheduler(client).submit(Ticket("r1", "p", "a", "g", "", "", 1, "{}"), Bounds(10, 10_000))
    assert (caught.value.error_code, caught.value.retry_after_s) == ("queue_unavailable", 2)
    with pytest.raises(Unavailable):
        await Scheduler(client).record_event("p", "{}")
    await client.aclose()
