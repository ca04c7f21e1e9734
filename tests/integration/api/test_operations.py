"""Every operation of the table: its response, and its record in the audit log."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from lmaas.api import table
from lmaas.api.operation import Permission, Place, filled
from lmaas.api.table import PLACES
from lmaas.errors import Unavailable
from lmaas.files.service import Purpose
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.manifests import client
from lmaas.states import Observed
from lmaas.store.adapters import add_version
from lmaas.store.replicas import add_replica, observe
from lmaas.store.responses import save
from lmaas.store.scopes import SYSTEM
from lmaas.store.tables import audit_log
from lmaas.store.tenants import create_key, find_principal, revoke_key
from lmaas.store.usage import record_events
from lmaas.types import Role
from tests.integration.gateway.stack import Stack, running
from tests.integration.schemas import CHECKED, SPEC
from tests.integration.store.build import stored_response, usage_event
from tests.support.adapters import base, config, pack, tensors
from tests.support.base_models import write_model
from tests.support.batches import make_batch

BY_ID = {place.id: place for place in PLACES}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture(scope="module")
async def everyone(
    postgres_url: str, valkey_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    """A client for each kind of key, on a service that no test changes."""
    async with running(postgres_url, valkey_url, tmp_path_factory.mktemp("everyone")) as stack, AsyncExitStack() as clients:
        acme = await stack.tenant()
        found = {}
        for name, owner, role in (
            ("operator", None, Role.OPERATOR),
            ("tenant_admin", acme.id, Role.TENANT_ADMIN),
            ("inference", acme.id, Role.INFERENCE),
            ("revoked", acme.id, Role.TENANT_ADMIN),
            ("nobody", None, None),
        ):
            key = new_key()
            if role is not None:
                row = await create_key(stack.db, owner, role, name, hash_key(key), shown_prefix(key))
                if name == "revoked":
                    await revoke_key(stack.db, owner, row.id)
            headers = {"authorization": f"Bearer {key}"}
            client = httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60, event_hooks=CHECKED)
            found[name] = await clients.enter_async_context(client)
        yield found


async def records(stack: Stack) -> list[Any]:
    async with stack.db.begin(SYSTEM) as connection:
        return list(await connection.execute(select(audit_log).order_by(audit_log.c.id)))


#: The tables that operations change.
TABLES = (
    "webhooks",
    "webhook_deliveries",
    "tenants",
    "api_keys",
    "base_models",
    "adapters",
    "adapter_versions",
    "replicas",
    "batches",
    "files",
    "content_checks",
)


async def everything(stack: Stack) -> dict[str, list[str]]:
    """Return every row that an operation may change, and the contents of the object store."""
    found = {"objects": sorted(str(path) for path in (stack.settings.home / "objects").rglob("*") if path.is_file())}
    async with stack.db.begin(SYSTEM) as connection:
        for table_name in TABLES:
            rows = await connection.execute(text(f"SELECT t::text FROM {table_name} t ORDER BY 1"))  # noqa: S608 (our own names)
            found[table_name] = list(rows.scalars())
    return found


@asynccontextmanager
async def refusing_log(stack: Stack) -> AsyncIterator[None]:
    """Have the database refuse every audit record during the block."""
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("ALTER TABLE audit_log ADD CONSTRAINT refused CHECK (false) NOT VALID"))
    yield
    async with stack.db.begin(SYSTEM) as connection:
        await connection.execute(text("ALTER TABLE audit_log DROP CONSTRAINT refused"))


class Walker:
    """Calls operations of the table, and compares what each leaves in the audit log with the table."""

    def __init__(self, stack: Stack, key: str) -> None:
        self.stack, self.key = stack, key
        self.walked: set[str] = set()
        self.path: dict[str, str] = {}

    async def _send(self, place: Place, body: Any, form: Any, query: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.stack.url, event_hooks=CHECKED, timeout=60) as http:
            return await http.request(
                place.operation.method,
                filled(place.path, self.path),
                headers={"authorization": f"Bearer {self.key}"},
                params=query,
                json=body,
                **({"data": form[0], "files": form[1]} if form else {}),
            )

    async def __call__(self, place_id: str, body: Any = None, *, changes: bool = True, form: Any = None, **query: str) -> dict[str, Any]:
        """Call an operation with `self.key` and the parameters of `self.path`; `changes` is whether the operation has something to change.

        A change is tried first while its audit record cannot be written, and must then change nothing.
        """
        place, before = BY_ID[place_id], await everything(self.stack)
        operation = place.operation
        recorded = operation.audit is not None and changes
        if recorded:
            async with refusing_log(self.stack):
                assert (await self._send(place, body, form, query)).is_error, place_id
            assert await everything(self.stack) == before, place_id
        principal = await find_principal(self.stack.db, hash_key(self.key))
        old = len(await records(self.stack))
        answer = await self._send(place, body, form, query)
        assert answer.status_code == (200 if query.get("dry_run") else operation.status), (place_id, answer.text)
        new = (await records(self.stack))[old:]
        assert (await everything(self.stack) != before) == recorded, place_id
        assert len(new) == recorded, place_id
        if recorded:
            assert principal is not None
            [record] = new
            assert (record.action, record.actor, record.key_id) == (operation.audit, principal.role, principal.key_id), place_id
            assert record.request_id == answer.headers["x-request-id"]
            about_tenant = operation.permission is not Permission.OPERATOR or place_id.endswith("_tenant")
            assert (record.tenant_id is not None) == about_tenant, place_id
        self.walked.add(place_id)
        found: dict[str, Any] = answer.json() if operation.answer is not None else {"content": answer.content}
        return found


async def test_each_operation_answers_by_its_schema_and_leaves_its_record(stack: Stack, operator_key: str, tmp_path: Path) -> None:
    walk = Walker(stack, operator_key)
    # Tenants and keys.
    acme = await walk("create_tenant", {"name": "acme", "requests_per_minute": 0, "max_concurrent": None, "tokens_per_minute": 9})
    assert (acme["requests_per_minute"], acme["max_concurrent"], acme["tokens_per_minute"]) == (None, None, 9)
    walk.path = {"tenant": "acme"}
    assert await walk("get_tenant") == acme
    assert (await walk("list_tenants"))["data"] == [acme]
    assert (await walk("change_tenant", {"tokens_per_minute": 0, "max_queued": 7}))["tokens_per_minute"] is None
    await walk("change_tenant", {"max_queued": 7}, changes=False)
    await walk("change_tenant", {}, changes=False)
    await walk("change_tenant", {"max_queued": 8}, changes=False, dry_run="true")
    await walk("create_tenant", {"name": "globex"}, changes=False, dry_run="true")
    admin = (await walk("create_key_of_tenant", {"role": "tenant_admin", "name": "admin"}))["key"]
    other = await walk("create_key_of_tenant", {"tokens_per_month": 5})
    walk.path |= {"key": other["id"]}
    assert len((await walk("list_keys_of_tenant"))["data"]) == 2
    assert (await walk("change_key_of_tenant", {"tokens_per_month": 0}))["tokens_per_month"] is None
    await walk("change_key_of_tenant", {"tokens_per_month": None}, changes=False)
    await walk("revoke_key_of_tenant")
    await walk("revoke_key_of_tenant", changes=False)
    walk.path |= {"key": (await walk("create_operator_key", {"name": "second"}))["id"]}
    assert {key["role"] for key in (await walk("list_operator_keys"))["data"]} == {"operator"}
    await walk("revoke_operator_key")
    walk.key = admin
    assert await walk("get_own_tenant") == await _as_operator(walk, operator_key)
    # Sessions.
    for suffix, key in (("", admin), ("_operator", operator_key)):
        walk.key = key
        session = await walk(f"create{suffix}_session", {})
        walk.key = session["key"]
        assert await walk(f"show{suffix}_session") == {name: value for name, value in session.items() if name != "key"}
        await walk(f"end{suffix}_session")
    walk.key = operator_key
    # Base models and replicas.
    linears = {name: list(shape) for name, shape in base().linears.items() if "layers" in name}
    folder = write_model(tmp_path / "tiny", linears)
    model = await walk("create_base_model", {"name": "tiny", "source": str(folder), "dtype": "bfloat16"})
    walk.path |= {"model": "tiny", "replica": "rep_1"}
    assert await walk("get_base_model") == model
    assert (await walk("list_base_models"))["data"] == [model]
    await walk("change_base_model", {"max_num_seqs": 3})
    await walk("change_base_model", {"max_num_seqs": 3}, changes=False)
    await add_replica(stack.db, "rep_1", model["id"])
    assert len((await walk("list_replicas", ended="true"))["data"]) == 1
    assert (await walk("get_replica"))["desired"] == "running"
    # A supervisor of another release may write the start like this.
    start: dict[str, int | str] = {"by": "plain", "total_ms": 5, "of_another_release_ms": 1}
    await observe(stack.db, "rep_1", Observed.READY, url="http://e", start=start)
    assert (await walk("get_replica"))["start"] == {"by": "plain", "total_ms": 5}
    await walk("stop_replica")
    await walk("stop_replica", changes=False)
    await observe(stack.db, "rep_1", Observed.STOPPED)
    # Adapters, uploaded by an operator and by the tenant itself.
    files = {"adapter_config": config(), "adapter_model": pack(tensors())}
    changed = files | {"adapter_model": pack(tensors(dtype="F16"))}
    await walk("check_adapter", form=({"base_model": "tiny"}, files))
    for suffix, key in (("_of_tenant", operator_key), ("", admin)):
        walk.key, walk.path["name"] = key, f"bot{suffix.replace('_', '-')}"
        form = {"name": walk.path["name"], "base_model": "tiny"}
        await walk(f"upload_adapter{suffix}", form=(form, files))
        await walk(f"upload_adapter{suffix}", form=(form | {"activate": "false"}, changed))
        assert (await walk(f"get_adapter{suffix}"))["live_version"] == 1
        assert [row["id"] for row in (await walk(f"list_versions{suffix}"))["data"]] == [f"{walk.path['name']}@1", f"{walk.path['name']}@2"]
        await walk(f"activate_version{suffix}", {"version": 2})
        await walk(f"activate_version{suffix}", {"version": 2}, changes=False)
        assert [row["name"] for row in (await walk(f"list_adapters{suffix}"))["data"]] == [walk.path["name"]]
        await walk(f"delete_adapter{suffix}")
    # The tenant's operations on its keys and its usage.
    walk.path["key"] = (await walk("create_key", {"role": "inference"}))["id"]
    assert len((await walk("list_keys"))["data"]) == 3
    await walk("change_key", {"requests_per_minute": 3})
    await walk("revoke_key")
    events = [usage_event("r1", acme["id"], adapter="ada", replica_id="rep_1"), usage_event("r2", None)]
    await record_events(stack.db, events)
    [line] = (await walk("report_usage", since="2026-01-02", until="2026-01-02", by="day,tenant"))["data"]
    assert (line["tenant"], line["requests"]) == ("acme", 1)
    [event] = (await walk("list_events"))["data"]
    assert event["request_id"] == "r1"
    assert event["adapter"] == "base"
    assert event.keys() & {"engine_adapter", "replica_id"} == set()
    await _walk_stored(walk, acme["id"])
    await _walk_files(walk)
    await _walk_batches(walk, acme["id"], operator_key)
    await _walk_webhooks(walk, operator_key)
    walk.key = operator_key
    assert len((await walk("report_all_usage"))["data"]) == 2
    [event] = (await walk("list_all_events", tenant="acme"))["data"]
    assert (event["adapter"], event["engine_adapter"], event["replica_id"]) == ("base", "ada", "rep_1")
    checked = await walk("check_usage", since="2026-01-01", until="2026-01-02")
    assert (checked["events"], checked["differences"]) == (2, [])
    await walk("report_cogs", by="day,adapter")
    await walk("delete_base_model")
    await walk("delete_tenant")
    assert walk.walked == set(BY_ID)


async def _as_operator(walk: Walker, operator_key: str) -> dict[str, Any]:
    """Return the tenant as an operator sees it, and continue with the same key."""
    own, walk.key = walk.key, operator_key
    shown = await walk("get_tenant")
    walk.key = own
    return shown


async def _walk_stored(walk: Walker, tenant_id: str) -> None:
    """Call the operations on what a tenant's requests have stored, which leave no records."""
    await save(walk.stack.db, tenant_id, [stored_response("resp_1")], timedelta(days=1))
    walk.path["response"] = "resp_1"
    assert (await walk("get_response"))["object"] == "response"
    assert [item["id"] for item in (await walk("list_input_items", limit="1", order="asc"))["data"]] == ["msg_1"]
    with pytest.raises(AssertionError, match="Cannot cancel a synchronous response"):
        await walk("cancel_response")
    walk.walked.add("cancel_response")
    assert await walk("delete_response") == {"id": "resp_1", "object": "response", "deleted": True}
    item = {"role": "user", "content": "Hi"}
    made = await walk("create_conversation", {"items": [item], "metadata": {"a": "b"}})
    walk.path["conversation"] = made["id"]
    assert await walk("get_conversation") == made
    assert (await walk("change_conversation", {"metadata": None}))["metadata"] == {}
    [added] = (await walk("add_items", {"items": [item | {"content": "Ho"}]}))["data"]
    assert (await walk("list_items"))["data"][0] == added
    walk.path["item"] = added["id"]
    assert await walk("get_item") == added
    assert await walk("delete_item") == made | {"metadata": {}}
    assert (await walk("delete_conversation"))["deleted"] is True


