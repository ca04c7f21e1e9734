"""The usual length of a start, computed from earlier ones."""

from lmaas.states import Observed
from lmaas.store.database import Database
from lmaas.store.replicas import add_replica, get_replica, observe, usual_start_ms
from tests.integration.store.build import base_model


async def _started(db: Database, model: str, name: str, by: str, total_ms: int) -> None:
    await add_replica(db, name, model)
    assert await observe(db, name, Observed.READY, start={"by": by, "total_ms": total_ms})


async def test_the_usual_start_is_the_median_of_the_last_ones_of_its_kind(db: Database) -> None:
    model = (await base_model(db)).id
    assert await usual_start_ms(db, model, "zygote") is None
    await _started(db, model, "rep_0", "plain", 19_000)
    # The only kind of start with a history, so it is used.
    assert await usual_start_ms(db, model, "zygote") == 19_000
    for number, total_ms in enumerate([9_000, 1_500, 2_000, 1_700, 1_600]):
        await _started(db, model, f"rep_z{number}", "zygote", total_ms)
    assert await usual_start_ms(db, model, "zygote") == 1_700
    assert await usual_start_ms(db, model, "zygote", last=4) == 1_650
    assert await usual_start_ms(db, model, "plain") == 19_000
    # The time that a start waited for a zygote does not predict the next start.
    await add_replica(db, "rep_w", model)
    assert await observe(db, "rep_w", Observed.READY, start={"by": "zygote", "zygote_ms": 9_000, "total_ms": 10_600})
    assert await usual_start_ms(db, model, "zygote", last=1) == 1_600
    row = await get_replica(db, "rep_0")
    assert row is not None
    assert row.start == {"by": "plain", "total_ms": 19_000}
