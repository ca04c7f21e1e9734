"""Batches with OpenAI's client: creation, validation, results, and every end, with the steps of a runner done one by one."""

import dataclasses
import json
from typing import Any

import openai
import pytest
from openai.types import Batch
from sqlalchemy import text

from lmaas.admission.tiers import TIERS
from lmaas.files.service import Purpose
from lmaas.states import LineState
from lmaas.store.batch_lines import add_lines
from lmaas.store.database import Database
from lmaas.store.line_leases import backlog, claim_lines, stop_batch
from lmaas.store.models import BaseModel
from lmaas.store.runners import LeaseLost
from lmaas.store.scopes import SYSTEM
from tests.integration.batches.conftest import Account, Steps, jsonl, line
from tests.integration.gateway.stack import CHAT, Stack
from tests.support.batches import batch_row, ended, line_rows, pending

TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


def times(batch: Batch) -> set[str]:
    """Return the names of the times that a batch has."""
    return {name for name in TIMES if getattr(batch, name) is not None}


async def no_rows(db: Database) -> bool:
    """Return whether no line is left."""
    async with db.begin(SYSTEM) as connection:
        query = text("SELECT (SELECT count(*) FROM batch_lines) + (SELECT count(*) FROM batch_pools)")
        return bool((await connection.execute(query)).scalar_one() == 0)


async def test_a_batch_from_its_creation_to_its_results(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    created = await account.create(jsonl(line(f"id-{number}") for number in range(5)), metadata={"purpose": "test"})
    assert created.id.startswith("batch_")
    assert (created.object, created.status, created.endpoint, created.completion_window) == ("batch", "validating", CHAT, "24h")
    assert created.metadata == {"purpose": "test"}
    assert created.expires_at == created.created_at + 86_400
    assert created.request_counts is not None
    assert (created.request_counts.total, created.output_file_id, created.error_file_id, created.errors) == (0, None, None, None)
    assert times(created) == set()
    await steps.validate()
    batch = await account.show(created)
    assert (batch.status, times(batch)) == ("in_progress", {"in_progress_at"})
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 0, "failed": 0}
    assert await pending(stack.db, batch.id) == {base.id: (5, 5 * (await line_rows(stack.db, batch.id))[0].tokens)}
    leases = await steps.lease(5)
    await steps.end(leases[:4])
    await steps.end(leases[4:], state="failed", answer=b'{"error": {"code": "invalid_type"}}')
    assert (await account.show(batch)).status == "finalizing"
    await steps.finalize()
    batch = await account.show(batch)
    assert (batch.status, times(batch)) == ("completed", {"in_progress_at", "finalizing_at", "completed_at"})
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 5, "completed": 4, "failed": 1}
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (25, 35, 60)
    assert batch.usage.input_tokens_details.cached_tokens == 10
    output, errors = await account.lines(batch.output_file_id), await account.lines(batch.error_file_id)
    assert len({each["id"] for each in output + errors}) == 5
    assert {each["custom_id"] for each in output + errors} == {f"id-{number}" for number in range(5)}
    assert all(each["error"] is None and each["response"]["status_code"] == 200 for each in output)
    assert output[0]["response"]["body"] == {"ok": True}
    assert output[0]["response"]["request_id"].startswith("req_")
    assert errors[0]["response"] == {
        "status_code": 400,
        "request_id": errors[0]["response"]["request_id"],
        "body": {"error": {"code": "invalid_type"}},
    }
    assert await no_rows(stack.db)
    assert await account.kept() == [f"{batch.id}_error.jsonl", f"{batch.id}_output.jsonl", "lines.jsonl"]


async def test_result_files_expire(account: Account, steps: Steps, base: BaseModel) -> None:
    ends = []
    for facts in ({}, {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}):
        batch = await account.create(jsonl([line("a")]), **facts)
        await steps.validate()
        await steps.end(await steps.lease(1))
        await steps.finalize()
        file = await account.files.get(account.tenant.id, str((await account.show(batch)).output_file_id))
        assert file.expires_at is not None
        ends.append((file.expires_at - file.created_at).total_seconds())
    assert ends == [30 * 86_400, 3600]


