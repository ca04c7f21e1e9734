"""The real server: every token's logits are those of its own adapter, as PEFT computes them, or of the base model."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np
import numpy.typing as npt
import psutil
import pytest

from lmaas.config import Settings
from lmaas.engine.cpu_lora.plugin import ACTIVE_MARK
from lmaas.engine.launch import EngineProcess, EngineSpec, has_cpu_build
from tests.support.effort import tries
from tests.system.engine.cpu_lora.tiny import ADAPTERS, MAX_LEN, MAX_RANK, VOCAB, Reference, build_adapter, build_model, upload
from tests.system.engine.running import running

pytestmark = pytest.mark.skipif(not has_cpu_build(), reason="the plugin does nothing on GPUs")

BASE = "base"
EVERYONE = [BASE, *ADAPTERS]
#: Fewer slots than adapters in memory, and fewer of these than adapters, so that both are reused often.
MAX_LORAS, MAX_CPU_LORAS = 4, 8
MAX_SEQS, MAX_STEP_TOKENS, BLOCK = 16, 64, 32
#: Both sides compute in float32 and differ only in the order of their sums. Of logits between -12 and 12, the largest differences in 40,000
#: positions were 6e-6 for the base model and 3.5e-5 for adapters, whose random weights make activations larger. Another adapter, or none,
#: differs by more than a hundred times this (tested).
TOLERANCE = 3e-4

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """A request for `tokens` more tokens after `prompt`, by an adapter or the base model."""

    name: str
    prompt: tuple[int, ...]
    tokens: int
    prompt_logits: bool


@dataclass(frozen=True)
class Answer:
    """The generated tokens, and their logits [positions, VOCAB], preceded by those of the prompt if requested."""

    request: Request
    generated: list[int]
    logits: Logits
    cached_tokens: int


@dataclass
class Server:
    """The server with all adapters, and a reference for its responses."""

    process: EngineProcess
    http: httpx.AsyncClient
    reference: Reference

    async def ask(self, request: Request) -> Answer:
        """Send one request, at temperature 0."""
        body = {
            "model": request.name, "prompt": request.prompt, "max_tokens": request.tokens, "temperature": 0, "ignore_eos": True,
            "logprobs": VOCAB, "prompt_logprobs": VOCAB if request.prompt_logits else None, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        response = await self.http.post("/v1/completions", json=body)
        assert response.status_code == 200, f"{response.text} {self.process.last_words()}"
        answer = response.json()
        choice = answer["choices"][0]
        rows = [{key: entry["logprob"] for key, entry in row.items()} for row in (choice["prompt_logprobs"] or [])[1:]]
        rows += [{key.removeprefix("token_id:"): value for key, value in row.items()} for row in choice["logprobs"]["top_logprobs"]]
        logits = np.full((len(rows), VOCAB), np.nan, dtype=np.float32)
        for i, row in enumerate(rows):
            logits[i, [int(key) for key in row]] = list(row.values())
        generated = [int(key.removeprefix("token_id:")) for key in choice["logprobs"]["tokens"]]
        return Answer(request, generated, logits, answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    async def ask_all(self, requests: Iterable[Request]) -> list[Answer]:
        """Send all requests at once."""
        return await asyncio.gather(*(self.ask(request) for request in requests))

    async def steps(self) -> int:
        """Return the number of batches that the engine has computed."""
        text = (await self.http.get("/metrics")).text
        return sum(round(float(count)) for count in re.findall(r"^vllm:iteration_tokens_total_count{.*} (\S+)$", text, re.MULTILINE))

    def expected(self, name: str, tokens: Sequence[int]) -> Logits:
        """Return PEFT's logits after each token."""
        logits: Logits = self.reference.logits(None if name == BASE else name, tokens).numpy()
        return logits

    def check(self, answers: Iterable[Answer]) -> None:
        """Check that every position of every response is that of its own adapter."""
        wrong = []
        for answer in answers:
            request = answer.request
            assert len(answer.generated) == request.tokens
            assert len(answer.logits) == request.tokens + (len(request.prompt) - 1) * request.prompt_logits
            assert answer.generated == answer.logits[-request.tokens :].argmax(axis=1).tolist()
            expected = self.expected(request.name, [*request.prompt, *answer.generated[:-1]])[-len(answer.logits) :]
            errors = np.abs(answer.logits - expected).max(axis=1)
            far = np.flatnonzero(~(errors <= TOLERANCE))  # so that NaN is far too
            if len(far):
                size = f"{len(request.prompt)} + {request.tokens} tokens"
                wrong.append(f"{request.name}, {size}: off by {errors.max():.2g} at {len(far)} of {len(errors)} positions")
        assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("parity")
    base, adapters = folder / BASE, {name: folder / name for name in ADAPTERS}
    build_model(base)
    for name, path in adapters.items():
        build_adapter(base, path, name)
        upload(base, path, folder / f"stored-{name}", name)
    spec = EngineSpec(
        module=Settings().engine_module,
        source=str(base),
        name=BASE,
        dtype="float32",
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_SEQS,
        max_loras=MAX_LORAS,
        max_lora_rank=MAX_RANK,
        max_cpu_loras=MAX_CPU_LORAS,
        kv_cache_bytes=64 * 1024 * 1024,
        # Few tokens in each step: long prompts are computed in pieces, beside the next tokens of other requests.
        extra_args=f"--max-num-batched-tokens {MAX_STEP_TOKENS} --block-size {BLOCK} --skip-tokenizer-init "
        f"--logprobs-mode raw_logits --max-logprobs {VOCAB}",
    )
    async with running(spec, folder / "engine.log") as (process, http, client):
        for name in adapters:
            await client.load_adapter(process.url, name, str(folder / f"stored-{name}"))
        yield Server(process, http, Reference(base, adapters))


