"""The second base model of `lmaas up`: no engine until it is asked for, then one beside the first model's."""

import math
import re

import httpx
import pytest
from openai import BadRequestError

from tests.system.e2e.conftest import EMBEDDING_MODEL, MODEL, ROOT, Stack, wait_for

FILES = {"adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors"}
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


def test_an_adapter_for_it_is_refused(stack: Stack) -> None:
    """Its engines would load none."""
    folder = ROOT / "tenants" / "adapters" / "acme-json"
    files = {name: (folder / path).read_bytes() for name, path in FILES.items()}
    with stack.http(stack.key("acme", "admin_key")) as client:
        refused = client.post("/v1/adapters", data={"name": "embed-bot", "base_model": EMBEDDING_MODEL}, files=files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "base_model_takes_no_adapters"), refused.text


def test_it_stops_like_the_others(stack: Stack) -> None:
    with stack.operator() as client:
        assert client.patch(f"/admin/v1/base-models/{EMBEDDING_MODEL}", json={"idle_timeout_s": 1}).status_code == 200
    wait_for(lambda: EMBEDDING_MODEL not in {row["base_model"] for row in stack.replicas()}, 90, "the embedding engine has stopped")
