"""A job runner runs lines of batches on fake engines."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import text

from lmaas.errors import Unavailable
from lmaas.http import new_request_id
from lmaas.inference.observers import Observers
from lmaas.inference.request_log import RequestLog
from lmaas.inference.request_traces import RequestTraces
from lmaas.jobs.endings import MAX_REFUSALS
from lmaas.jobs.held import HeldLines
from lmaas.scheduling.client import Scheduler, gateway_channel
from lmaas.states import PoolKind
from lmaas.store.line_leases import LARGE_BYTES, LeasedLine, claim_lines, stop_batch
from lmaas.store.models import change_base_model
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import revoke_key, update_tenant
from lmaas.tracing.context import OWN_PREFIX
from lmaas.tracing.trace import Span
from tests.integration.gateway.stack import Stack, running
from tests.integration.jobs.service import Texts, batch_of, charged, chat, has_status, runner
from tests.support.batches import batch_row, line_rows, pending
from tests.support.conditions import until


@pytest.fixture(scope="module")
async def stack(postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    """A stack for all tests of this module, each of which has models and tenants of its own."""
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("lines")) as stack:
        yield stack


async def wasted(stack: Stack, batch_id: str) -> list[str | None]:
    """Return the codes of wasted attempts of the batch's tenant."""
    row = await batch_row(stack.db, batch_id)
    query = text("SELECT code FROM usage_events WHERE tenant_id = :tenant AND status = 'wasted'")
    async with stack.db.begin(SYSTEM) as connection:
        return [code for (code,) in await connection.execute(query, {"tenant": row.tenant_id})]


async def runs(stack: Stack, batch_id: str, count: int) -> bool:
    """Return whether so many lines of the batch are leased."""
    return len([line for line in await line_rows(stack.db, batch_id) if line.state == "running"]) >= count


async def test_every_line_has_one_result_and_one_charge(stack: Stack) -> None:
    model, tenant = await stack.model("m"), await stack.tenant()
    replica = await stack.replica(model)
    texts = Texts()
    lines = [chat(f"l{number}", "m") for number in range(50)]
    lines[7] = chat("l7", "m", temperature=-3)
    lines[9] = chat("l9", "unknown")
    lines[11] = b'{"custom_id": "l11", "body": 5}'
    batch_id = await batch_of(stack, texts, tenant, model, lines)
    logged: list[str] = []
    traces: list[list[Span]] = []
    async with runner(stack, texts, observers=Observers(RequestLog(logged.append), RequestTraces(traces.append, 1.0))):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=30)
    row, rows = await batch_row(stack.db, batch_id), await line_rows(stack.db, batch_id)
    assert (row.completed, row.failed) == (47, 3)
    assert Counter(line.state for line in rows) == {"done": 47, "failed": 3}
    assert await pending(stack.db, batch_id) == {model.id: (0, 0)}
    assert [(line.position, line.status_code) for line in rows if line.state == "failed"] == [(7, 400), (9, 404), (11, 400)]
    assert json.loads(rows[9].answer)["error"]["code"] == "model_not_found"
    answer = json.loads(rows[0].answer)
    assert (answer["model"], answer["usage"]["completion_tokens"]) == ("m", 4)
    events = await charged(stack, model, tenant)
    assert {event.request_id for event in events} == {line.request_id for line in rows if line.state == "done"}
    assert Counter(event.status for event in events) == {"completed": 47}
    _, completion, _ = await replica.counters()
    assert row.completion_tokens == sum(event.completion_tokens for event in events) == completion - 1, "the probe belongs to no tenant"
    assert row.prompt_tokens == sum(event.prompt_tokens for event in events)
    assert await wasted(stack, batch_id) == []
    # The log has a line for each attempt whose request could be read.
    attempts = [json.loads(line) for line in logged]
    assert {each["request_id"] for each in attempts} == {line.request_id for line in rows if line.position not in (7, 11)}
    outcomes = Counter((each["outcome"], each["code"]) for each in attempts)
    assert outcomes == {("completed", None): 47, ("refused", "model_not_found"): 1}
    assert {(each["action"], each["belongs_to"], each["tenant_id"]) for each in attempts} == {("batch_line", batch_id, tenant.id)}
    # Each has a trace too, whose id is that of the attempt.
    assert {trace[0].trace_id for trace in traces} == {OWN_PREFIX + each["request_id"].removeprefix("req_") for each in attempts}
    served = [trace for trace in traces if trace[0].attributes.get("lmaas.outcome") == "completed"]
    assert len(served) == 47
    assert {span.name for trace in served for span in trace} == {"batch line", "admission", "queue", "delivery"}
    assert {trace[0].attributes["lmaas.batch.id"] for trace in traces} == {batch_id}


