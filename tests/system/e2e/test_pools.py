"""Two base models in one service: each with its own adapters on a machine that holds both, and in turns on one that holds one."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.e2e.conftest import MODEL, Stack, started, wait_for

PROMPT = "The history of the city of Paris begins with"
TOKENS = 16
TINY = "tiny-random"


def make_tiny(model_folder: Path, folder: Path) -> None:
    """A randomly initialised Llama of a few layers with the default model's tokenizer."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    known = AutoConfig.from_pretrained(model_folder)
    config = LlamaConfig(
        vocab_size=known.vocab_size, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2,
        intermediate_size=128, max_position_embeddings=512, tie_word_embeddings=True, dtype="float32",
        bos_token_id=known.bos_token_id, eos_token_id=known.eos_token_id, pad_token_id=known.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    for file in model_folder.iterdir():
        if file.name.startswith(("token", "special", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)


def make_adapter(base: Path, folder: Path) -> str:
    """Write an adapter for the model with a visible effect, as PEFT saves it; return PEFT's output with it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(6)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    return generate(adapted, AutoTokenizer.from_pretrained(base))


def generate(model: Any, tokenizer: Any) -> str:
    """Return the greedy continuation of PROMPT."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))


async def test_two_pools_on_one_machine_each_with_its_own_adapters(stack: Stack, model_folder: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny, adapter = tmp_path / TINY, tmp_path / "adapter"
    make_tiny(model_folder, tiny)
    expected = make_adapter(tiny, adapter)
    plain = generate(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), AutoTokenizer.from_pretrained(tiny))
    assert plain != expected
    options = ("--cpus", "0.5", "--max-loras", "2", "--max-cpu-loras", "4", "--kv-cache-bytes", str(2**27), "--idle-timeout-s", "600")
    added = stack.cli("model", "add", TINY, str(tiny), *options)
    assert (added["dtype"], added["max_model_len"]) == ("float32", 512)
    stack.cli("--tenant", "acme", "adapter", "upload", "tiny-bot", str(adapter), "--base-model", TINY)
    await asyncio.to_thread(stack.warm)

    async with stack.async_openai("acme") as client:

        async def ask(model: str, prompt: str = PROMPT) -> str:
            done = await client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=TOKENS)
            assert done.model == model
            return str(done.choices[0].text)

        alone = {model: await ask(model) for model in (MODEL, "json-bot", TINY, "tiny-bot")}
        assert (alone[TINY], alone["tiny-bot"]) == (plain, expected)
        assert alone[MODEL] != alone["json-bot"]
        models = [*alone] * 4
        assert await asyncio.gather(*map(ask, models)) == [alone[model] for model in models]

    rows = {row["base_model"]: row for row in stack.replicas()}
    assert set(rows) == {MODEL, TINY}
    shown = stack.cli("model", "show", TINY)
    assert (shown["pool"]["ready"], shown["cpus"]) == (1, 0.5)
    # No process of the pool is left after it has gone; the other pool is not affected.
    stack.cli("--tenant", "acme", "adapter", "delete", "tiny-bot", "--yes")
    stack.cli("replica", "stop", rows[TINY]["id"])
    wait_for(lambda: {row["base_model"] for row in stack.replicas()} == {MODEL}, 60, "the tiny one's engine has stopped")
    stack.cli("model", "delete", TINY, "--yes")
    with stack.openai("acme") as sync:
        assert not {TINY, "tiny-bot"} & {model.id for model in sync.models.list()}
    assert next(row["id"] for row in stack.replicas()) == rows[MODEL]["id"]


@pytest.fixture
def narrow(tmp_path: Path, model_folder: Path) -> Iterator[Stack]:
    """A stack with fake engines on a machine that holds one of them, with two base models."""
    settings = {"LMAAS_ENGINE_MODULE": "lmaas.testing.fake_engine", "LMAAS_LOCAL_CPUS": "1", "LMAAS_SHARE_QUANTUM_S": "4"}
    with started(tmp_path / "home", tmp_path / "up.log", **settings, LMAAS_DRAIN_TIMEOUT_S="10") as stack:
        stack.cli("model", "add", "second", str(model_folder))
        yield stack


@contextmanager
def watched(stack: Stack) -> Iterator[list[int]]:
    """Record again and again how many engines run at once."""
    seen: list[int] = []
    end = threading.Event()

    def look() -> None:
        while not end.wait(0.1):
            seen.append(len(stack.processes("lmaas supervise")))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        end.set()
        thread.join()


async def test_two_pools_take_turns_on_a_machine_that_holds_one_engine(narrow: Stack) -> None:
    with watched(narrow) as at_once:
        async with narrow.async_openai("acme") as client:

            async def ask(model: str, tokens: int = 5) -> str:
                done = await client.completions.create(model=model, prompt="One two", max_tokens=tokens, extra_body={"ignore_eos": True})
                return str(done.model)

            # Each pool is idle when a request for the other arrives, so it gives way.
            for model in (MODEL, "second", MODEL):
                assert await ask(model) == model
            assert {row["base_model"] for row in narrow.replicas()} == {MODEL}
            # Both are busy, so they are served one after the other.
            flood = [asyncio.create_task(ask(MODEL, 300)) for _ in range(60)]
            assert await ask("second") == "second"
            assert await asyncio.gather(*flood) == [MODEL] * 60
    assert max(at_once) == 1
    ended = narrow.cli("replica", "list", "--ended")
    assert {row["observed"] for row in ended} <= {"stopped", "ready", "draining"}, "no replica was lost or killed"
    assert len(ended) <= 8, "they do not drain each other for ever"
    waiting = narrow.cli("model", "list")
    assert not any(row["pool"]["waits_for_machine"] for row in waiting)
