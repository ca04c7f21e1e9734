"""The second base model of `lmaas up`: no engine until its first request, then one beside the first model's."""

import math
import re
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError

from lmaas.engine.embedding_model import packaged_folder
from tests.system.e2e.conftest import EMBEDDING_MODEL, MODEL, Stack, wait_for

SENTENCES = ["The cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose by half a percent."]


def cosine(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.dist(one, [0] * len(one)) / math.dist(other, [0] * len(other))


def test_it_embeds_from_zero_beside_the_model_that_generates(stack: Stack) -> None:
    stack.cool()
    shown = stack.cli("model", "show", EMBEDDING_MODEL)
    assert (shown["kind"], shown["max_model_len"], shown["pool"]["wanted"]) == ("embed", 256, 0)
    stack.warm()
    with stack.openai("acme") as client:
        answer = client.embeddings.create(model=EMBEDDING_MODEL, input=SENTENCES)
        vectors = [each.embedding for each in answer.data]
        assert [len(vector) for vector in vectors] == [384] * 3
        assert cosine(vectors[0], vectors[1]) > cosine(vectors[0], vectors[2]) + 0.3
        # Both are warm now.
        assert client.completions.create(model=MODEL, prompt="Hi", max_tokens=1).usage is not None
        with pytest.raises(BadRequestError):
            client.completions.create(model=EMBEDDING_MODEL, prompt="Hi")
    rows = {row["base_model"]: row for row in stack.replicas()}
    assert set(rows) == {MODEL, EMBEDDING_MODEL}
    assert rows[EMBEDDING_MODEL]["start"]["by"] == "zygote"

    found = httpx.get(f"{rows[EMBEDDING_MODEL]['url']}/metrics").text
    counted = {name: float(value) for name, value in re.findall(r"^vllm:(prompt|generation)_tokens_total{.*} (\S+)$", found, re.MULTILINE)}
    assert counted == {"prompt": answer.usage.prompt_tokens + 1, "generation": 0}, "with the token of the probe"


def make_adapter(folder: Path) -> list[list[float]]:
    """Write an adapter with a visible effect, as PEFT saves it; return PEFT's own vectors of SENTENCES."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    base = packaged_folder()
    torch.manual_seed(11)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"], exclude_modules=["pooler.dense"], init_lora_weights=False
    )
    adapted = get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config).eval()
    tokenizer, vectors = AutoTokenizer.from_pretrained(base), []
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.03)
        for sentence in SENTENCES:
            vectors.append(adapted(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].mean(0).tolist())
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    return vectors


def test_a_tenants_adapter_for_it_embeds_as_peft_does(stack: Stack, tmp_path: Path) -> None:
    expected = make_adapter(tmp_path / "adapter")
    stack.cli("--tenant", "acme", "adapter", "upload", "embed-bot", str(tmp_path / "adapter"), "--base-model", EMBEDDING_MODEL)
    with stack.openai("acme") as client:
        for _ in range(2):
            answers = {name: client.embeddings.create(model=name, input=SENTENCES) for name in ("embed-bot", EMBEDDING_MODEL)}
            assert answers["embed-bot"].model == "embed-bot"
            adapted, plain = ([each.embedding for each in answers[name].data] for name in answers)
            assert min(map(cosine, adapted, expected)) > 0.9999
            assert max(map(cosine, plain, expected)) < 0.999
    with stack.openai("globex") as other, pytest.raises(NotFoundError):
        other.embeddings.create(model="embed-bot", input="Hi")
    stack.cli("--tenant", "acme", "adapter", "delete", "embed-bot", "--yes")


def test_it_stops_like_the_others(stack: Stack) -> None:
    with stack.operator() as client:
        assert client.patch(f"/admin/v1/base-models/{EMBEDDING_MODEL}", json={"idle_timeout_s": 1}).status_code == 200
    wait_for(lambda: EMBEDDING_MODEL not in {row["base_model"] for row in stack.replicas()}, 90, "the embedding engine has stopped")