async def test_a_line_whose_slot_is_taken_back_runs_again(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets = []

    def noted() -> str:
        tickets.append(new_request_id())
        return tickets[-1]

    monkeypatch.setattr("lmaas.jobs.attempts.new_request_id", noted)
    model, tenant = await stack.model("yields"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 50")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat("l0", "yields", max_tokens=40)])
    async with runner(stack, texts) as job:

        async def has_begun() -> bool:
            return await replica.running() == 1

        await until(has_begun)
        news = {"id": tickets[0], "event": "yielded", "attempts": 0}
        await stack.redis.publish(gateway_channel(job.inferences.leases.gateway), json.dumps(news))
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=30)
    [line] = await line_rows(stack.db, batch_id)
    assert (line.state, line.attempt, line.given_back) == ("done", 2, 1)
    [event] = await charged(stack, model, tenant)
    assert (event.request_id, event.completion_tokens) == (line.request_id, json.loads(line.answer)["usage"]["completion_tokens"])
    assert await wasted(stack, batch_id) == ["put_back"]


async def test_lines_whose_lease_was_not_confirmed_run_all_the_same(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[LeasedLine] = []

    async def claim(*args: Any) -> list[LeasedLine]:
        found = await claim_lines(*args)
        if found and not lost:
            # The reply to the commit is lost.
            lost.extend(found)
            raise Unavailable("The database connection was lost.")
        return found

    monkeypatch.setattr("lmaas.jobs.lines.claim_lines", claim)
    model, tenant = await stack.model("unconfirmed"), await stack.tenant()
    await stack.replica(model)
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "unconfirmed") for number in range(20)])
    async with runner(stack, texts):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=30)
    assert lost
    rows = await line_rows(stack.db, batch_id)
    assert [(line.state, line.given_back) for line in rows] == [("done", int(line.position < len(lost))) for line in rows]
    assert len(await charged(stack, model, tenant)) == 20


async def test_a_pool_whose_queue_fails_does_not_stop_the_others(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    sick, well, tenant = await stack.model("sick"), await stack.model("well"), await stack.tenant()
    await stack.replica(well)
    room = Scheduler.room

    async def room_of(scheduler: Scheduler, pool: str) -> dict[str, Any]:
        if pool == sick.id:
            raise Unavailable("The request queue is not available. Retry after 2 s.")
        return await room(scheduler, pool)

    monkeypatch.setattr(Scheduler, "room", room_of)
    texts = Texts()
    stuck = await batch_of(stack, texts, tenant, sick, [chat("l0", "sick")])
    batch_id = await batch_of(stack, texts, tenant, well, [chat("l0", "well")])
    async with runner(stack, texts):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=30)
    assert [line.state for line in await line_rows(stack.db, stuck)] == ["pending"]


async def test_large_lines_do_not_keep_the_lines_of_others_waiting(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * LARGE_BYTES
    monkeypatch.setattr("lmaas.jobs.lines.HeldLines", partial(HeldLines, 3 * size, 2 * size))
    slow, fast = await stack.model("large"), await stack.model("small")
    one, two = await stack.tenant(), await stack.tenant()
    replica = await stack.replica(slow, "--fake-token-ms 20")
    await stack.replica(fast)
    texts = Texts()
    lines = [chat(f"l{number}", "large", max_tokens=1900, min_tokens=1900).ljust(size) for number in range(20)]
    large = await batch_of(stack, texts, one, slow, lines)
    async with runner(stack, texts) as job:

        async def is_full() -> bool:
            return await replica.running() == 3

        await until(is_full, timeout_s=20)
        same, another = [
            await batch_of(stack, texts, two, model, [chat(f"s{number}", name, max_tokens=2) for number in range(8)] + [last])
            for model, name in ((slow, "large"), (fast, "small"))
            for last in [chat("last", name, max_tokens=2).ljust(size)]
        ]
        for batch_id in (same, another):
            await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=20)
        assert await replica.running() == 3
        # Lines that wait for room in the queue are given back, too.
        async with stack.db.begin(SYSTEM) as connection:
            statement = text("UPDATE batches SET status = 'cancelling', cancelling_at = now() WHERE id = :id")
            await connection.execute(statement, {"id": large})

        async def nothing_left() -> bool:
            return not await runs(stack, large, 1)

        await until(nothing_left, timeout_s=30)
        assert job.runner.id is not None
    assert Counter(line.state for line in await line_rows(stack.db, large)) == {"pending": 20}
    for batch_id in (same, another):
        assert (await batch_row(stack.db, batch_id)).completed == 9