async def _walk_files(walk: Walker) -> None:
    """Call the operations on files."""
    made = await walk("create_file", form=({"purpose": "batch"}, {"file": ("lines.jsonl", b"{}")}))
    walk.path["file"] = made["id"]
    assert (await walk("list_files"))["data"] == [await walk("get_file")] == [made]
    assert await walk("get_file_content") == {"content": b"{}"}
    assert (await walk("delete_file"))["deleted"] is True


async def _walk_batches(walk: Walker, tenant_id: str, operator_key: str) -> None:
    """Call the operations on batches, as far as they need no job runner."""
    files, admin = walk.stack.services.files(walk.stack.settings), walk.key

    async def lines() -> AsyncIterator[bytes]:
        yield b'{"custom_id": "a", "result": {"type": "expired"}}\n'

    file = await files.add(tenant_id, Purpose.BATCH, "lines.jsonl", lines())
    asked = {"input_file_id": file.id, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    for suffix, key in (("_of_tenant", operator_key), ("", admin)):
        walk.key = admin
        made = await walk("create_batch", asked)
        walk.key, walk.path["batch"] = key, made["id"]
        assert await walk(f"get_batch{suffix}") == made
        assert (await walk(f"list_batches{suffix}"))["data"][0] == made
        assert (await walk(f"cancel_batch{suffix}"))["status"] == "cancelling"
        await walk(f"cancel_batch{suffix}", changes=False)
    request = {"custom_id": "a", "params": {"model": "tiny", "max_tokens": 1, "messages": []}}
    made = await walk("create_message_batch", {"requests": [request]})
    walk.path["batch"] = made["id"]
    assert await walk("get_message_batch") == made
    assert (await walk("list_message_batches"))["data"] == [made]
    assert (await walk("cancel_message_batch"))["processing_status"] == "canceling"
    async with walk.stack.db.begin(SYSTEM) as connection:
        ended = "UPDATE batches SET status = 'cancelled', cancelled_at = now(), output_file_id = :file WHERE id = :id"
        await connection.execute(text(ended), {"file": file.id, "id": made["id"]})
    assert await walk("message_batch_results") == {"custom_id": "a", "result": {"type": "expired"}}
    assert await walk("delete_message_batch") == {"id": made["id"], "type": "message_batch_deleted"}


async def _walk_webhooks(walk: Walker, operator_key: str) -> None:
    """Call the operations on webhooks, without a job runner that sends events."""
    admin = walk.key
    for suffix, key in (("_of_tenant", operator_key), ("", admin)):
        walk.key = key
        made = await walk(f"create_webhook{suffix}", {"url": "https://example.com/events", "event_types": ["batch.completed"]})
        secret = made.pop("signing_secret")
        assert secret.startswith(made["signing_secret_hint"][:-1])
        walk.path["webhook"] = made["id"]
        assert await walk(f"get_webhook{suffix}") == made
        assert made in (await walk(f"list_webhooks{suffix}"))["data"]
        sent = await walk(f"test_webhook{suffix}")
        walk.path["event"] = sent["id"]
        assert (sent["type"], sent["state"], sent["attempts"]) == ("webhook.test", "pending", 0)
        assert await walk(f"get_delivery{suffix}") == sent
        assert (await walk(f"list_deliveries{suffix}", state="pending"))["data"] == [sent]
        assert (await walk(f"redeliver{suffix}"))["id"] == sent["id"]
        rotated = await walk(f"rotate_webhook_secret{suffix}", {"overlap_s": 60})
        assert rotated["signing_secret"] != secret
        assert rotated["previous_secret_until"] is not None
        change = {"url": "https://example.org/", "name": "mine", "event_types": None, "enabled": False}
        changed = await walk(f"change_webhook{suffix}", change)
        assert {name: changed[name] for name in change} == change
        await walk(f"change_webhook{suffix}", change, changes=False)
        [failed] = (await walk(f"list_deliveries{suffix}"))["data"]
        assert (failed["state"], failed["next_attempt_at"]) == ("failed", None)
        assert await walk(f"delete_webhook{suffix}") == {"object": "webhook.deleted", "id": made["id"], "deleted": True}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.id)
