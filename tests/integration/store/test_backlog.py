"""The lines of batches that wait, by pool and deadline."""

from lmaas.store.backlog import WaitingLines, done_tokens, waiting_lines
from lmaas.store.database import Database
from lmaas.store.runners import RUNNER_LOST_S
from tests.integration.store.build import base_model, tenant, waiting_batch

HOUR_S = 3600


async def test_lines_are_summed_by_pool_and_deadline(db: Database, controller_db: Database) -> None:
    acme, other, base = await tenant(db, "acme"), await tenant(db, "other"), await base_model(db)
    assert await waiting_lines(controller_db) == ({}, True)
    one = await waiting_batch(db, acme, due_s=24 * HOUR_S, pools={base.id: (10, 1000), "mod_2": (3, 30)})
    two = await waiting_batch(db, other, due_s=24 * HOUR_S + 1e-3, pools={base.id: (5, 500)})
    soon = await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (1, 7)})
    await waiting_batch(db, acme, due_s=-1, pools={base.id: (1, 1)})
    await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (0, 0)})
    await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)}, status="cancelling")
    found, has_runner = await waiting_lines(controller_db)
    assert not has_runner
    assert found.keys() == {base.id, "mod_2"}
    first, *later = found[base.id]
    assert (first.lines, first.tokens) == (1, 7)
    assert HOUR_S - 60 < first.due_s <= HOUR_S
    # Two deadlines at nearly the same time may still lie in two periods.
    assert sum(each.lines for each in later) == 15
    assert sum(each.tokens for each in later) == 1500
    assert all(24 * HOUR_S - 60 < each.due_s <= 24 * HOUR_S + 1 for each in later)
    assert all(0 <= each.waited_s < 60 for each in (first, *later))
    [only] = found["mod_2"]
    assert (only.lines, only.tokens) == (3, 30)
    assert len({one, two, soon}) == 3


async def test_what_is_done_is_reported_by_batch(db: Database, controller_db: Database) -> None:
    acme, base = await tenant(db, "acme"), await base_model(db)
    one = await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)})
    two = await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)}, status="finalizing")
    await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)}, status="validating")
    assert await done_tokens(controller_db) == {base.id: {one: 0, two: 0}}


async def test_a_runner_counts_while_it_is_seen(db: Database, controller_db: Database) -> None:
    acme, base = await tenant(db, "acme"), await base_model(db)
    await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)}, runner_seen_s_ago=RUNNER_LOST_S + 5)
    assert not (await waiting_lines(controller_db))[1]
    await waiting_batch(db, acme, due_s=HOUR_S, pools={base.id: (9, 9)}, runner_seen_s_ago=0)
    found, has_runner = await waiting_lines(controller_db)
    assert has_runner
    assert all(isinstance(each, WaitingLines) for each in found[base.id])