async def test_a_cancelled_batch_keeps_what_has_ended(stack: Stack) -> None:
    model, tenant = await stack.model("cancel", slots=2), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    lines = [chat(f"l{number}", "cancel", max_tokens=4 if number < 2 else 1900, ignore_eos=True) for number in range(40)]
    batch_id = await batch_of(stack, texts, tenant, model, lines)
    async with runner(stack, texts):

        async def two_done() -> bool:
            return bool((await batch_row(stack.db, batch_id)).completed == 2 and await replica.running() == 2)

        await until(two_done)
        async with stack.db.begin(SYSTEM) as connection:
            statement = text("UPDATE batches SET status = 'cancelling', cancelling_at = now() WHERE id = :id")
            await connection.execute(statement, {"id": batch_id})

        async def nothing_left() -> bool:
            return not await runs(stack, batch_id, 1) and await replica.running() == 0

        await until(nothing_left, timeout_s=30)
    row, rows = await batch_row(stack.db, batch_id), await line_rows(stack.db, batch_id)
    assert Counter(line.state for line in rows) == {"done": 2, "pending": 38}
    assert (row.status, row.completed, row.failed) == ("cancelling", 2, 0)
    assert len(await charged(stack, model, tenant)) == 2
    assert sum(event.completion_tokens for event in await stack.ledger(model, tenant)) == (await replica.counters())[1] - 1
    assert set(await wasted(stack, batch_id)) == {"cancelled"}


async def test_lines_that_run_at_the_deadline_are_given_back(stack: Stack) -> None:
    model, tenant = await stack.model("late"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(
        stack, texts, tenant, model, [chat(f"l{number}", "late", max_tokens=1900, ignore_eos=True) for number in range(3)]
    )
    async with runner(stack, texts):
        await until(partial(runs, stack, batch_id, 3))
        async with stack.db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE batches SET expires_at = now() WHERE id = :id"), {"id": batch_id})

        async def nothing_left() -> bool:
            return not await runs(stack, batch_id, 1) and await replica.running() == 0

        await until(nothing_left, timeout_s=30)
    assert [line.state for line in await line_rows(stack.db, batch_id)] == ["pending"] * 3
    assert await charged(stack, model, tenant) == []


async def test_a_runner_that_stops_gives_back_what_runs(stack: Stack) -> None:
    model, tenant = await stack.model("stops"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(
        stack, texts, tenant, model, [chat(f"l{number}", "stops", max_tokens=1900, ignore_eos=True) for number in range(3)]
    )
    async with runner(stack, texts):
        await until(partial(runs, stack, batch_id, 3))
    assert [(line.state, line.given_back) for line in await line_rows(stack.db, batch_id)] == [("pending", 1)] * 3
    assert await pending(stack.db, batch_id) == {model.id: (3, 60)}
    assert await replica.running() == 0
    assert [event.code for event in await stack.ledger(model, tenant)] == ["runner_stopped"] * 3
    async with stack.db.begin(SYSTEM) as connection:
        assert (await connection.execute(text("SELECT count(*) FROM job_runners"))).scalar_one() == 0
        await connection.execute(text("UPDATE batches SET status = 'cancelled' WHERE id = :id"), {"id": batch_id})


async def test_the_lines_of_a_revoked_key_fail_by_its_code(stack: Stack) -> None:
    model, tenant = await stack.model("revoked", slots=2), await stack.tenant()
    await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "revoked", max_tokens=50) for number in range(40)])
    async with runner(stack, texts):
        await until(partial(runs, stack, batch_id, 2))
        await revoke_key(stack.db, tenant.id, tenant.key_id)

        async def is_stopped() -> bool:
            return bool((await batch_row(stack.db, batch_id)).stop_code) and not await runs(stack, batch_id, 1)

        await until(is_stopped, timeout_s=20)
    row = await batch_row(stack.db, batch_id)
    assert row.stop_code == "invalid_api_key"
    assert "revoked" in row.stop_message
    assert row.completed < 40
    assert row.completed == len(await charged(stack, model, tenant))