async def test_permissions(everyone: dict[str, httpx.AsyncClient], place: Place) -> None:
    allowed = {
        Permission.OPERATOR: {"operator"},
        Permission.TENANT_ADMIN: {"tenant_admin"},
        Permission.TENANT: {"tenant_admin", "inference"},
    }[place.permission]
    path = filled(place.path, dict.fromkeys(place.parameters, "none"))
    for name, http in everyone.items():
        answer = await http.request(place.operation.method, path)
        code = answer.json()["error"]["code"] if answer.is_error else None
        if name in ("nobody", "revoked"):
            assert (answer.status_code, code) == (401, "invalid_api_key")
        else:
            assert (code != "insufficient_permissions") == (name in allowed), (name, answer.text)
            assert answer.status_code < 500


async def test_a_refused_operation_leaves_no_record(stack: Stack, operator: httpx.AsyncClient, operator_key: str) -> None:
    acme = await stack.tenant()
    await operator.post("/admin/v1/tenants", json={"name": "acme"})
    before = await records(stack)
    refused = [
        await operator.post("/admin/v1/tenants", json={"name": "acme"}),
        await operator.post("/admin/v1/tenants", json={"name": "globex", "max_queud": 1}),
        await operator.patch("/admin/v1/tenants/acme", json={"tier": "gold"}),
        await operator.delete("/admin/v1/tenants/none"),
        await operator.delete("/admin/v1/keys/none"),
        await operator.post("/admin/v1/tenants/acme/adapters/none/activate", json={"version": 1}),
        await operator.delete("/admin/v1/replicas/none"),
    ]
    [mine] = [key for key in (await operator.get("/admin/v1/keys")).json()["data"] if key["revoked_at"] is None]
    last = await operator.delete(f"/admin/v1/keys/{mine['id']}")
    assert (last.status_code, last.json()["error"]["code"]) == (409, "last_operator_key")
    async with stack.client(acme) as tenant:
        refused += [last, await tenant.post("/v1/keys", json={}), await tenant.delete("/admin/v1/tenants/acme")]
    assert {answer.status_code for answer in refused} == {400, 403, 404, 409}
    assert await records(stack) == before
    forced = await operator.delete(f"/admin/v1/keys/{mine['id']}", params={"force": "true"})
    assert forced.json()["revoked_at"] is not None


