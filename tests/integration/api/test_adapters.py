"""Uploads over HTTP: which of them become a version, and which files are stored."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from lmaas.adapters.config import MAX_CONFIG_BYTES
from lmaas.adapters.safetensors import base_model_shapes, read_header
from lmaas.store.adapters import list_versions
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.tenants import Tenant, create_tenant
from tests.integration.gateway.stack import Stack, running
from tests.support.adapters import PREFIX, Tensors, config, encode, pack, tensors
from tests.support.adapters import base as shapes

Upload = Callable[..., Awaitable[httpx.Response]]
EMBEDDINGS = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)


def model_tensors() -> Tensors:
    """The tensors of the base model of tests.support.adapters, whose head is its embeddings."""
    linears = {name: shape for name, shape in shapes().linears.items() if "layers" in name}
    content: Tensors = {f"{name}.weight": ("F32", np.ones(shape, np.float32)) for name, shape in linears.items()}
    return content | {"model.embed_tokens.weight": ("BF16", encode(EMBEDDINGS, "BF16"))}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
async def model(stack: Stack, tmp_path: Path) -> BaseModel:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(pack(model_tensors()))
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    linears = {name: list(shape) for name, shape in base_model_shapes(folder).items()}
    assert linears == {name: list(shape) for name, shape in shapes().linears.items()}
    return await put_base_model(stack.db, BaseModel("", "base", str(folder), "float32", linears, 16, 2, 2, 2, 512, 2**28, ""))


@pytest.fixture
async def owner(stack: Stack) -> Tenant:
    return await create_tenant(stack.db, "acme", "standard", 10, 10)


@pytest.fixture
async def upload(operator: httpx.AsyncClient, model: BaseModel, owner: Tenant) -> Upload:
    async def send(content: Tensors, settings: bytes | None = None, **fields: str) -> httpx.Response:
        form = {"name": "bot", "base_model": model.name} | fields
        files = {"adapter_config": settings or config(), "adapter_model": pack(content)}
        return await operator.post(f"/admin/v1/tenants/{owner.id}/adapters", data=form, files=files)

    return send


def seen(answer: httpx.Response) -> tuple[int, int, int | None, int]:
    """Return status, version, live version and latest version."""
    body: dict[str, Any] = answer.json()
    assert answer.status_code < 300, answer.text
    return answer.status_code, body["version"], body["live_version"], body["latest_version"]


async def test_the_same_content_is_the_version_that_it_was(upload: Upload) -> None:
    first, second = tensors(), tensors(dtype="F16")
    assert seen(await upload(first)) == (201, 1, 1, 1)
    assert seen(await upload(first)) == (200, 1, 1, 1)
    assert seen(await upload(second)) == (201, 2, 2, 2)
    assert seen(await upload(first, activate="false")) == (200, 1, 2, 2)
    assert seen(await upload(first)) == (200, 1, 1, 2)
    # The base model's path and the dropout do not change what an adapter computes; alpha does.
    assert seen(await upload(first, config(base_model_name_or_path="elsewhere", lora_dropout=0.5))) == (200, 1, 1, 2)
    assert seen(await upload(first, config(lora_alpha=9))) == (201, 3, 3, 3)
    assert seen(await upload(first, name="another")) == (201, 1, 1, 1)
    # Clients of older releases send this field.
    for said in ("true", "false"):
        assert seen(await upload(second, if_changed=said)) == (200, 2, 2, 3)
    assert (await upload(second, if_changed="maybe")).status_code == 400


async def test_the_same_content_at_once_is_one_version(upload: Upload, stack: Stack, owner: Tenant) -> None:
    content = tensors()
    answers = await asyncio.gather(*(upload(content) for _ in range(4)))
    assert sorted(seen(answer) for answer in answers) == [(200, 1, 1, 1)] * 3 + [(201, 1, 1, 1)]
    assert len(await list_versions(stack.db, owner.id, "bot")) == 1


async def test_copies_of_the_base_models_embeddings_are_not_stored(upload: Upload, stack: Stack) -> None:
    content = tensors(leaves=["q_proj", "embed_tokens", "lm_head"])
    copies: Tensors = {
        f"{PREFIX}model.embed_tokens.base_layer.weight": ("BF16", encode(EMBEDDINGS, "BF16")),
        # The weights of the head, in a wider dtype.
        f"{PREFIX}lm_head.base_layer.weight": ("F32", (encode(EMBEDDINGS, "BF16").astype(np.uint32) << 16).view(np.float32)),
    }
    for status in (201, 200):
        answer = await upload({**copies, **content})
        assert seen(answer) == (status, 1, 1, 1)
    [stored] = (stack.settings.home / "objects").rglob("adapter_model.safetensors")
    assert set(read_header(stored)) == set(content)
    assert answer.json()["size_bytes"] == stored.stat().st_size
    copies[f"{PREFIX}lm_head.base_layer.weight"][1][-1, -1] += 0.01
    refused = await upload({**content, **copies})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_adapter")
    assert "differs from the base model's" in refused.json()["error"]["message"]
    assert not list((stack.settings.home / "uploads").iterdir())


async def test_copies_cannot_be_compared_without_the_base_models_files(upload: Upload, model: BaseModel) -> None:
    await asyncio.to_thread(shutil.rmtree, model.source)
    copy: Tensors = {f"{PREFIX}model.embed_tokens.weight": ("BF16", encode(EMBEDDINGS, "BF16"))}
    refused = await upload(tensors() | copy)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_adapter")
    assert "save_embedding_layers=False" in refused.json()["error"]["message"]
    assert seen(await upload(tensors())) == (201, 1, 1, 1)


async def test_a_config_may_be_as_large_as_a_pattern_for_each_module_makes_it(upload: Upload) -> None:
    assert seen(await upload(tensors(), config().ljust(MAX_CONFIG_BYTES))) == (201, 1, 1, 1)
    answer = await upload(tensors(), config().ljust(MAX_CONFIG_BYTES + 1))
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "adapter_config")


async def test_adapters_are_found_by_a_part_of_their_name(upload: Upload, operator: httpx.AsyncClient, owner: Tenant) -> None:
    for name in ("acme-bot", "acme_bot", "bot-2", "cat"):
        await upload(tensors(), name=name)
    list_url = f"/admin/v1/tenants/{owner.id}/adapters"

    async def found(**query: Any) -> tuple[list[str], bool]:
        page = (await operator.get(list_url, params=query)).json()
        return [adapter["name"] for adapter in page["data"]], page["has_more"]

    assert await found(search="bot") == (["acme-bot", "acme_bot", "bot-2"], False)
    first = (await operator.get(list_url, params={"search": "bot", "limit": 1})).json()
    assert await found(search="bot", limit=1, after=first["last_id"]) == (["acme_bot"], True)
    # Characters that are special in patterns are not special here.
    assert await found(search="e_b") == (["acme_bot"], False)
    assert [await found(search=text) for text in ("%", "\\", "BOT", "nothing")] == [([], False)] * 4
    assert await found(search="") == (["acme-bot", "acme_bot", "bot-2", "cat"], False)
    assert (await operator.get(list_url, params={"search": "x" * 64})).json()["error"]["param"] == "search"
