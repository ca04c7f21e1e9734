"""The order of lines: requests with the same beginning run one after another. Estimates of tokens."""

import json
import random
from typing import Any

import pytest

from lmaas.batches.order import outline, prefix_key, tokens

CONTEXT = 10_000


def chat(*contents: str, **more: Any) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content} for content in contents], **more}).encode()


def runs(keys: list[tuple[bytes, str]]) -> int:
    """Return the number of runs of equal labels in the order of the keys."""
    labels = [label for _, label in sorted(keys)]
    return sum(1 for before, after in zip([None, *labels], labels, strict=False) if before != after)


@pytest.mark.parametrize("shared", [300, 1500, 6000, 17_000])
def test_prompts_with_the_same_beginning_are_neighbours(shared: int) -> None:
    rng = random.Random(shared)
    # All begin alike, and differ in pairs from `shared` bytes on.
    systems = [f"{'s' * (shared // 2)}{group}" + "t" * shared for group in range(5)]
    keys = [(prefix_key(outline(chat(systems[group], str(rng.random())))), str(group)) for group in range(5) for _ in range(20)]
    rng.shuffle(keys)
    assert runs(keys) == 5


def test_keys_are_bounded() -> None:
    assert max(len(prefix_key(outline(chat("x" * size)))) for size in (0, 10, 1000, 100_000, 1_000_000)) <= 32


def test_tools_and_instructions_are_part_of_the_beginning() -> None:
    keys = {
        prefix_key(outline(chat("a", **more)))
        for more in ({}, {"tools": [{"name": "x"}]}, {"tools": [{"name": "y"}]}, {"system": "s"}, {"instructions": "i"})
    }
    assert len(keys) == 5


@pytest.mark.parametrize(
    ("body", "generates", "expected"),
    [
        ({"messages": [], "max_tokens": 7}, True, 8),
        ({"messages": [], "max_completion_tokens": 9, "max_tokens": 7}, True, 10),
        ({"input": "", "max_output_tokens": 3}, True, 4),
        ({"prompt": "", "max_tokens": 10, "n": 4}, True, 41),
        ({"prompt": "x" * 298}, True, 101 + 512),
        ({"input": "x" * 298}, False, 101),
        ({"prompt": "", "max_tokens": -5}, True, 513),
        ({"prompt": "", "max_tokens": "5"}, True, 513),
        ({"prompt": "", "max_tokens": 10**12}, True, 513),
        # A request uses at most its model's context, whatever its limit.
        ({"prompt": "", "max_tokens": 10**9 - 1}, True, 1 + CONTEXT),
        ({"prompt": "", "max_tokens": 10**9 - 1, "n": 10**9 - 1}, True, 1 + CONTEXT),
        ({"prompt": "", "max_tokens": 10**9 - 1, "n": 128}, True, 1 + 128 * CONTEXT),
        ({"messages": [{"content": "x" * 60_000}], "max_tokens": 7}, True, CONTEXT + 7),
        ({"input": [{"content": "x" * 60_000}], "max_output_tokens": 7}, True, CONTEXT + 7),
        ({"prompt": "x" * 60_000, "max_tokens": 7}, True, CONTEXT + 7),
        ({"input": "x" * 60_000}, False, CONTEXT),
        # A request with several prompts may use more.
        ({"prompt": ["x" * 29_998, "x" * 29_996], "max_tokens": 7}, True, 20_001 + 7),
        ({"input": ["x" * 29_998, "x" * 29_996]}, False, 20_001),
    ],
)
def test_estimates(body: dict[str, Any], generates: bool, expected: int) -> None:
    assert tokens(outline(json.dumps(body).encode()), generates=generates).within(CONTEXT) == expected
