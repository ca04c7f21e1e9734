"""The parts of the API that `lmaas apply` uses before it changes anything: dry runs, defaults by null, and the check of an adapter."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.models import get_base_model
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.gateway.stack import Stack, running
from tests.support.adapters import base, config, pack, tensors
from tests.support.base_models import write_model

MODELS, TENANTS, CHECK = "/admin/v1/base-models", "/admin/v1/tenants", "/admin/v1/check-adapter"
DRY = {"dry_run": "true"}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


def without(shown: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in shown.items() if name not in names}


async def actions(stack: Stack) -> list[str]:
    async with stack.db.begin(SYSTEM) as connection:
        return list((await connection.execute(text("SELECT action FROM audit_log ORDER BY created_at"))).scalars())


async def test_a_dry_run_answers_what_would_be_and_stores_nothing(stack: Stack, operator: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    for path, body, change in (
        (TENANTS, {"name": "acme", "max_queued": 5}, {"tier": "free", "max_queued": None}),
        (MODELS, {"name": "tiny", "source": str(folder), "max_loras": 3}, {"cpus": 0.5, "max_loras": None}),
    ):
        dry = await operator.post(path, json=body, params=DRY)
        assert dry.status_code == 200, dry.text
        assert (await operator.get(path)).json()["data"] == []
        made = await operator.post(path, json=body)
        assert without(dry.json(), "id", "created_at") == without(made.json(), "id", "created_at")
        assert (await operator.post(path, json=body, params=DRY)).status_code == 409

        address = f"{path}/{body['name']}"
        before = (await operator.get(address)).json()
        dry = await operator.patch(address, json=change, params=DRY)
        assert dry.status_code == 200, dry.text
        assert (await operator.get(address)).json() == before != dry.json()
        assert (await operator.patch(address, json=change)).json() == dry.json()
        assert (await operator.patch(address, json=change, params={"dry_run": "perhaps"})).json()["error"]["param"] == "dry_run"
        assert (await operator.patch(f"{path}/none", json=change, params=DRY)).status_code == 404
    assert await actions(stack) == ["tenant.create", "tenant.change", "base_model.create", "base_model.change"]


async def test_a_dry_run_refuses_what_the_change_would(stack: Stack, operator: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    await operator.post(MODELS, json={"name": "tiny", "source": str(folder)})
    await stack.adapter(await stack.tenant(), "bot", await get_base_model(stack.db, "tiny"))
    refused = await operator.patch(f"{MODELS}/tiny", json={"max_lora_rank": 64}, params=DRY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "base_model_in_use")
    for path, body, param in (
        (MODELS, {"name": "other", "source": str(tmp_path / "none")}, "source"),
        (MODELS, {"name": "bot", "source": str(folder)}, "name"),
        (TENANTS, {"name": "Acme"}, "name"),
        (TENANTS, {"name": "acme", "max_queued": 0}, "max_queued"),
        (TENANTS, {"name": "acme", "tier": "gold"}, "tier"),
    ):
        refused = await operator.post(path, json=body, params=DRY)
        assert (refused.status_code // 100, refused.json()["error"]["param"]) == (4, param), refused.text


async def test_null_puts_defaults_back(operator: httpx.AsyncClient, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    usual = (await operator.post(MODELS, json={"name": "usual", "source": str(folder)})).json()
    own = {
        "dtype": "float16", "min_replicas": 2, "max_replicas": 3, "idle_timeout_s": 9, "cpus": 0.5, "accelerators": 2, "max_loras": 3,
        "max_cpu_loras": 5, "max_lora_rank": 8, "max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": 2**21,
        "engine_args": "--enforce-eager", "prompt_price": 1, "cached_price": 2, "completion_price": 3, "engine_price": 4,
    }  # fmt: skip
    made = (await operator.post(MODELS, json={"name": "own", "source": str(folder)} | own)).json()
    assert {name: made[name] for name in own} == own
    back = await operator.patch(f"{MODELS}/own", json=dict.fromkeys(own))
    assert back.status_code == 200, back.text
    assert without(back.json(), "id", "name", "created_at") == without(usual, "id", "name", "created_at")
    made = (await operator.post(MODELS, json={"name": "nulls", "source": str(folder)} | dict.fromkeys(own))).json()
    assert without(made, "id", "name", "created_at") == without(usual, "id", "name", "created_at")
    # An engine keeps at least as many adapters in memory as one batch can use.
    many = (await operator.patch(f"{MODELS}/own", json={"max_loras": 100, "max_cpu_loras": None})).json()
    assert (many["max_loras"], many["max_cpu_loras"]) == (100, 100)

    usual = (await operator.post(TENANTS, json={"name": "usual"})).json()
    own = {
        "tier": "free", "max_queued": 5, "max_adapters": 0, "requests_per_minute": 1, "tokens_per_minute": 2, "max_concurrent": 3,
        "tokens_per_month": 4, "budget_per_month": 5,
    }  # fmt: skip
    await operator.post(TENANTS, json={"name": "own"} | own)
    back = await operator.patch(f"{TENANTS}/own", json=dict.fromkeys(own))
    assert without(back.json(), "id", "name", "created_at") == without(usual, "id", "name", "created_at")


async def test_an_adapter_is_checked_as_an_upload_and_not_stored(stack: Stack, operator: httpx.AsyncClient, tmp_path: Path) -> None:
    linears = {name: list(shape) for name, shape in base().linears.items() if "layers" in name}
    folder = write_model(tmp_path / "tiny", linears)
    files = {"adapter_config": config(), "adapter_model": pack(tensors())}
    definition = {"definition": json.dumps({"name": "tiny", "source": str(folder), "dtype": "bfloat16"})}
    before = await operator.post(CHECK, data=definition, files=files)
    assert before.status_code == 200, before.text
    await operator.post(MODELS, json={"name": "tiny", "source": str(folder), "dtype": "bfloat16"})
    checked = await operator.post(CHECK, data={"base_model": "tiny"}, files=files)
    assert checked.json() == before.json()
    tenant = await stack.tenant()
    path = f"{TENANTS}/{tenant.id}/adapters"
    assert (await operator.get(path)).json()["data"] == []
    uploaded = (await operator.post(path, data={"name": "bot", "base_model": "tiny"}, files=files)).json()
    names = ("content_hash", "rank", "target_modules", "size_bytes")
    assert {name: checked.json()[name] for name in names} == {name: uploaded[name] for name in names}

    small = {"definition": json.dumps({"name": "tiny", "source": str(folder), "max_lora_rank": 2})}
    for data, sent, code in (
        (small, files, "rank_not_supported"),
        ({"base_model": "none"}, files, "base_model_not_found"),
        ({"base_model": "tiny"}, files | {"adapter_model": b"PK\3\4" + bytes(100)}, "unsafe_format"),
        ({}, files, "missing_parameter"),
        ({"base_model": "tiny"} | small, files, "missing_parameter"),
        ({"name": "bot", "base_model": "tiny"}, files, "unexpected_field"),
        ({"definition": "{"}, files, "invalid_json"),
        ({"definition": "{}"}, files, "missing_parameter"),
    ):
        refused = await operator.post(CHECK, data=data, files=sent)
        assert (refused.status_code // 100, refused.json()["error"]["code"]) == (4, code), refused.text
    async with stack.client(tenant) as client:
        assert (await client.post(CHECK, data={"base_model": "tiny"}, files=files)).status_code == 403


async def test_the_engine_arguments_of_the_settings_are_a_default_of_their_base_model_only(
    postgres_url: str, valkey_url: str, tmp_path: Path
) -> None:
    folder, key = write_model(tmp_path / "tiny"), new_key()
    async with (
        running(postgres_url, valkey_url, tmp_path / "home", model_name="mine", engine_args="--chat-template x") as stack,
        httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}) as client,
    ):
        await create_key(stack.db, None, Role.OPERATOR, "test", hash_key(key), shown_prefix(key))
        for name, usual in (("mine", "--chat-template x"), ("other", "")):
            body = {"name": name, "source": str(folder), "engine_args": "--enforce-eager"}
            assert (await client.post(MODELS, json=body)).json()["engine_args"] == "--enforce-eager"
            assert (await client.patch(f"{MODELS}/{name}", json={"engine_args": None})).json()["engine_args"] == usual
