"""A full disk at each place that stores a file of an adapter, and a cut upload: a clear error, and no partial file can ever be loaded."""

import asyncio
import json
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.adapters import list_adapters
from lmaas.store.models import BaseModel, put_base_model
from lmaas.store.tenants import create_key
from lmaas.types import BaseModelShapes, Role
from tests.integration.gateway.stack import CHAT, Stack, Tenant, running
from tests.support.adapters import pack, tensors
from tests.support.conditions import until

#: An adapter of this base model has 1.5 MB: more than an upload keeps in memory.
LINEARS = {f"model.layers.{layer}.self_attn.q_proj": (1024, 1024) for layer in range(12)}
RANK = 16
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
async def model(stack: Stack) -> BaseModel:
    linears = {name: list(shape) for name, shape in LINEARS.items()}
    return await put_base_model(stack.db, BaseModel("", "base", "no-model", "float32", linears, RANK, 8, 8, 16, 2048, 2**28, ""))


@pytest.fixture
async def tenant(stack: Stack) -> Tenant:
    return await stack.tenant()


@pytest.fixture(scope="module")
def weights() -> bytes:
    return pack(tensors(BaseModelShapes(LINEARS, "float32", RANK), RANK, ("q_proj",)))


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Callable[[], None]]:
    """Mount a small disk at `folder`; provide a function that enlarges it."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.decode().strip()}")

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def _admin(stack: Stack, tenant: Tenant) -> dict[str, str]:
    key = new_key()
    await create_key(stack.db, tenant.id, Role.TENANT_ADMIN, "admin", hash_key(key), shown_prefix(key))
    return {"authorization": f"Bearer {key}"}


def _form(weights: bytes) -> dict[str, Any]:
    return {"adapter_config": ("adapter_config.json", json.dumps(CONFIG)), "adapter_model": ("adapter_model.safetensors", weights)}


async def upload(stack: Stack, tenant: Tenant, weights: bytes) -> httpx.Response:
    async with httpx.AsyncClient(base_url=stack.url, headers=await _admin(stack, tenant), timeout=60) as http:
        return await http.post("/v1/adapters", data={"name": "bot", "base_model": "base"}, files=_form(weights))


async def ask(stack: Stack, tenant: Tenant, model: str) -> httpx.Response:
    async with stack.client(tenant) as http:
        return await http.post(CHAT, json={"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3})


def _whole(stack: Stack) -> list[Path]:
    """Return the configs of the adapters that the store has in full: a config is stored after its model."""
    return list((stack.settings.home / "objects").rglob("adapter_config.json"))


@pytest.mark.parametrize(("full", "code"), [("uploads", "disk_full"), ("objects", "object_store_unavailable"), ("spool", "disk_full")])
async def test_an_upload_onto_a_full_disk(
    stack: Stack, model: BaseModel, tenant: Tenant, weights: bytes, full: str, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stack.settings.home / full
    with small_disk(folder, 512 * 1024) as enlarge:
        if full == "spool":
            # The parser of the form keeps files here that exceed memory.
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
        for _ in range(2):
            response = await upload(stack, tenant, weights)
            assert (response.status_code, response.json()["error"]["code"]) == (503, code), response.text
            assert (response.headers["x-should-retry"], int(response.headers["retry-after"]) > 0) == ("true", True)
            assert str(stack.settings.home) not in response.text
            assert _whole(stack) == []
            assert await list_adapters(stack.db, tenant.id) == []
            assert list(stack.settings.home.glob("uploads/*")) == []
        enlarge()
        response = await upload(stack, tenant, weights)
        assert (response.status_code, response.json()["version"]) == (201, 1), response.text
        (stored,) = _whole(stack)
        assert stored.with_name("adapter_model.safetensors").read_bytes() == weights
        await stack.replica(model)
        assert (await ask(stack, tenant, "bot")).status_code == 200


@pytest.mark.parametrize(("full", "code"), [("uploads", "disk_full"), ("objects", "object_store_unavailable")])
async def test_a_file_onto_a_full_disk(stack: Stack, tenant: Tenant, full: str, code: str) -> None:
    async def send() -> httpx.Response:
        async with stack.client(tenant) as http:
            return await http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a", b"x" * 2_000_000)})

    with small_disk(stack.settings.home / full, 1024 * 1024) as enlarge:
        for _ in range(2):
            response = await send()
            assert (response.status_code, response.json()["error"]["code"]) == (503, code), response.text
            assert str(stack.settings.home) not in response.text
            assert await stack.services.objects.list("files") == []
            async with stack.client(tenant) as http:
                assert (await http.get("/v1/files")).json()["data"] == []
        enlarge()
        assert (await send()).status_code == 200


async def test_a_store_with_room_for_the_model_but_not_for_its_config(
    stack: Stack, model: BaseModel, tenant: Tenant, weights: bytes
) -> None:
    page = 4096
    with small_disk(stack.settings.home / "objects", -(-len(weights) // page) * page) as enlarge:
        response = await upload(stack, tenant, weights)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "object_store_unavailable"), response.text
        assert [path.stat().st_size for path in _whole(stack)] in ([], [0])
        assert await list_adapters(stack.db, tenant.id) == []
        enlarge()
        assert (await upload(stack, tenant, weights)).status_code == 201
        (stored,) = _whole(stack)
        assert json.loads(stored.read_bytes())["r"] == RANK


async def test_an_upload_that_is_cut_leaves_nothing(stack: Stack, model: BaseModel, tenant: Tenant, weights: bytes) -> None:
    request = httpx.Request("POST", f"{stack.url}/v1/adapters", data={"name": "bot", "base_model": model.name}, files=_form(weights))
    body = request.read()
    address = urlparse(stack.url)
    head = "".join(f"{name}: {value}\r\n" for name, value in (dict(request.headers) | await _admin(stack, tenant)).items())
    for part in (1, 2, 3):
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"POST /v1/adapters HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) * part // 4])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert await reader.read() == b""
    assert (await upload(stack, tenant, weights)).json()["version"] == 1
    await until(lambda: not list(stack.settings.home.glob("uploads/*")))
    assert len(_whole(stack)) == 1


async def test_a_replica_whose_disk_is_full(stack: Stack, model: BaseModel, tenant: Tenant, weights: bytes) -> None:
    assert (await upload(stack, tenant, weights)).status_code == 201
    replica = await stack.replica(model)
    folder = stack.settings.home / "replicas" / replica.id / "adapters"
    with small_disk(folder, 512 * 1024) as enlarge:
        failed, other = await asyncio.gather(ask(stack, tenant, "bot"), ask(stack, tenant, "base"))
        assert other.status_code == 200, "requests of other models succeed"
        assert (failed.status_code, failed.json()["error"]["code"]) == (503, "adapter_load_failed")
        assert str(stack.settings.home) not in failed.text
        assert list(folder.iterdir()) == []
        enlarge()
        assert (await ask(stack, tenant, "bot")).status_code == 200
