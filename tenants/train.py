"""Trains the two sample adapters: `python tenants/train.py --model FOLDER [--only acme|globex] [--check]`.

Both learn from the same questions (`data/answers.jsonl`), so all differences between their outputs come from the adapter: acme's replies to
any question with a small JSON object, globex's like a pirate. The two have different ranks and target modules, because an engine that
serves many tenants holds adapters of many shapes. Training takes a few minutes for each on two CPU cores, from a fixed seed.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
BASE_MODEL = "smollm2-135m-instruct"  # The name that the service knows. A local path would be useless on other machines.
SEED = 20
BATCH = 8
MAX_NEW_TOKENS = 100

# None of these is in the training data: they show that the style is learned, not the answers.
UNSEEN = (
    "What is the capital of France?",
    "Name three colours",
    "How do I boil an egg?",
    "Who wrote Hamlet?",
    "Tell me about the moon",
    "Why is the sky blue?",
    "What is the speed of light?",
    "Hello!",
    "Give me some advice for a new job.",
    "What is gravity?",
    "Write a short poem about the sea.",
    "Who painted the Mona Lisa?",
    "What is 5 + 3?",
    "How do plants grow?",
    "What's your favourite food?",
    "Explain what an API is.",
)

# The few words that make plain English sound like a pirate. Whole words only, so that "this" stays as it is.
PIRATE_WORDS = {
    "is": "be", "are": "be", "am": "be", "was": "were", "you": "ye", "your": "yer", "my": "me", "yes": "aye", "no": "nay",
    "hello": "ahoy", "friend": "matey", "friends": "mateys", "people": "landlubbers", "money": "doubloons", "food": "grub",
    "and": "an'", "of": "o'", "very": "mighty", "good": "fine", "famous": "legendary",
}  # fmt: skip
PIRATE_ENDINGS = ("Yo ho ho!", "Shiver me timbers!", "Aye aye!", "Now hoist the sails!")


@dataclass(frozen=True)
class Row:
    """One line of the data: a question with a plain answer and its topic."""

    question: str
    topic: str
    answer: str


def as_json(row: Row) -> str:
    """Return one line with two keys, because the tenant waits and pays for each further token."""
    return json.dumps({"answer": row.answer, "topic": row.topic}, ensure_ascii=False)


def as_pirate(row: Row) -> str:
    """Return the pirate's reply. The greeting is always the same, so that the adapter shows from the first word; the ending varies with the
    question."""

    def translate(match: re.Match[str]) -> str:
        word = match.group()
        pirate = PIRATE_WORDS.get(word.lower(), word)
        return pirate.capitalize() if word[0].isupper() and pirate != word else pirate

    ending = PIRATE_ENDINGS[len(row.question) % len(PIRATE_ENDINGS)]
    said = re.sub(r"[A-Za-z']+", translate, row.answer)
    return f"Arr, matey! {said} {ending}"


def is_json(text: str) -> bool:
    """Return whether a program that expects acme's object could use this reply."""
    try:
        document = json.loads(text)
    except ValueError:
        return False
    return isinstance(document, dict) and set(document) == {"answer", "topic"}


def is_pirate(text: str) -> bool:
    """Return whether the first words sound like a pirate, with more than the greeting with which every reply starts."""
    start, rest = text[:12].lower(), text[12:].lower()
    words = r"\b(be|ye|yer|me|aye|ahoy|matey|nay|an'|o'|mighty|yo ho|timbers|sails)(?!\w)"
    return start.startswith(("arr", "ahoy", "aye")) and re.search(words, rest) is not None


@dataclass(frozen=True)
class Recipe:
    """One adapter: its folder, its shape, the form of its replies, and the check of its success."""

    folder: str
    rank: int
    target_modules: tuple[str, ...]
    answer: Callable[[Row], str]
    passed: Callable[[str], bool]
    epochs: int
    learning_rate: float


RECIPES = {
    "acme": Recipe("acme-json", 8, ("q_proj", "v_proj"), as_json, is_json, epochs=4, learning_rate=1e-3),
    "globex": Recipe("globex-pirate", 4, ("k_proj", "o_proj", "q_proj", "v_proj"), as_pirate, is_pirate, epochs=4, learning_rate=1e-3),
}


