"""Uploading and calling adapters: made elsewhere with PEFT, versions, rollback, pins, isolation, bad uploads."""

import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import APIStatusError, NotFoundError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.system.e2e.conftest import MODEL, ROOT, Stack, wait_for

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PROMPT = "The history of the city of Paris begins with"
TOKENS = 24


class Made:
    """An adapter made with PEFT, and the output of PEFT's own forward pass with it."""

    def __init__(self, folder: Path, expected: str, rank: int) -> None:
        self.folder, self.expected, self.rank = folder, expected, rank


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Adapters of rank 4, 8 and 16, with a visible effect: attention only, all linear layers, with patterns, and on the embeddings, which
    the base model also uses as its head."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found = {}
    patterns: dict[str, Any] = {"rank_pattern": {r"layers\.[0-9]\..*_proj": 2}, "alpha_pattern": {"q_proj": 12, "v_proj": 3}}
    for name, rank, targets, more in (
        ("rank4", 4, ATTENTION, {}),
        ("rank8", 8, ALL_LINEAR, {}),
        ("rank16", 16, ATTENTION, {}),
        ("patterns", 8, ATTENTION, patterns),
        ("embeddings", 8, [*ATTENTION, "embed_tokens", "lm_head"], {}),
    ):
        base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **more)
        folder = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            # PEFT warns of embeddings that are also the head, because it writes them beside an adapter for them.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`|Setting `save_embedding_layers`")
            adapted = get_peft_model(base, config)
            with torch.no_grad():
                for parameter_name, parameter in adapted.named_parameters():
                    if "lora_B" in parameter_name:
                        parameter.mul_(0.5)
                    if "lora_embedding_" in parameter_name:
                        parameter.mul_(0.05)
            adapted.save_pretrained(folder)
        (folder / "README.md").unlink()
        inputs = tokenizer(PROMPT, return_tensors="pt")
        output = adapted.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        text = tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name] = Made(folder, text, rank)
    yield found
    for one in found.values():
        shutil.rmtree(one.folder)


def complete(stack: Stack, tenant: str, model: str) -> str:
    """Return the greedy continuation of PROMPT."""
    with stack.openai(tenant) as client:
        done = client.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=TOKENS)
        assert done.model == model
        return str(done.choices[0].text)


def test_adapters_made_with_peft_answer_as_in_peft(stack: Stack, made: dict[str, Made]) -> None:
    stack.warm()
    plain = complete(stack, "acme", MODEL)
    for name, adapter in made.items():
        row = stack.cli("--tenant", "acme", "adapter", "upload", name, str(adapter.folder), "--base-model", MODEL)
        assert (row["version"], row["live_version"], row["rank"]) == (1, 1, adapter.rank)
        assert complete(stack, "acme", name) == adapter.expected != plain
    for name in made:
        stack.cli("--tenant", "acme", "adapter", "delete", name, "--yes")
        with pytest.raises(NotFoundError):
            complete(stack, "acme", name)


def test_versions_rollback_and_pins(stack: Stack, made: dict[str, Made]) -> None:
    stack.warm()
    first, second = made["rank4"], made["rank16"]
    for adapter in (first, second):
        stack.cli("--tenant", "acme", "adapter", "upload", "bot", str(adapter.folder), "--base-model", MODEL)
    assert [row["version"] for row in stack.cli("--tenant", "acme", "adapter", "versions", "bot")] == [1, 2]
    # A new live version serves within a second.
    wait_for(lambda: complete(stack, "acme", "bot") == second.expected, 10, "the new version is live")
    assert complete(stack, "acme", "bot@1") == first.expected
    engines = {process.pid for process in stack.engines()}
    stack.cli("--tenant", "acme", "adapter", "activate", "bot", "1")
    wait_for(lambda: complete(stack, "acme", "bot") == first.expected, 10, "the old version is live again")
    assert complete(stack, "acme", "bot@2") == second.expected
    # The same files again are the existing version.
    row = stack.cli("--tenant", "acme", "adapter", "upload", "bot", str(second.folder), "--base-model", MODEL, "--no-activate")
    assert (row["version"], row["live_version"], row["latest_version"]) == (2, 1, 2)
    assert {process.pid for process in stack.engines()} == engines, "no engine was restarted"
    with stack.openai("acme") as client:
        for name in ("bot@3", "bot@0", "bot@01", "bot@"):
            with pytest.raises(NotFoundError):
                client.completions.create(model=name, prompt="Hi")


