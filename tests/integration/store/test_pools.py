"""Base models that are created and deleted while others use them, and the state of pools that the controller writes."""

import asyncio

import pytest

from lmaas.errors import Conflict, NotFound
from lmaas.states import Observed
from lmaas.store.adapters import list_adapters
from lmaas.store.changes import change_number
from lmaas.store.database import Database
from lmaas.store.models import change_base_model, create_base_model, delete_base_model, get_base_model, list_base_models, list_pool_ids
from lmaas.store.pools import pool_states_by_id, save_pool_state
from lmaas.store.replicas import add_replica, failed_starts, list_replicas, observe
from tests.integration.store.build import base_model, tenant, upload


@pytest.mark.parametrize("attempt", range(8))
async def test_a_base_model_is_deleted_or_used_but_never_both(db: Database, attempt: int) -> None:
    model, acme = await base_model(db), await tenant(db, "acme")
    jobs = [delete_base_model(db, "base"), add_replica(db, "rep_1", model.id), upload(db, acme.id, "bot", model)]
    order = [jobs[(attempt + place) % 3] for place in range(3)]
    results = dict(zip([(attempt + place) % 3 for place in range(3)], await asyncio.gather(*order, return_exceptions=True), strict=True))
    if isinstance(results[0], Conflict):
        assert await get_base_model(db, "base") == model
        assert results[1] is True or results[2] == 1
    else:
        assert results[0] == model.id
        assert results[1] is False
        assert isinstance(results[2], NotFound)
        assert await list_replicas(db) == []
        assert await list_adapters(db, acme.id) == []


async def test_a_deleted_one_is_gone_but_its_pool_may_still_tell(db: Database) -> None:
    model = await base_model(db)
    before = await change_number(db)
    await delete_base_model(db, model.id)
    assert await change_number(db) != before, "gateways see it at once"
    assert await list_base_models(db) == []
    assert await list_pool_ids(db) == [model.id]
    again = await base_model(db)
    assert again.id != model.id
    with pytest.raises(Conflict):
        await create_base_model(db, again)
    assert set(await list_pool_ids(db)) == {model.id, again.id}


async def test_what_the_controller_says_changes_nothing_for_gateways(db: Database) -> None:
    model = await base_model(db)
    before = await change_number(db)
    await save_pool_state(db, model.id, {"blocked": False, "wanted": 1}, [(3, 1.0), (40, 2.5)])
    await save_pool_state(db, model.id, {"blocked": True, "wanted": 2}, [(3, 2.0)])
    assert await change_number(db) == before
    state = (await pool_states_by_id(db))[model.id]
    assert (state.decision, state.idle_times) == ({"blocked": True, "wanted": 2}, [[3, 2.0]])


async def test_starts_that_fail_in_a_row(db: Database) -> None:
    model = await base_model(db)
    assert await failed_starts(db, model.id) is None
    for number in range(2):
        await add_replica(db, f"rep_{number}", model.id)
        await observe(db, f"rep_{number}", Observed.FAILED, reason=f"reason {number}")
    failed = await failed_starts(db, model.id)
    assert failed is not None
    assert (failed.count, failed.reason) == (2, "reason 1")
    assert 0 <= failed.ago_s < 60
    # A replica that ends after it was ready is not a failed start, and resets the count of those before it.
    await add_replica(db, "rep_good", model.id)
    await observe(db, "rep_good", Observed.READY, url="http://e")
    await observe(db, "rep_good", Observed.FAILED, reason="later")
    assert await failed_starts(db, model.id) is None


async def test_an_id_counts_more_than_a_name_of_an_older_release(db: Database) -> None:
    first = await base_model(db)
    await base_model(db, first.id)
    assert (await get_base_model(db, first.id)).name == "base"
    assert (await change_base_model(db, first.id, {"max_replicas": 3})).name == "base"
