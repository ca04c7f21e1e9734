"""Events reach their targets, whatever the targets do."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from datetime import timedelta

import pytest
from openai import OpenAI

from lmaas.states import EventType
from lmaas.store import webhooks as rows
from lmaas.store.deliveries import MAX_OF_WEBHOOK
from lmaas.store.runners import free_lost
from lmaas.webhooks.signing import new_key, secret_of
from lmaas.webhooks.targets import Targets
from tests.integration.webhooks.conftest import Events
from tests.integration.webhooks.target import Answer, never, raw, status
from tests.support.conditions import until


async def test_an_event_is_signed_as_openais_client_expects(events: Events) -> None:
    key, other = new_key(), new_key()
    webhook_id = await events.webhook(key=key, event_types=["batch.completed"])
    await events.webhook(event_types=["batch.failed"])
    async with events.runner():
        await events.add()
        found = await events.attempted(webhook_id)
        assert (found.state, found.status_code, found.error) == ("delivered", 200, None)
        [received] = events.target.received
        assert received.path == "/events"
        assert (received.headers["host"], received.headers["content-type"]) == (f"127.0.0.1:{events.target.port}", "application/json")
        client = OpenAI(api_key="none", webhook_secret=secret_of(key))
        event = client.webhooks.unwrap(received.body, received.headers)
        client.close()
        assert (event.id, event.type, event.object) == (found.id, "batch.completed", "event")
        assert event.data.id == "batch_0"
        assert abs(event.created_at - time.time()) < 60
        # Computed again, without the product's code.
        content = f"{found.id}.{received.headers['webhook-timestamp']}.{received.body.decode()}"
        expected = base64.b64encode(hmac.new(key, content.encode(), hashlib.sha256).digest()).decode()
        assert received.headers["webhook-signature"] == f"v1,{expected}"
        # After a rotation, both secrets verify for a while.
        await rows.rotate_secret(events.db, events.tenant_id, webhook_id, rows.Secret(other, "…"), timedelta(hours=1))
        await rows.redeliver(events.db, events.tenant_id, webhook_id, found.id)
        again = await events.attempted(webhook_id, 2)
        assert again.state == "delivered"
        for each in (key, other):
            with OpenAI(api_key="none", webhook_secret=secret_of(each)) as client:
                assert client.webhooks.unwrap(events.target.received[1].body, events.target.received[1].headers).id == found.id
        # Without an overlap only the new one does.
        await rows.rotate_secret(events.db, events.tenant_id, webhook_id, rows.Secret(new_key(), "…"), timedelta(0))
        await rows.redeliver(events.db, events.tenant_id, webhook_id, found.id)
        await events.attempted(webhook_id, 3)
        assert " " not in events.target.received[2].headers["webhook-signature"]


FAULTS: dict[str, tuple[Answer, int | None, str]] = {
    "error": (status(500), 500, "HTTP 500"),
    "redirect": (status(307, location="http://169.254.169.254/"), 307, "redirects are not followed"),
    "silence": (never, None, "did not answer within"),
    "garbage": (raw(b"\x00\x01 nonsense\r\n\r\n"), None, "not valid HTTP"),
    "hanging up": (raw(b""), None, "closed the connection"),
    "endless headers": (raw(b"HTTP/1.1 200 OK\r\n" + b"x-more: " + b"a" * 100_000 + b"\r\n\r\n"), None, "not valid HTTP"),
    "many headers": (raw(b"HTTP/1.1 200 OK\r\n" + b"x-more: a\r\n" * 50_000 + b"\r\n"), None, "not valid HTTP"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_target_that_fails_gets_the_event_again(events: Events, fault: str) -> None:
    answer, code, words = FAULTS[fault]
    events.target.answers.append(answer)
    webhook_id = await events.webhook()
    async with events.runner(attempt_s=1.0):
        await events.add()
        found = await events.attempted(webhook_id)
        assert (found.state, found.status_code, found.ended_at) == ("pending", code, None)
        assert words in (found.error or "")
        assert found.attempted_at is not None
        assert found.due_at - found.attempted_at == timedelta(seconds=5)
        assert (await events.shown(webhook_id)).failing_since is not None
        await events.pass_time(1)
        found = await events.attempted(webhook_id, 2)
    assert (found.state, found.error) == ("delivered", None)
    assert len(set(events.target.ids())) == 1
    assert (await events.shown(webhook_id)).failing_since is None


async def test_a_target_that_sends_gigabytes_costs_nothing(events: Events) -> None:
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n")
        while sent < 10**10:
            writer.write(b"x" * 2**16)
            await writer.drain()
            sent += 2**16

    events.target.answer = flood
    webhook_id = await events.webhook()
    async with events.runner():
        await events.add()
        assert (await events.attempted(webhook_id)).state == "delivered"
        await until(lambda: events.target.open == 0)
    assert sent < 64 * 2**20


async def test_targets_that_cannot_be_reached(events: Events) -> None:
    urls = {"http://127.0.0.1:1/": "cannot be reached", "http://name.invalid/": "cannot be resolved", "http://10.0.0.1/": "is not public"}
    urls[f"https://127.0.0.1:{events.target.port}/"] = "TLS"
    ids = {await events.webhook(url): words for url, words in urls.items()}
    async with events.runner():
        await events.add()
        for webhook_id, words in ids.items():
            assert words in ((await events.attempted(webhook_id)).error or "")
    assert events.target.received == []


async def test_a_private_target_is_never_called(events: Events) -> None:
    """A private target is never called, not even one that was stored while an operator allowed it."""
    webhook_id = await events.webhook()
    async with events.runner(targets=Targets()):
        await events.add()
        found = await events.attempted(webhook_id)
    assert "LMAAS_WEBHOOK_PRIVATE_TARGETS" in (found.error or "")
    assert events.target.received == []


async def test_a_target_that_was_away_for_a_day_gets_everything_at_once(events: Events) -> None:
    events.target.answer = status(503, retry_after="120")
    webhook_id = await events.webhook()
    async with events.runner():
        await events.add(6)

        async def all_tried() -> bool:
            return all(each.attempts == 1 for each in await events.deliveries(webhook_id))

        await until(all_tried)
        failed = await events.deliveries(webhook_id)
        assert {each.due_at - each.attempted_at for each in failed if each.attempted_at} == {timedelta(seconds=120)}
        # To a target that fails, one at a time.
        assert len(events.target.received) == 6
        await events.execute("UPDATE webhook_deliveries SET failures = 6, due_at = now() + interval '10 hours'")
        events.target.answer = status(204)
        await rows.redeliver(events.db, events.tenant_id, webhook_id, failed[3].id)

        async def all_delivered() -> bool:
            return all(each.state == "delivered" for each in await events.deliveries(webhook_id))

        await until(all_delivered)
    assert len(events.target.received) == 12
    assert len(set(events.target.ids())) == 6


async def test_an_event_that_no_attempt_delivers_has_failed(events: Events) -> None:
    events.target.answer = status(500)
    webhook_id = await events.webhook()
    async with events.runner():
        await events.add()
        await events.attempted(webhook_id)
        await events.execute("UPDATE webhook_deliveries SET failures = 10, due_at = now()")
        found = await events.attempted(webhook_id, 2)
        assert (found.state, found.error) == ("failed", "The target answered with HTTP 500.")
        assert found.ended_at is not None
        # It can be sent again, with a new count of attempts.
        await rows.redeliver(events.db, events.tenant_id, webhook_id, found.id)
        found = await events.attempted(webhook_id, 3)
        assert found.state == "pending"
    assert (await events.shown(webhook_id)).disabled_at is None


@pytest.mark.parametrize("gone", [True, False])
async def test_a_target_that_keeps_failing_is_switched_off(events: Events, *, gone: bool) -> None:
    events.target.answer = status(410 if gone else 500)
    webhook_id = await events.webhook()
    async with events.runner(off_after_s=3 * 86400):
        await events.add(2)
        if not gone:
            await until(lambda: len(events.target.received) == 2)
            await events.pass_time(3)

        async def is_off() -> bool:
            return (await events.shown(webhook_id)).disabled_at is not None

        await until(is_off)
        reason = (await events.shown(webhook_id)).disabled_reason or ""
        assert ("410" in reason) if gone else ("3 days" in reason and "HTTP 500" in reason)

        async def all_ended() -> bool:
            return {each.state for each in await events.deliveries(webhook_id)} == {"failed"}

        await until(all_ended)
        # It gets no more events until it is switched on again.
        await events.add()
        assert len(await events.deliveries(webhook_id)) == 2
        events.target.answer = status(200)
        await rows.change_webhook(events.db, events.tenant_id, webhook_id, {"enabled": True})
        shown = await events.shown(webhook_id)
        assert (shown.disabled_at, shown.disabled_reason, shown.failing_since) == (None, None, None)
        before = len(events.target.received)
        await events.add()
        await until(lambda: len(events.target.received) == before + 1)
    assert await _audited(events) == ["webhook.disable"]


async def _audited(events: Events) -> list[str]:
    async with events.db.begin(events.tenant_id) as connection:
        found = await connection.exec_driver_sql("SELECT action FROM audit_log WHERE actor = 'system'")
        return [row.action for row in found]


async def test_slow_targets_take_turns_with_others(events: Events) -> None:
    """However much waits for a slow target, only a few connections to it are open, and others are served."""
    slow = await events.webhook()
    events.target.answer = never
    await events.add(20)
    async with events.runner(attempt_s=3.0):
        await until(lambda: events.target.open == MAX_OF_WEBHOOK)
        events.target.answers.append(status(200))
        events.target.answer = never
        other = await events.webhook(event_types=["batch.failed"], url=events.target.url + "?other")
        await events.add(1, EventType.BATCH_FAILED)

        async def is_served() -> bool:
            return [each.state for each in await events.deliveries(other)] == ["delivered"]

        await until(is_served)
        assert events.target.most_open <= MAX_OF_WEBHOOK + 1
        await rows.delete_webhook(events.db, events.tenant_id, slow)
    assert len(await events.column("id")) == 1


async def test_a_runner_that_dies_leaves_its_deliveries_to_others(events: Events) -> None:
    """Delivery is at least once, under the same id: the target had accepted the event, but this was not stored."""
    webhook_id = await events.webhook()
    events.target.answers.append(never)
    async with events.runner(attempt_s=60) as first, events.runner() as second:
        await events.add()
        await until(lambda: len(events.target.received) == 1)
        [holder] = [running for running in (first, second) if running.id in await events.column("runner_id")]
        await holder.kill()
        await events.execute("UPDATE job_runners SET seen_at = now() - interval '1 hour' WHERE id = :id", id=holder.id)
        assert await free_lost(events.jobs) == holder.id
        found = await events.attempted(webhook_id)
    assert found.state == "delivered"
    assert len(events.target.received) == 2
    assert len(set(events.target.ids())) == 1


async def test_metrics_count_attempts_and_name_no_tenant(events: Events) -> None:
    events.target.answers.append(status(500))
    webhook_id = await events.webhook()
    async with events.runner():
        await events.add()
        await events.attempted(webhook_id)
        await events.pass_time(1)
        await events.attempted(webhook_id, 2)
    found = {metric.name: metric for metric in events.metrics.collect()}
    outcomes = {sample.labels["outcome"]: sample.value for sample in found["lmaas_webhook_attempts"].samples}
    assert outcomes == {"delivered": 1, "retried": 1, "failed": 0}
    assert events.tenant_id not in str([metric.samples for metric in found.values()])
    assert json.loads(events.target.received[0].body)["object"] == "event"
