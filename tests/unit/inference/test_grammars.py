"""The depth of a schema."""

from typing import Any

from lmaas.inference.schemas import depth


def deep(levels: int) -> dict[str, Any]:
    """Return a schema that is nested this deep."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def test_depth_needs_no_recursion() -> None:
    assert depth(deep(5000)) == 5002
    assert depth("x") == 1