async def test_a_tenant_whose_files_could_not_be_deleted_is_deleted_again(
    stack: Stack, operator: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await operator.post("/admin/v1/tenants", json={"name": "acme"})).json()
    model = await stack.model("base")
    weights = stack.settings.home / "weights"
    weights.write_bytes(b"weights")
    await stack.services.adapter_files.put(f"adapters/{made['id']}/{'0' * 64}", b"{}", weights)

    async def away(_: object) -> None:
        raise Unavailable("The adapter store cannot delete now.", code="object_store_unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(stack.services.adapter_files, "delete", away)
        answer = await operator.delete("/admin/v1/tenants/acme")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "object_store_unavailable")
    assert (await operator.get("/admin/v1/tenants/acme")).status_code == 404
    assert len(await stack.services.adapter_files.list_sources(made["id"])) == 1
    assert (await operator.delete("/admin/v1/tenants/acme")).json() == {"object": "tenant.deleted", "id": made["id"], "deleted": True}
    assert await stack.services.adapter_files.list_sources(made["id"]) == []
    assert (await operator.delete("/admin/v1/tenants/acme")).status_code == 404
    assert [record.action for record in await records(stack)] == ["tenant.create", "tenant.delete"]
    assert model.name == "base"


async def paged(http: httpx.AsyncClient, path: str, limit: int, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = (await http.get(path, params={"limit": str(limit), **after, **query})).json()
        assert len(page["data"]) <= limit
        found += page["data"]
        if not page["has_more"]:
            return found
        assert len(page["data"]) == limit
        after = {"after": page["last_id"]}


async def test_lists_have_pages_in_a_stable_order(stack: Stack, operator: httpx.AsyncClient, operator_key: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    for number in range(5):
        await operator.post("/admin/v1/tenants", json={"name": f"t{number}"})
        await operator.post("/admin/v1/tenants/t0/keys", json={"name": str(number)})
        await operator.post("/admin/v1/keys", json={"name": str(number)})
        await operator.post("/admin/v1/base-models", json={"name": f"m{number}", "source": str(folder)})
    tenant = (await operator.get("/admin/v1/tenants/t0")).json()["id"]
    model = (await operator.get("/admin/v1/base-models/m0")).json()
    facts: dict[str, Any] = {"rank": 8, "target_modules": ["q_proj"], "size_bytes": 7, "activate": True}
    for number in range(5):
        await add_replica(stack.db, f"rep_{number}", model["id"])
        await add_version(stack.db, tenant, f"bot{number}", model["id"], content_hash=str(number) * 64, **facts)
        await add_version(stack.db, tenant, "bot0", model["id"], content_hash=str(number) * 64, **facts)
        await make_batch(stack.db, tenant, [], status="completed")
        made = await operator.post("/admin/v1/tenants/t0/webhooks", json={"url": "https://example.com/"})
        webhook = made.json()["id"]
    for _ in range(5):
        await operator.post(f"/admin/v1/tenants/t0/webhooks/{webhook}/test")
    # They have all been created at the same time, so the id decides.
    await record_events(stack.db, [usage_event(f"r{number}", tenant, base_model=f"m{number}") for number in range(5)])
    lists = {
        "/admin/v1/tenants": 5,
        "/admin/v1/tenants/t0/keys": 5,
        "/admin/v1/keys": 6,
        "/admin/v1/base-models": 5,
        "/admin/v1/replicas": 5,
        "/admin/v1/usage": 5,
        "/admin/v1/usage/events": 5,
        "/admin/v1/tenants/t0/batches": 5,
        "/admin/v1/tenants/t0/adapters": 5,
        "/admin/v1/tenants/t0/adapters/bot0/versions": 5,
        "/admin/v1/tenants/t0/webhooks": 5,
        f"/admin/v1/tenants/t0/webhooks/{webhook}/deliveries": 5,
    }
    assert set(lists) == {
        filled(place.path, {"tenant": "t0", "name": "bot0", "webhook": webhook})
        for place in PLACES
        if place.operation.is_paged and place.path.startswith("/admin")
    }
    for path, count in lists.items():
        whole = (await operator.get(path)).json()
        assert (len(whole["data"]), whole["has_more"]) == (count, False), path
        for limit in (1, 2, 5, 1000):
            assert await paged(operator, path, limit) == whole["data"], (path, limit)
        for param, value in (("after", "none"), ("limit", "0"), ("limit", "1001"), ("limit", "x")):
            refused = await operator.get(path, params={param: value})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), path
    # An ended replica is no longer in the list, but still works as a cursor.
    first = (await operator.get("/admin/v1/replicas", params={"limit": "2"})).json()
    await observe(stack.db, first["last_id"], Observed.STOPPED)
    rest = (await operator.get("/admin/v1/replicas", params={"after": first["last_id"]})).json()
    assert [row["id"] for row in rest["data"]] == ["rep_2", "rep_1", "rep_0"]
    empty = (await operator.get("/admin/v1/tenants/t1/keys")).json()
    assert (empty["data"], empty["first_id"], empty["last_id"], empty["has_more"]) == ([], None, None, False)


async def test_the_client_reads_all_pages(
    stack: Stack, operator: httpx.AsyncClient, operator_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_PAGE", 2)
    for number in range(5):
        await operator.post("/admin/v1/tenants", json={"name": f"t{number}"})
    with closing(client.ApiClient(f"{stack.url}/v1", operator_key)) as api:
        for most, count in ((None, 5), (3, 3), (4, 4), (9, 5)):
            rows = await asyncio.to_thread(api.items, table.LIST_TENANTS, most=most)
            assert [row["name"] for row in rows] == [f"t{number}" for number in range(count)]


async def test_the_place_in_a_list_of_another_tenant_is_unknown(stack: Stack, operator: httpx.AsyncClient) -> None:
    acme, globex = await stack.tenant(), await stack.tenant()
    await record_events(stack.db, [usage_event("r1", acme.id), usage_event("r2", globex.id)])
    async with stack.client(acme) as http:
        assert (await http.get("/v1/usage/events", params={"after": "r1"})).status_code == 200
        assert (await http.get("/v1/usage/events", params={"after": "r2"})).json()["error"]["code"] == "invalid_cursor"
    refused = await operator.get(f"/admin/v1/tenants/{acme.id}/keys", params={"after": globex.key_id})
    assert refused.json()["error"]["code"] == "invalid_cursor"


async def test_the_document_is_served(operator: httpx.AsyncClient) -> None:
    assert (await operator.get("/openapi.json")).json() == json.loads(json.dumps(SPEC))