async def test_a_file_that_is_not_valid_fails_its_batch(account: Account, steps: Steps, stack: Stack) -> None:
    batch = await account.create(b"\n?\n" + jsonl([line("a"), line("a"), line(7)]))
    await steps.validate()
    batch = await account.show(batch)
    assert (batch.status, times(batch)) == ("failed", {"failed_at"})
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert [(error.code, error.line, error.param) for error in batch.errors.data or ()] == [
        ("invalid_json_line", 2, None),
        ("duplicate_custom_id", 4, "custom_id"),
        ("invalid_custom_id", 5, "custom_id"),
    ]
    assert await no_rows(stack.db)
    with pytest.raises(openai.ConflictError):
        await account.client.batches.cancel(batch.id)


async def test_lines_for_models_that_cannot_serve_them_fail_alone(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    other = await stack.tenant()
    await stack.adapter(other, "secret", base, files=False)
    await stack.adapter(account.tenant, "bot", base, files=False)
    lines = [
        line("unknown", model="nothing"),
        line("base"),
        line("theirs", model="secret"),
        line("mine", model="bot"),
        line("none", model=None),
        line("pinned", model="bot@1"),
        line("version", model="bot@2"),
        line("base too"),
    ]
    batch = await account.create(jsonl(lines))
    await steps.validate()
    assert (await account.show(batch)).status == "in_progress"
    rows = [(row.custom_id, row.state, row.status_code) for row in await line_rows(stack.db, batch.id)]
    assert {row for row in rows if row[1] == "failed"} == {
        ("unknown", "failed", 404),
        ("theirs", "failed", 404),
        ("version", "failed", 404),
        ("none", "failed", 400),
    }
    # Lines for the same model are neighbours: those of the base model, and those of the adapter under both of its names.
    order = [custom_id for custom_id, state, _ in rows if state == "pending"]
    assert {tuple(order[:2]), tuple(order[2:])} == {("base", "base too"), ("mine", "pinned")}
    await steps.end(await steps.lease(10))
    await steps.finalize()
    errors = {each["custom_id"]: each for each in await account.lines((await account.show(batch)).error_file_id)}
    assert errors["theirs"]["response"]["body"]["error"]["code"] == "model_not_found"
    assert errors["theirs"]["response"]["request_id"].startswith("req_")
    assert "secret" not in json.dumps(errors["theirs"]).replace("'secret'", "")
    assert errors["none"]["response"]["body"]["error"]["param"] == "model"


async def test_a_batch_whose_lines_all_fail_is_completed_without_an_output_file(account: Account, steps: Steps, base: BaseModel) -> None:
    batch = await account.create(jsonl(line(f"{number}", model="nothing") for number in range(3)))
    await steps.validate()
    assert (await account.show(batch)).status == "finalizing"
    await steps.finalize()
    batch = await account.show(batch)
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 0, "failed": 3}
    assert len(await account.lines(batch.error_file_id)) == 3


