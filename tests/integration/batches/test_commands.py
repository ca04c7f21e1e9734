"""`lmaas batches`, with a service and a job runner."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.api.test_base_models import lmaas
from tests.integration.batches.conftest import Account, jsonl, line
from tests.integration.gateway.stack import Stack


@pytest.mark.usefixtures("runner")
async def test_a_batch_by_commands(account: Account, stack: Stack, tmp_path: Path) -> None:
    async def run(*arguments: str, code: int = 0) -> str:
        ended, out, err = await lmaas(stack, account.tenant.key, *arguments)
        assert ended == code, (out, err)
        return out + err if code else out

    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(jsonl([line("a", max_tokens=4), line("b", model="nothing")]))
    batch: dict[str, Any] = json.loads(
        await run("--json", "batches", "create", str(requests), "--metadata", "of=me", "--results-expire-after", "3600", "--follow")
    )
    assert (batch["status"], batch["metadata"]) == ("completed", {"of": "me"})
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    shown = await run("batches", "show", batch["id"], "--follow")
    assert "completed" in shown
    assert "of=me" in shown
    assert batch["id"] in await run("batches", "list")
    [answer] = (json.loads(each) for each in (await run("batches", "results", batch["id"])).splitlines())
    [error] = (json.loads(each) for each in (await run("batches", "results", batch["id"], "--errors")).splitlines())
    assert (answer["custom_id"], error["response"]["status_code"]) == ("a", 404)
    assert "cannot be cancelled" in await run("batches", "cancel", batch["id"], code=1)
    # An uploaded file, and one that is not valid.
    again = json.loads(await run("--json", "batches", "create", batch["input_file_id"], "--follow"))
    assert again["status"] == "completed"
    requests.write_bytes(b"?\n")
    failed = await run("batches", "create", str(requests), "--follow", code=1)
    assert "The batch ended as failed, not as completed." in failed
    assert "not valid JSON" in failed
    [newest, *_] = json.loads(await run("--json", "batches", "list"))
    assert newest["status"] == "failed"
    assert "none of its requests ran" in await run("batches", "results", newest["id"], code=1)
    for wrong in (("create", "no-such-file"), ("create", str(requests), "--metadata", "pair")):
        await run("batches", *wrong, code=2)
    assert await run("batches", "results", "batch_unknown", code=1)


async def test_operators_see_and_cancel_batches_without_their_texts(account: Account, stack: Stack) -> None:
    batch = await account.create(b"?\n", metadata={"secret": "text"})
    key = new_key()
    await create_key(stack.db, None, Role.OPERATOR, "test", hash_key(key), shown_prefix(key))
    path = f"/admin/v1/tenants/{account.tenant.id}/batches"
    async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}) as operator:
        shown = (await operator.get(f"{path}/{batch.id}")).json()
        assert shown == batch.to_dict() | {"metadata": {}}
        assert (await operator.get(path)).json()["data"] == [shown]
        assert (await operator.post(f"{path}/{batch.id}/cancel")).json()["status"] == "cancelling"
    code, out, _ = await lmaas(stack, key, "--tenant", account.tenant.id, "batches", "show", batch.id)
    assert (code, "cancelling" in out, "secret" in out) == (0, True, False)