def test_a_running_request_finishes_on_the_old_version(stack: Stack, made: dict[str, Made]) -> None:
    stack.warm()
    stack.cli("--tenant", "acme", "adapter", "upload", "long", str(made["rank4"].folder), "--base-model", MODEL)
    with stack.openai("acme") as client:
        settings: dict[str, Any] = {
            "model": "long",
            "prompt": PROMPT,
            "temperature": 0,
            "max_tokens": 150,
            "extra_body": {"ignore_eos": True},
        }
        alone = client.completions.create(**settings).choices[0].text
        stream = client.completions.create(**settings, stream=True)
        text = next(iter(stream)).choices[0].text
        stack.cli("--tenant", "acme", "adapter", "upload", "long", str(made["rank16"].folder), "--base-model", MODEL)
        text += "".join(part.choices[0].text for part in stream)
    assert text == alone
    stack.cli("--tenant", "acme", "adapter", "delete", "long", "--yes")


def test_what_is_not_ones_own_does_not_exist(stack: Stack) -> None:
    content = stack.cli("--tenant", "globex", "adapter", "versions", "pirate-bot")[0]["content_hash"]
    tenant = next(row["id"] for row in stack.cli("tenant", "list") if row["name"] == "globex")
    with stack.http(stack.key("acme")) as client:
        bodies = set()
        for name in ("pirate-bot", "pirate-bot@1", "made-up-bot", f"{tenant}-{content}", "../json-bot", "js\u043en-bot"):
            answer = client.post("/v1/chat/completions", json={"model": name, "messages": [{"role": "user", "content": "Hi"}]})
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            bodies.add(answer.text.replace(json.dumps(name, ensure_ascii=False).strip('"'), "NAME"))
        assert len(bodies) == 1
        assert client.get("/v1/adapters/pirate-bot").text == client.get("/v1/adapters/made-up-bot").text


