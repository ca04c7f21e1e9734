"""The list of models in Anthropic's shape, page by page."""

from typing import Any

import pytest

from lmaas.errors import InvalidRequest
from lmaas.inference.catalog import ListedModel
from lmaas.protocols.models import anthropic_model, anthropic_models, openai_model
from lmaas.states import PoolKind

MODELS = [ListedModel(name, 1_700_000_000, None, 2048, PoolKind.GENERATE) for name in "abcde"]


def page(**query: str) -> tuple[str, bool, str | None, str | None]:
    found = anthropic_models(MODELS, query)
    return "".join(model["id"] for model in found["data"]), found["has_more"], found["first_id"], found["last_id"]


@pytest.mark.parametrize(
    ("query", "ids", "has_more"),
    [
        ({}, "abcde", False),
        ({"limit": ""}, "abcde", False),
        ({"limit": "5"}, "abcde", False),
        ({"limit": "2"}, "ab", True),
        ({"limit": "2", "after_id": "b"}, "cd", True),
        ({"limit": "2", "after_id": "c"}, "de", False),
        ({"limit": "2", "after_id": "e"}, "", False),
        ({"limit": "2", "before_id": "e"}, "cd", True),
        ({"limit": "2", "before_id": "c"}, "ab", False),
        ({"before_id": "a"}, "", False),
        ({"limit": "1000", "after_id": "a", "before_id": ""}, "bcde", False),
        ({"lifecycle": "active"}, "abcde", False),
    ],
)
def test_pages(query: dict[str, str], ids: str, has_more: bool) -> None:
    assert page(**query) == (ids, has_more, ids[0] if ids else None, ids[-1] if ids else None)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *(({"limit": limit}, "limit") for limit in ("0", "1001", "-1", "1.0", "x", "9" * 5000, "٣", " 5")),
        ({"after_id": "x"}, "after_id"),
        ({"before_id": "x" * 5000}, "before_id"),
        ({"before_id": "a", "after_id": "b"}, "before_id"),
    ],
)
def test_what_is_refused(query: dict[str, str], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        anthropic_models(MODELS, query)
    assert caught.value.param == param
    assert len(caught.value.message) < 250


def test_both_shapes_of_a_model() -> None:
    model = ListedModel("robot", 1_700_000_000, "base", 512, PoolKind.EMBED)
    shared: dict[str, Any] = {"id": "robot", "kind": "embed"}
    assert openai_model(model) == shared | {
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tenant",
        "parent": "base",
        "max_model_len": 512,
    }
    assert anthropic_model(model) == shared | {
        "type": "model",
        "display_name": "robot",
        "created_at": "2023-11-14T22:13:20Z",
        "lifecycle": "active",
        "max_input_tokens": 512,
        "max_tokens": 512,
    }