async def test_a_spent_budget_fails_what_is_left(stack: Stack) -> None:
    model, tenant = await stack.model("budget"), await stack.tenant()
    await change_base_model(stack.db, "budget", {"prompt_price": 2_000_000, "completion_price": 2_000_000})
    await stack.replica(model)
    # At half of 2 µ$ a token, the budget covers 40 completion tokens and the prompts of some lines.
    await update_tenant(stack.db, tenant.id, {"budget_per_month": 100})
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "budget") for number in range(60)])
    async with runner(stack, texts):

        async def is_stopped() -> bool:
            return bool((await batch_row(stack.db, batch_id)).stop_code) and not await runs(stack, batch_id, 1)

        await until(is_stopped, timeout_s=40)
    row = await batch_row(stack.db, batch_id)
    assert (row.stop_code, row.failed) == ("insufficient_quota", 0)
    events = await charged(stack, model, tenant)
    assert 0 < row.completed == len(events) < 60
    spent = sum(event.charge_picousd for event in events)
    assert 80_000_000 < spent <= 100_000_000, "later lines used the part of the reservations that earlier ones did not use"


async def test_a_budget_that_others_have_only_reserved_does_not_stop_a_batch(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def noted() -> str:
        tries.append(new_request_id())
        return tries[-1]

    monkeypatch.setattr("lmaas.jobs.attempts.new_request_id", noted)
    monkeypatch.setattr("lmaas.jobs.endings.PAUSE_S", 0.02)
    model, cold, tenant = await stack.model("reserved"), await stack.model("cold"), await stack.tenant()
    for name in ("reserved", "cold"):
        await change_base_model(stack.db, name, {"prompt_price": 2_000_000, "completion_price": 2_000_000})
    await stack.replica(model)
    await update_tenant(stack.db, tenant.id, {"budget_per_month": 1000})
    texts = Texts()
    async with stack.client(tenant) as http:
        # The request waits for an engine, and has reserved nearly all of the budget.
        about = {"model": "cold", "messages": [{"role": "user", "content": "wait"}], "max_tokens": 490}
        waiting = asyncio.create_task(http.post("/v1/chat/completions", json=about, timeout=60))

        async def is_queued() -> bool:
            return int((await stack.services.scheduler.stats(cold.id))["queued"]) == 1

        await until(is_queued)
        batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "reserved", max_tokens=30) for number in range(3)])
        async with runner(stack, texts):
            await until(lambda: len(tries) > 3 * 3 * MAX_REFUSALS, timeout_s=20)
            row = await batch_row(stack.db, batch_id)
            assert (row.stop_code, row.completed, row.failed) == (None, 0, 0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=20)
    assert (await batch_row(stack.db, batch_id)).completed == 3


async def test_lines_that_wait_are_given_back_when_another_runner_stops_their_batch(stack: Stack) -> None:
    model, tenant = await stack.model("halted", slots=1), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 10")
    texts = Texts()
    lines = [chat(f"l{number}", "halted", max_tokens=1000, min_tokens=1000) for number in range(4)]
    batch_id = await batch_of(stack, texts, tenant, model, lines)
    async with runner(stack, texts):
        await until(partial(runs, stack, batch_id, 2))

        async def has_begun() -> bool:
            return await replica.running() == 1

        await until(has_begun)
        await stop_batch(stack.db, tenant.id, batch_id, "insufficient_quota", "The budget is spent.")

        async def one_is_left() -> bool:
            return not await runs(stack, batch_id, 2)

        await until(one_is_left, timeout_s=5)
        assert await replica.running() == 1
        assert await runs(stack, batch_id, 1)


async def test_a_file_that_is_gone_fails_what_is_left(stack: Stack) -> None:
    model, tenant = await stack.model("nofile"), await stack.tenant()
    await stack.replica(model)
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "nofile") for number in range(3)])
    texts.missing.add(next(iter(texts.texts)))
    async with runner(stack, texts):

        async def is_stopped() -> bool:
            return bool((await batch_row(stack.db, batch_id)).stop_code) and not await runs(stack, batch_id, 1)

        await until(is_stopped, timeout_s=20)
    assert (await batch_row(stack.db, batch_id)).stop_code == "input_file_not_found"


