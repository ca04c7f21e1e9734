"""Base models over HTTP, in manifests and in the CLI: registered, changed, shown with the state of their pools, deleted."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from lmaas.engine import source
from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.states import Observed, PoolKind
from lmaas.store.adapters import delete_adapter
from lmaas.store.models import get_base_model
from lmaas.store.pools import save_pool_state
from lmaas.store.replicas import add_replica, observe
from lmaas.store.scopes import SYSTEM
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.gateway.stack import Stack, running
from tests.support.base_models import LINEARS, write_model

MODELS = "/admin/v1/base-models"


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path) as stack:
        yield stack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


async def test_a_base_model_lives_from_its_registration_to_its_end(stack: Stack, operator: httpx.AsyncClient, folder: Path) -> None:
    asked = {
        "name": "tiny", "source": str(folder), "dtype": "bfloat16", "min_replicas": 0, "max_replicas": 3, "cpus": 0.5, "accelerators": 1,
        "max_loras": 4, "max_lora_rank": 32, "max_cpu_loras": 9, "max_num_seqs": 5, "kv_cache_bytes": 2**21, "idle_timeout_s": 7.5,
        "prompt_price": 11, "engine_price": 7200, "engine_args": "--enforce-eager",
    }  # fmt: skip
    answer = await operator.post(MODELS, json=asked)
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert {name: made[name] for name in asked} == asked
    assert made["max_model_len"] == 512, "not longer than the model's own limit"
    assert made["id"].startswith("mod_")
    stored = await get_base_model(stack.db, "tiny")
    assert stored.linears == LINEARS
    assert (await operator.get(f"{MODELS}/tiny")).json() == made
    assert (await operator.get(MODELS)).json()["data"] == [made]
    acme = await stack.tenant()
    async with stack.client(acme) as tenant:
        assert [model["id"] for model in (await tenant.get("/v1/models")).json()["data"]] == ["tiny"]

    changed = (await operator.patch(f"{MODELS}/tiny", json={"cpus": None, "max_num_seqs": 6, "source": str(folder)})).json()
    assert (changed["cpus"], changed["max_num_seqs"]) == (1.0, 6)
    assert (await operator.delete(f"{MODELS}/tiny")).json() == {"object": "base_model.deleted", "id": made["id"], "deleted": True}
    for call in (operator.get, operator.delete):
        assert (await call(f"{MODELS}/tiny")).json()["error"]["code"] == "base_model_not_found"
    # The name can be used again for another model.
    again = await operator.post(MODELS, json=asked)
    assert again.status_code == 201
    assert again.json()["id"] != made["id"]


async def test_what_adapters_were_validated_against_does_not_change(
    stack: Stack, operator: httpx.AsyncClient, folder: Path, tmp_path: Path
) -> None:
    assert (await operator.post(MODELS, json={"name": "tiny", "source": str(folder)})).status_code == 201
    other = write_model(tmp_path / "other", {"model.layers.0.self_attn.q_proj": [8, 8]})
    model = await get_base_model(stack.db, "tiny")
    acme = await stack.tenant()
    await stack.adapter(acme, "bot", model)
    for change in ({"source": str(other)}, {"dtype": "float16"}, {"max_lora_rank": 64}):
        answer = await operator.patch(f"{MODELS}/tiny", json=change)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "base_model_in_use")
        assert "1 adapters" in answer.json()["error"]["message"]
    assert (await operator.delete(f"{MODELS}/tiny")).status_code == 409
    assert await get_base_model(stack.db, "tiny") == model
    # The same values are not a change, and other settings do not affect adapters.
    assert (await operator.patch(f"{MODELS}/tiny", json={"source": str(folder), "dtype": model.dtype, "max_loras": 3})).status_code == 200
    await delete_adapter(stack.db, acme.id, "bot")
    await add_replica(stack.db, "rep_1", model.id)
    assert "1 replicas" in (await operator.patch(f"{MODELS}/tiny", json={"source": str(other)})).json()["error"]["message"]
    assert (await operator.delete(f"{MODELS}/tiny")).status_code == 409
    await observe(stack.db, "rep_1", Observed.STOPPED)
    answer = await operator.patch(f"{MODELS}/tiny", json={"source": str(other), "max_lora_rank": 64})
    assert answer.status_code == 200
    stored = await get_base_model(stack.db, "tiny")
    assert (stored.source, stored.linears, stored.max_lora_rank) == (str(other), {"model.layers.0.self_attn.q_proj": [8, 8]}, 64)
    assert (await operator.delete(f"{MODELS}/tiny")).status_code == 200


async def test_a_base_model_has_a_kind_for_ever(stack: Stack, operator: httpx.AsyncClient, tmp_path: Path) -> None:
    bert = write_model(tmp_path / "bert", architectures=["BertModel"])
    (bert / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    llama = write_model(tmp_path / "llama", architectures=["LlamaForCausalLM"])
    unknown = write_model(tmp_path / "unknown", architectures=["SomethingNew"])
    for name, folder, asked, kind, longest, slots in (
        ("bert", bert, {}, "embed", 256, 64),
        ("llama", llama, {"kind": None}, "generate", 512, 16),
        ("new", unknown, {}, "generate", 512, 16),
        ("new-embeds", unknown, {"kind": "embed", "max_num_seqs": 3}, "embed", 512, 3),
    ):
        answer = await operator.post(MODELS, json={"name": name, "source": str(folder)} | asked)
        assert (answer.status_code, answer.json()["kind"], answer.json()["max_model_len"]) == (201, kind, longest), answer.text
        model = await get_base_model(stack.db, name)
        assert (model.kind, model.max_num_seqs) == (PoolKind(kind), slots)
    for name, change, param in (
        ("bert", {"kind": "generate"}, "kind"),
        ("llama", {"kind": "embed"}, "kind"),
        ("bert", {"source": str(llama)}, "source"),
        ("llama", {"source": str(bert)}, "source"),
    ):
        answer = await operator.patch(f"{MODELS}/{name}", json=change)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "kind_is_fixed", param), answer.text
    # Sending the same value is not a change, and model files without a kind contradict no kind.
    unchanged: list[tuple[str, dict[str, Any]]] = [
        ("bert", {"kind": "embed"}),
        ("new-embeds", {"kind": None, "cpus": 2, "max_num_seqs": None}),
        ("new-embeds", {"source": str(bert), "max_model_len": None}),
        ("bert", {"source": str(unknown), "max_model_len": None}),
    ]
    for name, change in unchanged:
        answer = await operator.patch(f"{MODELS}/{name}", json=change)
        assert (answer.status_code, answer.json()["kind"]) == (200, "embed"), answer.text
    assert (await get_base_model(stack.db, "new-embeds")).max_num_seqs == 64
    answer = await operator.patch(f"{MODELS}/bert", json={"completion_price": 1})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "completion_price")


async def test_a_change_of_the_context_is_checked_as_well(operator: httpx.AsyncClient, folder: Path) -> None:
    assert (await operator.post(MODELS, json={"name": "tiny", "source": str(folder), "max_model_len": 100})).status_code == 201
    answer = await operator.patch(f"{MODELS}/tiny", json={"max_model_len": 513})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_model_len"), answer.text
    for length in (512, 64):
        assert (await operator.patch(f"{MODELS}/tiny", json={"max_model_len": length})).json()["max_model_len"] == length
    # A shorter length is accepted without reading the model's files.
    (folder / "config.json").unlink()
    assert (await operator.patch(f"{MODELS}/tiny", json={"max_model_len": 32})).status_code == 200
    assert (await operator.patch(f"{MODELS}/tiny", json={"max_model_len": 33})).status_code == 400


async def test_a_folder_is_named_as_one(operator: httpx.AsyncClient, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meaning of a hub id does not depend on the directory in which a gateway was started."""
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    answer = await operator.post(MODELS, json={"name": "a", "source": "tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_base_model")
    monkeypatch.setenv("HOME", str(folder.parent))
    for name, given in (("b", "./tiny"), ("c", "~/tiny"), ("d", str(folder))):
        answer = await operator.post(MODELS, json={"name": name, "source": given})
        assert (answer.status_code, answer.json()["source"]) == (201, str(folder)), answer.text
    answer = await operator.post(MODELS, json={"name": "e", "source": "~nobody-of-this-name/tiny"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_base_model")


async def test_the_settings_say_what_auto_is(
    postgres_url: str, valkey_url: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "has_engine", lambda: False)
    for said, kept in (("auto", "auto"), ("bfloat16", "bfloat16")):
        async with running(postgres_url, valkey_url, tmp_path / said, engine_dtype=said) as stack:
            key = new_key()
            await create_key(stack.db, None, Role.OPERATOR, "test", hash_key(key), shown_prefix(key))
            async with httpx.AsyncClient(base_url=stack.url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
                for name, more in ((f"a-{said}", {}), (f"b-{said}", {"dtype": "auto"})):
                    answer = await client.post(MODELS, json={"name": name, "source": str(folder)} | more)
                    assert (answer.status_code, answer.json()["dtype"]) == (201, kept), answer.text


async def test_names_are_taken_once(stack: Stack, operator: httpx.AsyncClient, folder: Path) -> None:
    body = {"name": "tiny", "source": str(folder)}
    answers = await asyncio.gather(*(operator.post(MODELS, json=body) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    await stack.adapter(await stack.tenant(), "bot", await get_base_model(stack.db, "tiny"))
    taken = await operator.post(MODELS, json=body | {"name": "bot"})
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")


async def test_it_is_shown_what_a_pool_does_and_why(stack: Stack, operator: httpx.AsyncClient, folder: Path) -> None:
    await operator.post(MODELS, json={"name": "tiny", "source": str(folder), "engine_price": 3_600_000})
    model = await get_base_model(stack.db, "tiny")
    pool = (await operator.get(f"{MODELS}/tiny")).json()["pool"]
    assert (pool["desired"], pool["reason"], pool["failed_starts"]) == (0, None, None)
    idle = {"keep_s": 300.0, "ready_s": None, "until_s": None, "idle_engine_s": 42.0, "cold_share": 0.25, "gaps": 20.0}
    decision = {"wanted": 1, "replicas": 0, "reason": "because", "blocked": True, "idle": idle, "start_s": 2.0, "backoff_s": 10.0}
    await save_pool_state(stack.db, model.id, decision, [])
    for number in range(2):
        await add_replica(stack.db, f"rep_{number}", model.id)
        await observe(stack.db, f"rep_{number}", Observed.FAILED, reason=f"the engine ended with code {number}: /secret/path")
    pool = (await operator.get(f"{MODELS}/tiny")).json()["pool"]
    assert (pool["wanted"], pool["reason"], pool["waits_for_machine"]) == (1, "because", True)
    assert pool["keep_warm"]["cost_per_hour_microusd"] == 3_600_000
    assert pool["keep_warm"]["cost_per_idle_time_microusd"] == 42_000
    assert pool["failed_starts"]["count"] == 2
    assert pool["failed_starts"]["reason"] == "the engine ended with code 1: /secret/path"
    assert 0 < pool["failed_starts"]["next_try_s"] <= 10
    # A start that succeeds resets the count of failed starts.
    await add_replica(stack.db, "rep_good", model.id)
    await observe(stack.db, "rep_good", Observed.READY, url="http://e")
    pool = (await operator.get(f"{MODELS}/tiny")).json()["pool"]
    assert (pool["desired"], pool["ready"], pool["failed_starts"]) == (1, 1, None)


async def lmaas(stack: Stack, key: str, *arguments: str, stdin: int = asyncio.subprocess.DEVNULL) -> tuple[int, str, str]:
    """Run the CLI against the stack. It has no terminal unless `stdin` is one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lmaas", *arguments),
        env=environment | {"LMAAS_URL": stack.url + "/v1", "LMAAS_API_KEY": key, "COLUMNS": "250"},
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def test_manifests_and_commands(stack: Stack, operator_key: str, folder: Path, tmp_path: Path) -> None:
    manifests = tmp_path / "manifests"
    (manifests / "models").mkdir(parents=True)
    (manifests / "models" / "tiny.yaml").write_text(
        "name: tiny\nsource: ../../tiny\nreplicas: {min: 0, max: 2}\nengine: {max_loras: 3, max_num_seqs: 4}\n"
        "needs: {cpus: 0.5}\nidle_timeout_s: 60\nprices: {engine: 3600000, prompt: 5}\n"
    )
    (manifests / "acme.yaml").write_text("name: acme\n")
    for outcome in ("created", "unchanged"):
        code, out, err = await lmaas(stack, operator_key, "--json", "apply", str(manifests))
        assert code == 0, err
        assert [(row["thing"], row["name"], row["outcome"]) for row in json.loads(out)] == [
            ("base model", "tiny", outcome),
            ("tenant", "acme", outcome),
        ]
    model = await get_base_model(stack.db, "tiny")
    assert (model.max_loras, model.max_num_seqs, model.cpus, model.max_replicas, model.engine_price) == (3, 4, 0.5, 2, 3_600_000)
    path = manifests / "models" / "tiny.yaml"
    path.write_text(path.read_text().replace("max: 2", "max: 3"))
    code, out, err = await lmaas(stack, operator_key, "--json", "apply", str(manifests))
    assert [row["outcome"] for row in json.loads(out)] == ["changed", "unchanged"], err

    other = write_model(tmp_path / "second")
    code, out, err = await lmaas(stack, operator_key, "model", "add", "second", str(other), "--max-loras", "2", "--cpus", "2")
    assert code == 0, err
    assert "second" in out
    code, out, err = await lmaas(stack, operator_key, "model", "add", "third", str(other), "--kind", "embed")
    assert code == 0, err
    assert "embed" in out
    await add_replica(stack.db, "rep_1", model.id)
    await observe(stack.db, "rep_1", Observed.FAILED, reason="the engine ended with code 1: no memory")
    idle = {"keep_s": 60.0, "ready_s": None, "until_s": None, "idle_engine_s": 42.0, "cold_share": 0.25, "gaps": 20.0}
    background = {"lines": 1200, "tokens": 50_000, "due_s": 7200, "running": 3, "reserve": 1, "put_back": 17, "tokens_per_s": 350.0}
    decision = {"wanted": 1, "reason": "because", "blocked": False, "idle": idle, "background": background}
    await save_pool_state(stack.db, model.id, decision, [])
    code, out, err = await lmaas(stack, operator_key, "model", "show", "tiny")
    assert code == 0, err
    assert "the engine ended with code 1: no memory" in out
    assert "no replica; wanted 1: because" in out
    assert "warm until 60 s after the last request, at 3.600000 $ an hour; by its last 20 idle times" in out
    assert "3 slots are in use, 1 are kept free for requests; 1,200 lines wait (50,000 tokens), the first until 2.0 h from now" in out
    assert "a replica processes 350 tokens a second; a slot was taken back 17 times" in out
    code, out, err = await lmaas(stack, operator_key, "model", "list")
    assert {"tiny", "second"} <= set(out.split())
    code, out, err = await lmaas(stack, operator_key, "replica", "list")
    assert "the engine ended with code 1: no memory" in out
    code, out, err = await lmaas(stack, operator_key, "model", "change", "second", "--accelerators", "1")
    assert code == 0, err
    assert (await get_base_model(stack.db, "second")).accelerators == 1
    code, out, err = await lmaas(stack, operator_key, "model", "delete", "second", "--yes")
    assert code == 0, err
    async with stack.db.begin(SYSTEM) as connection:
        actions = list((await connection.execute(text("SELECT action FROM audit_log ORDER BY created_at"))).scalars())
    assert "base_model.create" in actions
    assert "base_model.delete" in actions
