"""The blocks of a message's content, and the text that a model receives for them."""

from collections.abc import Callable
from typing import Any

from lmaas.errors import InvalidRequest
from lmaas.protocols.parameters.checks import unsupported, wrong_type

MAX_BLOCKS = 10_000
#: The beginning of a block in which Claude Code reports a number that changes with every request: it would defeat the engine's cache.
_BILLING = "x-anthropic-billing-header"
_NOT_TEXT = "the models read text only"


def read_blocks(where: str, content: Any) -> list[dict[str, Any]]:
    """Return a content's blocks; a string is one block of text."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None:
        return []
    if not isinstance(content, list) or len(content) > MAX_BLOCKS:
        raise wrong_type(where, f"a string or a list of at most {MAX_BLOCKS} blocks")
    for number, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise wrong_type(f"{where}.{number}", "an object with a 'type'")
    return content


def string(where: str, block: dict[str, Any], field: str) -> str:
    """Return a field of a block that must be a string."""
    value = block.get(field)
    if not isinstance(value, str):
        raise wrong_type(f"{where}.{field}", "a string")
    return value


def text_of(where: str, block: dict[str, Any]) -> str:
    """Return the text of a block that has some. Raises InvalidRequest for a block of another kind."""
    read = _READERS.get(block["type"])
    if read is None:
        raise not_supported(where, block)
    return read(where, block)


def not_supported(where: str, block: dict[str, Any]) -> InvalidRequest:
    """Return the error for a block that cannot stand in this place."""
    kind = block["type"]
    reason = f": {_NOT_TEXT}" if kind in ("image", "container_upload") else ""
    return InvalidRequest(
        f"'{where}' is a block of the type '{kind[:50]}', which is not supported here{reason}. Remove it from the request.",
        code="unsupported_content",
        param=where,
    )


def system_text(name: str, value: Any) -> str:
    """Return a system prompt as one text."""
    texts = []
    for number, block in enumerate(read_blocks(name, value)):
        where = f"{name}.{number}"
        if block["type"] != "text":
            raise not_supported(where, block)
        text = string(where, block, "text")
        if not text.startswith(_BILLING):
            texts.append(text)
    return joined(texts)


def joined(texts: list[str]) -> str:
    """Return several blocks of text as one: each on its own lines, as a chat template would show them."""
    return "\n".join(text for text in texts if text)


def _text(where: str, block: dict[str, Any]) -> str:
    return string(where, block, "text")


def _document(where: str, block: dict[str, Any]) -> str:
    """Return a document's title, context and text."""
    _check_citations(where, block)
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or not isinstance(kind, str):
        raise wrong_type(f"{where}.source", "an object with a 'type'")
    if kind == "text":
        text = string(f"{where}.source", source, "data")
    elif kind == "content":
        inner = f"{where}.source.content"
        text = joined([text_of(f"{inner}.{number}", part) for number, part in enumerate(_plain_blocks(inner, source.get("content")))])
    else:
        raise InvalidRequest(
            f"'{where}.source' is a document of the type '{kind[:50]}', which is not supported: {_NOT_TEXT}. Send its text, with a source "
            "of the type 'text'.",
            code="unsupported_content",
            param=f"{where}.source",
        )
    about = [string(where, block, field) for field in ("title", "context") if block.get(field) is not None]
    return joined([*about, text])


def _search_result(where: str, block: dict[str, Any]) -> str:
    """Return a search result's title, source and text."""
    _check_citations(where, block)
    inner = f"{where}.content"
    texts = [text_of(f"{inner}.{number}", part) for number, part in enumerate(_plain_blocks(inner, block.get("content")))]
    return joined([string(where, block, "title"), string(where, block, "source"), *texts])


def _plain_blocks(where: str, content: Any) -> list[dict[str, Any]]:
    blocks = read_blocks(where, content)
    for number, block in enumerate(blocks):
        if block["type"] != "text":
            raise not_supported(f"{where}.{number}", block)
    return blocks


def _check_citations(where: str, block: dict[str, Any]) -> None:
    citations = block.get("citations")
    if isinstance(citations, dict) and citations.get("enabled"):
        raise unsupported(f"{where}.citations", "the models do not cite their sources")


_READERS: dict[str, Callable[[str, dict[str, Any]], str]] = {"text": _text, "document": _document, "search_result": _search_result}