def test_bad_uploads_leave_nothing_behind(stack: Stack, tmp_path: Path) -> None:
    good = ROOT / "tenants" / "adapters" / "acme-json"
    config = json.loads((good / "adapter_config.json").read_text())
    weights = (good / "adapter_model.safetensors").read_bytes()
    header = int.from_bytes(weights[:8], "little")
    nan = bytearray(weights)
    nan[-2:] = np.array([0x7FC0], dtype="<u2").tobytes()
    cases: list[tuple[str, int, dict[str, Any], bytes, dict[str, str], str]] = [
        ("unsafe_format", 400, config, b"PK\x03\x04" + weights, {}, "adapter_model.safetensors"),
        ("unsafe_format", 400, config, weights, {}, "adapter_model.bin"),
        ("invalid_safetensors", 400, config, weights[: header // 2], {}, "adapter_model.safetensors"),
        ("invalid_safetensors", 400, config, weights[:-100], {}, "adapter_model.safetensors"),
        ("invalid_tensor_name", 400, config, weights.replace(b"layers.7.", b"layers/7."), {}, "adapter_model.safetensors"),
        ("rank_not_supported", 400, config | {"r": 64}, weights, {}, "adapter_model.safetensors"),
        ("rank_not_supported", 400, config | {"r": 4}, weights, {}, "adapter_model.safetensors"),
        ("non_finite_weights", 400, config, bytes(nan), {}, "adapter_model.safetensors"),
        ("no_effect", 400, config, weights[: 8 + header] + bytes(len(weights) - 8 - header), {}, "adapter_model.safetensors"),
        ("no_target_modules", 400, config, weights.replace(b"v_proj", b"x_proj"), {}, "adapter_model.safetensors"),
        ("unsupported_adapter", 400, config | {"use_dora": True}, weights, {}, "adapter_model.safetensors"),
        ("unsupported_adapter", 400, config | {"modules_to_save": ["lm_head"]}, weights, {}, "adapter_model.safetensors"),
        ("digest_mismatch", 400, config, weights, {"sha256": "0" * 64}, "adapter_model.safetensors"),
        ("base_model_not_found", 404, config, weights, {"base_model": "made-up"}, "adapter_model.safetensors"),
        ("invalid_name", 400, config, weights, {"name": "../bad"}, "adapter_model.safetensors"),
        ("name_taken", 409, config, weights, {"name": MODEL}, "adapter_model.safetensors"),
    ]

    def everything() -> tuple[Any, ...]:
        rows = stack.cli("--tenant", "acme", "adapter", "list")
        files = sorted(path for folder in ("objects", "uploads") for path in (stack.home / folder).rglob("*") if path.is_file())
        return rows, files

    before = everything()
    with stack.http(stack.key("acme", "admin_key")) as client:
        for code, status, settings, content, fields, file_name in cases:
            form = {"name": "bad", "base_model": MODEL} | fields
            files: dict[str, Any] = {"adapter_config": ("adapter_config.json", json.dumps(settings)), "adapter_model": (file_name, content)}
            answer = client.post("/v1/adapters", data=form, files=files)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
        extra: dict[str, Any] = {"adapter_config": b"{}", "adapter_model": b"x", "tokenizer": ("tokenizer.json", b"{}")}
        answer = client.post("/v1/adapters", data={"name": "bad", "base_model": MODEL}, files=extra)
        assert answer.json()["error"]["code"] == "unexpected_file"
        assert client.post("/v1/adapters", json={}).status_code == 400
    with stack.http(stack.key("acme")) as client:
        assert client.post("/v1/adapters", data={"name": "bad"}).status_code == 403
    assert everything() == before


def test_two_uploads_at_once_are_two_versions(stack: Stack, made: dict[str, Made]) -> None:
    answers: list[dict[str, Any]] = []

    def upload(folder: Path) -> None:
        answers.append(stack.cli("--tenant", "globex", "adapter", "upload", "race", str(folder), "--base-model", MODEL))

    threads = [threading.Thread(target=upload, args=(made[name].folder,)) for name in ("rank4", "rank8", "rank16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["version"] for answer in answers) == [1, 2, 3]
    stack.cli("--tenant", "globex", "adapter", "delete", "race", "--yes")


def test_a_revoked_key_stops(stack: Stack) -> None:
    created = stack.cli("--tenant", "acme", "key", "create", "--role", "inference")
    with stack.http(created["key"]) as client:
        assert client.get("/v1/models").status_code == 200
        stack.cli("--tenant", "acme", "key", "revoke", created["id"], "--yes")
        wait_for(lambda: client.get("/v1/models").status_code == 401, 10, "the key is refused")
        refused = client.get("/v1/models")
    with stack.http("sk-lmaas-' OR '1'='1") as client:
        assert client.get("/v1/models").json() == refused.json()


def test_errors_are_openai_shaped(stack: Stack) -> None:
    with stack.openai("acme") as client, pytest.raises(APIStatusError) as raised:
        client.completions.create(model=MODEL, prompt="x", extra_body={"allowed_token_ids": [1]})
    assert (raised.value.status_code, raised.value.code, raised.value.param) == (400, "unsupported_parameter", "allowed_token_ids")
    assert raised.value.request_id is not None
    assert raised.value.request_id.startswith("req_")