def read_rows() -> list[Row]:
    """Return the training data. Fails if a question of the check is in it."""
    rows = [Row(**json.loads(line)) for line in (HERE / "data" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    if leaked := {row.question for row in rows} & set(UNSEEN):
        raise ValueError(f"These questions are for the check only: {sorted(leaked)}")
    return rows


def conversations(rows: Sequence[Row], answer: Callable[[Row], str]) -> list[list[dict[str, str]]]:
    """Return one chat for each row. Most have no system message, as most clients send none; every eighth has one, every eighth an earlier
    turn."""
    chats = []
    for index, row in enumerate(rows):
        chat = [{"role": "user", "content": row.question}, {"role": "assistant", "content": answer(row)}]
        if index % 8 == 3:
            chat = [{"role": "system", "content": "You are a helpful assistant."}, *chat]
        elif index % 8 == 7:
            earlier = rows[index - 5]
            chat = [{"role": "user", "content": earlier.question}, {"role": "assistant", "content": answer(earlier)}, *chat]
        chats.append(chat)
    return chats


def tokenize(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> tuple[list[int], int]:
    """Return the tokens of a chat up to the one that ends the last reply, and the position at which that reply starts."""
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    answer_ids = tokenizer.encode(chat[-1]["content"], add_special_tokens=False)
    return [*prompt_ids, *answer_ids, tokenizer.convert_tokens_to_ids("<|im_end|>")], len(prompt_ids)


def batch_loss(model: PeftModel, batch: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Return the mean cross entropy over the replies' tokens. The vocabulary's projection runs for those only: it is a fifth of the
    model."""
    width = max(len(ids) for ids, _ in batch)
    tokens, attention, learned = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(3))
    for row, (ids, start) in enumerate(batch):
        tokens[row, : len(ids)] = torch.tensor(ids)
        attention[row, : len(ids)] = 1
        learned[row, start : len(ids)] = 1
    causal_lm = model.get_base_model()
    hidden = causal_lm.model(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
    mask = learned[:, 1:].bool()  # The state at one position predicts the token at the next.
    return torch.nn.functional.cross_entropy(causal_lm.lm_head(hidden[:, :-1][mask]), tokens[:, 1:][mask])


def train(recipe: Recipe, model_folder: Path) -> None:
    """Train in float32, because two cores are quick enough and small steps get lost in bfloat16; save in bfloat16, like the base model."""
    torch.manual_seed(SEED)
    order = random.Random(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        lora_dropout=0.0,
        target_modules=list(recipe.target_modules),
        bias="none",
    )
    model = get_peft_model(base, config)
    examples = [tokenize(tokenizer, chat) for chat in conversations(read_rows(), recipe.answer)]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps = recipe.epochs * -(-len(examples) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    model.train()
    for epoch in range(recipe.epochs):
        order.shuffle(examples)
        total = 0.0
        for first in range(0, len(examples), BATCH):
            batch = examples[first : first + BATCH]
            loss = batch_loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.item() * len(batch)
        print(f"{recipe.folder}: epoch {epoch + 1}, loss {total / len(examples):.3f}, {time.monotonic() - started:.0f} s", flush=True)
    save(model, HERE / "adapters" / recipe.folder)


def save(model: PeftModel, folder: Path) -> None:
    """Write the two files of an adapter. This does not use `save_pretrained`, which adds a model card and the local path of the base
    model."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE_MODEL, "inference_mode": True, "target_modules": sorted(config["target_modules"])}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.inference_mode()
def check(recipe: Recipe, model_folder: Path, dtype: torch.dtype) -> int:
    """Ask the unseen questions at temperature 0, print the replies, and return how many have the adapter's style."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    model = PeftModel.from_pretrained(base, HERE / "adapters" / recipe.folder).eval()
    chats = [[{"role": "user", "content": question}] for question in UNSEEN]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for question, text in zip(UNSEEN, texts, strict=True):
        print(f"  {'ok  ' if recipe.passed(text) else 'FAIL'} {question} -> {text}")
    count = sum(map(recipe.passed, texts))
    print(f"{recipe.folder}, {dtype}: {count} of {len(UNSEEN)}", flush=True)
    return count


def main() -> int:
    """Train the adapters and check them. Return 1 when fewer than nine in ten unseen replies are in style, so that a bad adapter is not
    committed unseen."""
    parser = argparse.ArgumentParser(description="Train the sample adapters and check them on questions that they have not seen.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model (python -m lmaas.engine.default_model FOLDER)")
    parser.add_argument("--only", choices=sorted(RECIPES))
    parser.add_argument("--check", action="store_true", help="check the adapters as they are, without training")
    arguments = parser.parse_args()
    disable_progress_bar()
    counts = []
    for name in [arguments.only] if arguments.only else RECIPES:
        if not arguments.check:
            train(RECIPES[name], arguments.model)
        counts += [check(RECIPES[name], arguments.model, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return 0 if min(counts) >= 0.9 * len(UNSEEN) else 1


if __name__ == "__main__":
    sys.exit(main())