async def test_lines_survive_an_engine(stack: Stack) -> None:
    model, tenant = await stack.model("dies"), await stack.tenant()
    first = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "dies", max_tokens=60) for number in range(8)])
    async with runner(stack, texts):

        async def has_begun() -> bool:
            return await first.running() == 8

        await until(has_begun)
        await stack.replica(model)
        first.kill()
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    row = await batch_row(stack.db, batch_id)
    assert (row.completed, row.failed) == (8, 0)
    used = {line.request_id: json.loads(line.answer)["usage"]["completion_tokens"] for line in await line_rows(stack.db, batch_id)}
    assert {event.request_id: event.completion_tokens for event in await charged(stack, model, tenant)} == used
    assert row.completion_tokens == sum(used.values())


async def test_a_request_that_takes_engines_down_fails_alone(stack: Stack) -> None:
    model, tenant = await stack.model("poison"), await stack.tenant()
    for _ in range(3):
        await stack.replica(model, "--fake-poison arsenic")
    texts = Texts()
    bad = chat("bad", "poison", messages=[{"role": "user", "content": "arsenic"}])
    batch_id = await batch_of(stack, texts, tenant, model, [bad, *(chat(f"l{number}", "poison") for number in range(5))])
    async with runner(stack, texts):
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=60)
    row, rows = await batch_row(stack.db, batch_id), await line_rows(stack.db, batch_id)
    assert (row.completed, row.failed) == (5, 1)
    assert rows[0].status_code == 502


async def test_embeddings_of_two_tenants(stack: Stack) -> None:
    model = await stack.model("embeds", kind=PoolKind.EMBED)
    await stack.replica(model)
    texts, batches = Texts(), {}
    for _ in range(2):
        tenant = await stack.tenant()
        lines = [
            json.dumps({"custom_id": f"l{number}", "body": {"model": "embeds", "input": ["a b c", "d"]}}).encode() for number in range(20)
        ]
        batches[await batch_of(stack, texts, tenant, model, lines, endpoint="/v1/embeddings")] = tenant
    async with runner(stack, texts), runner(stack, texts):
        for batch_id in batches:
            await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=30)
    for batch_id, tenant in batches.items():
        row = await batch_row(stack.db, batch_id)
        assert (row.completed, row.failed) == (20, 0)
        events = list(await charged(stack, model, tenant))
        assert len({event.request_id for event in events}) == len(events) == 20
        assert sum(event.prompt_tokens for event in events) == row.prompt_tokens > 0


async def test_a_runner_that_was_declared_lost_writes_nothing_more(stack: Stack) -> None:
    model, tenant = await stack.model("lost"), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "lost", max_tokens=100) for number in range(6)])
    async with runner(stack, texts) as job:
        await until(partial(runs, stack, batch_id, 6))
        first = job.runner.id
        async with stack.db.begin(SYSTEM) as connection:
            await connection.execute(text("UPDATE job_runners SET seen_at = now() - interval '1 h' WHERE id = :id"), {"id": first})
        async with runner(stack, texts):
            await until(lambda: job.runner.id not in (first, None), timeout_s=30)
            await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    rows = await line_rows(stack.db, batch_id)
    assert [line.state for line in rows] == ["done"] * 6
    assert max(line.attempt for line in rows) >= 2
    events = await charged(stack, model, tenant)
    assert {event.request_id for event in events} == {line.request_id for line in rows}
    assert len(events) == 6
    await asyncio.sleep(0)
    assert sum(event.completion_tokens for event in await stack.ledger(model, tenant)) == (await replica.counters())[1] - 1


async def test_lines_that_wait_for_a_pool_without_engines_are_given_back(stack: Stack) -> None:
    model, tenant = await stack.model("cools", slots=1), await stack.tenant()
    replica = await stack.replica(model, "--fake-token-ms 20")
    texts = Texts()
    batch_id = await batch_of(stack, texts, tenant, model, [chat(f"l{number}", "cools", max_tokens=1900) for number in range(9)])
    async with runner(stack, texts):
        await until(partial(runs, stack, batch_id, 3))
        replica.kill()

        async def all_wait() -> bool:
            return (await pending(stack.db, batch_id)) == {model.id: (9, 180)}

        await until(all_wait, timeout_s=40)
        await stack.replica(model)
        await until(partial(has_status, stack, batch_id, "finalizing"), timeout_s=40)
    assert (await batch_row(stack.db, batch_id)).completed == 9