def some_requests(names: Sequence[str], number: int) -> list[Request]:
    """Return 60 requests in a random order: 12 to the base model, the others to each of `names` in turn, starting with one `number` after
    the other."""
    rng = random.Random(number)
    who = [BASE] * 12 + [names[(48 * number + i) % len(names)] for i in range(48)]
    rng.shuffle(who)
    return [Request(name, random_prompt(rng, max(1, rng.randint(-9, 100))), rng.randint(4, 12), rng.random() < 0.7) for name in who]


def random_prompt(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(VOCAB), k=length))


async def test_the_plugin_is_active_where_the_model_is_computed(server: Server) -> None:
    log = server.process.log_path.read_text()
    marks = re.findall(rf"^\((\w+) pid=(\d+)\).*{re.escape(ACTIVE_MARK)}", log, re.MULTILINE)
    assert marks
    family = {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}
    for kind, pid in marks:
        assert kind != "APIServer"
        assert int(pid) in family


def test_no_adapter_could_be_taken_for_another(server: Server) -> None:
    prompt = random_prompt(random.Random(0), MAX_LEN)
    logits = np.stack([server.expected(name, prompt) for name in EVERYONE])
    for i, name in enumerate(EVERYONE):
        # Not after the first token: it attends only to itself, whatever its query and its key are.
        distances = np.abs(logits[:, 1:] - logits[i, 1:]).max(axis=2).min(axis=1)
        near = [other for other, distance in zip(EVERYONE, distances, strict=True) if distance < 100 * TOLERANCE]
        assert near == [name]


async def test_each_alone_and_all_together_generate_the_same(server: Server) -> None:
    rng = random.Random(3)
    shared = random_prompt(rng, 2 * BLOCK + 5)
    requests = [Request(name, prompt, 10, False) for name in EVERYONE for prompt in (shared, random_prompt(rng, rng.randint(1, 100)))]
    alone = [await server.ask(request) for request in requests]
    server.check(alone)
    # Where two tokens are nearly as likely, rounding may choose; then this test needs another seed.
    assert min(np.diff(np.sort(answer.logits)[:, -2:]).min() for answer in alone) > 2 * TOLERANCE
    order = rng.sample(range(len(requests)), len(requests))
    together = await server.ask_all(requests[i] for i in order)
    server.check(together)
    assert [answer.generated for answer in together] == [alone[i].generated for i in order]
    # The cache keeps the same prompt separately for each adapter.
    assert all(answer.cached_tokens == 0 for answer in alone)
    assert all(answer.cached_tokens == 2 * BLOCK for answer in together if answer.request.prompt == shared)


@pytest.mark.search
@pytest.mark.parametrize(
    "names",
    [["rank-8"], ["rank-64", "rank-1"], ["rank-33", "only-v_proj", "everything", "patterns"], [*ADAPTERS]],
    ids=["one adapter", "two adapters", "as many adapters as slots", "all adapters"],
)
async def test_mixed_batches(server: Server, names: list[str]) -> None:
    for number in range(tries(2)):
        before = await server.steps()
        answers = await server.ask_all(some_requests(names, number))
        server.check(answers)
        # They really shared batches: several requests got a token in the same step.
        assert sum(len(answer.generated) for answer in answers) > 2 * (await server.steps() - before)