async def test_a_cancelled_batch_keeps_what_was_done(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    batch = await account.create(jsonl(line(f"{number}") for number in range(4)))
    await steps.validate()
    done, running = await steps.lease(2)
    await steps.end([done])
    batch = await account.client.batches.cancel(batch.id)
    assert (batch.status, times(batch)) == ("cancelling", {"in_progress_at", "cancelling_at"})
    # A second request changes nothing.
    assert (await account.client.batches.cancel(batch.id)).cancelling_at == batch.cancelling_at
    # This line had a result before the runner learned of the cancellation.
    await steps.end([running])
    await steps.finalize()
    batch = await account.show(batch)
    assert batch.status == "cancelled"
    assert batch.cancelled_at is not None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    assert len(await account.lines(batch.output_file_id)) == 2
    errors = await account.lines(batch.error_file_id)
    assert [(each["response"], each["error"]["code"]) for each in errors] == [(None, "batch_cancelled")] * 2
    with pytest.raises(openai.ConflictError, match="cancelled"):
        await account.client.batches.cancel(batch.id)
    assert await no_rows(stack.db)


async def test_a_batch_that_is_cancelled_before_or_during_its_validation(account: Account, steps: Steps, base: BaseModel) -> None:
    batch = await account.create(jsonl([line("a")]))
    lease = await steps.claim()
    await account.client.batches.cancel(batch.id)
    with pytest.raises(LeaseLost):
        await steps.work.validate(lease)
    async with steps.db.begin(account.tenant.id) as connection:
        await connection.execute(text("UPDATE batches SET runner_id = NULL"))
    await steps.finalize()
    batch = await account.show(batch)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("cancelled", None, None)


async def expire(stack: Stack, batch: Batch) -> None:
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET expires_at = now() WHERE id = :id"), {"id": batch.id})


async def test_an_expired_batch_keeps_what_was_done(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    batch = await account.create(jsonl(line(f"{number}") for number in range(3)))
    await steps.validate()
    await steps.end(await steps.lease(1))
    await expire(stack, batch)
    await steps.finalize()
    batch = await account.show(batch)
    assert (batch.status, times(batch)) == ("expired", {"in_progress_at", "finalizing_at", "expired_at"})
    assert len(await account.lines(batch.output_file_id)) == 1
    assert [each["error"]["code"] for each in await account.lines(batch.error_file_id)] == ["batch_expired"] * 2


async def test_a_stopped_batch_fails_the_rest_by_code(account: Account, steps: Steps, base: BaseModel) -> None:
    batch = await account.create(jsonl(line(f"{number}") for number in range(3)))
    await steps.validate()
    await steps.end(await steps.lease(1))
    await stop_batch(steps.db, account.tenant.id, batch.id, "insufficient_quota", "The budget is spent.")
    await steps.finalize()
    batch = await account.show(batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 1, "failed": 2}
    assert [each["error"] for each in await account.lines(batch.error_file_id)] == [
        {"code": "insufficient_quota", "message": "The budget is spent."}
    ] * 2


async def test_an_input_file_that_is_deleted_or_too_large(account: Account, steps: Steps, stack: Stack, base: BaseModel) -> None:
    batches = []
    for number in range(2):
        file = await account.upload(jsonl([line(f"{number}")]))
        batches.append(await account.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"))
        if number == 0:
            await account.files.delete(account.tenant.id, file.id)
        else:
            async with stack.db.begin(SYSTEM) as connection:
                await connection.execute(text("UPDATE files SET size_bytes = 200000001 WHERE id = :id"), {"id": file.id})
        await steps.validate()
    codes = []
    for batch in batches:
        errors = (await account.show(batch)).errors
        assert errors is not None
        codes += [(error.code, error.line, error.param) for error in errors.data or ()]
    assert codes == [("input_file_not_found", None, "input_file_id"), ("file_too_large", None, "input_file_id")]


async def test_a_repeated_step_leaves_one_result(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    """A runner that lost its lease writes nothing, and a repeated step writes everything once."""
    batch = await account.create(jsonl(line(f"{number}") for number in range(3)))
    lost = await steps.claim()
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET runner_id = NULL"))
    await steps.validate()
    with pytest.raises(LeaseLost):
        await steps.work.validate(lost)
    assert len(await line_rows(stack.db, batch.id)) == 3
    await steps.end(await steps.lease(3))
    lost = await steps.claim()
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("UPDATE batches SET runner_id = NULL"))
    now = await steps.claim()
    with pytest.raises(LeaseLost):
        await steps.work.finalize(lost)
    assert await account.kept() == ["lines.jsonl"]
    await steps.work.finalize(now)
    with pytest.raises(LeaseLost):
        await steps.work.finalize(now)
    assert await account.kept() == [f"{batch.id}_output.jsonl", "lines.jsonl"]


@pytest.mark.parametrize("place", ["delete_lines", "move_leased"])
async def test_finalizing_that_breaks_off_leaves_nothing_and_is_repeated(
    account: Account, steps: Steps, base: BaseModel, stack: Stack, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The files, the end of the batch and the deletion of its lines are one transaction."""
    batch = await account.create(jsonl([line("a"), line("b", model="nothing")]))
    await steps.validate()
    await steps.end(await steps.lease(1))
    lease = await steps.claim()

    async def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("as if the process had been killed")

    with monkeypatch.context() as patch:
        patch.setattr(f"lmaas.batches.work.{place}", broken)
        with pytest.raises(ConnectionResetError):
            await steps.work.finalize(lease)
    assert (await account.show(batch)).status == "finalizing"
    assert await account.kept() == ["lines.jsonl"]
    assert len(await line_rows(stack.db, batch.id)) == 2
    await steps.work.finalize(lease)
    batch = await account.show(batch)
    assert batch.status == "completed"
    assert await account.kept() == [f"{batch.id}_error.jsonl", f"{batch.id}_output.jsonl", "lines.jsonl"]
    assert await no_rows(stack.db)


async def test_validation_that_breaks_off_leaves_no_lines(
    account: Account, steps: Steps, base: BaseModel, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await account.create(jsonl([line("a")]))
    lease = await steps.claim()

    async def broken(connection: Any, tenant_id: str, batch_id: str, lines: Any) -> None:
        await add_lines(connection, tenant_id, batch_id, lines)
        raise ConnectionResetError("as if the process had been killed")

    with monkeypatch.context() as patch:
        patch.setattr("lmaas.batches.work.add_lines", broken)
        with pytest.raises(ConnectionResetError):
            await steps.work.validate(lease)
    assert await no_rows(stack.db)
    assert (await account.show(batch)).status == "validating"
    await steps.work.validate(lease)
    assert (await account.show(batch)).status == "in_progress"


async def test_a_runner_gives_up_a_batch_that_it_cannot_validate(account: Account, steps: Steps) -> None:
    batch = await account.create(jsonl([line("a")]))
    await steps.work.fail(await steps.claim(), "internal_error", "The service failed.")
    batch = await account.show(batch)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert [(error.code, error.message, error.line) for error in batch.errors.data or ()] == [
        ("internal_error", "The service failed.", None)
    ]


async def test_the_order_follows_the_beginnings_of_prompts(account: Account, steps: Steps, base: BaseModel, stack: Stack) -> None:
    systems = ["You are a pirate. " * 50, "You are a judge. " * 50]
    lines = [
        line(f"{number}", messages=[{"role": "system", "content": systems[number % 2]}, {"role": "user", "content": f"{number}"}])
        for number in range(10)
    ]
    batch = await account.create(jsonl(lines))
    await steps.validate()
    order = [int(row.custom_id) % 2 for row in await line_rows(stack.db, batch.id)]
    assert order in ([0] * 5 + [1] * 5, [1] * 5 + [0] * 5)


async def test_refused_creations(account: Account, stack: Stack) -> None:
    file, notes = await account.upload(b"{}\n"), await account.upload(b"{}\n", Purpose.USER_DATA)
    others = account.client.with_options(api_key=(await stack.tenant()).key)
    with pytest.raises(openai.NotFoundError) as unknown:
        await account.client.batches.create(input_file_id="file-" + "0" * 24, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError) as theirs:
        await others.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    assert (theirs.value.body, theirs.value.param) == (unknown.value.body, "input_file_id")
    assert theirs.value.code == "file_not_found"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"input_file_id": notes.id}, "input_file_id"),
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: ""}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3599}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"extra_body": {"unknown": 1}}, "unknown"),
    ]
    for changes, param in wrong:
        facts: dict[str, Any] = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"} | changes
        with pytest.raises(openai.BadRequestError) as caught:
            await account.client.batches.create(**facts)
        assert caught.value.param == param
    assert (await account.client.batches.list()).data == []


async def test_lists_in_pages(account: Account) -> None:
    file = await account.upload(b"{}\n")
    created = [(await account.client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")).id for _ in range(5)]
    assert [batch.id async for batch in account.client.batches.list(limit=2)] == created[::-1]
    page = await account.client.batches.list(limit=2, after=created[3])
    assert ([batch.id for batch in page.data], page.has_more) == ([created[2], created[1]], True)
    for changes in ({"after": "batch_" + "0" * 20}, {"limit": 0}, {"limit": 10**6}):
        with pytest.raises(openai.BadRequestError):
            await account.client.batches.list(**changes)


async def test_batches_of_others_do_not_exist(account: Account, stack: Stack) -> None:
    batch = await account.create(b"{}\n")
    others = account.client.with_options(api_key=(await stack.tenant()).key)
    assert (await others.batches.list()).data == []
    for batch_id in (batch.id, "batch_" + "0" * 20, "nonsense"):
        for call in (others.batches.retrieve, others.batches.cancel):
            with pytest.raises(openai.NotFoundError) as caught:
                await call(batch_id)
            assert caught.value.code == "batch_not_found"
    assert (await account.show(batch)).status == "validating"


async def test_limits_of_a_tenant(account: Account, steps: Steps, base: BaseModel, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TIERS, "standard", dataclasses.replace(TIERS["standard"], max_batches=3, max_batch_lines=5))
    # A tenant's only batch is accepted whatever its number of lines.
    large = await account.create(jsonl(line(f"{number}") for number in range(9)))
    await steps.validate()
    assert (await account.show(large)).status == "in_progress"
    with pytest.raises(openai.RateLimitError, match="9 requests that wait"):
        await account.create(jsonl([line("a")]))
    await steps.end(await steps.lease(6))
    await account.create(jsonl([line("a"), line("b")]))
    third = await account.create(jsonl([line("a")]))
    await steps.validate()
    await steps.validate()
    third = await account.show(third)
    assert third.errors is not None
    assert [(error.code, error.line) for error in third.errors.data or ()] == [("batch_limit_exceeded", None)]
    await steps.end(await claimed(steps))
    await account.create(jsonl([line("a")]))
    with pytest.raises(openai.RateLimitError, match="3 batches that have not ended") as caught:
        await account.create(jsonl([line("a")]))
    assert caught.value.code == "batch_limit_exceeded"
    assert stack.url


async def claimed(steps: Steps) -> Any:
    """Lease every waiting line."""
    leases = []
    for offer in await backlog(steps.db):
        leases += await claim_lines(steps.db, steps.runner_id, offer.pool_id, {(offer.tenant_id, offer.batch_id): 100})
    return leases


async def test_answers_are_stored_as_they_came(account: Account, steps: Steps, base: BaseModel) -> None:
    batch = await account.create(jsonl([line("a"), line("b"), line("c")]))
    await steps.validate()
    whole, error, pretty = await steps.lease(3)
    await steps.end([whole], answer=json.dumps({"text": "é\u2028🦜\n"}, ensure_ascii=False).encode())
    await steps.end([pretty], answer=b'{\n "a": 1\r\n}')
    failed = dataclasses.replace(ended(error), state=LineState.FAILED, status_code=None, answer=b'{"code": "c", "message": "m"}')
    await steps.end_all([failed])
    await steps.finalize()
    batch = await account.show(batch)
    assert [each["response"]["body"] for each in await account.lines(batch.output_file_id)] == [{"text": "é\u2028🦜\n"}, {"a": 1}]
    assert [each["error"] for each in await account.lines(batch.error_file_id)] == [{"code": "c", "message": "m"}]
    assert (await batch_row(account.stack.db, batch.id)).completed == 2
