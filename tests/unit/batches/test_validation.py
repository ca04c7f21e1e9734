"""Validation of input files: the name of each fault, and the parsed form of a valid line."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from lmaas.batches.lines import MESSAGES, request_body
from lmaas.batches.validation import MAX_FAULTS, MAX_MODELS, Fault, Validator
from lmaas.errors import InvalidRequest
from tests.support.conditions import within

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
LIMIT = 256 * 1024


def line(custom_id: Any = "a", **changes: Any) -> bytes:
    """Return a line with these fields instead of those of a valid one. A field that is `...` is left out."""
    fields = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": BODY} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def checked(text: bytes, *, size: int = 1000, **settings: Any) -> Validator:
    """Return the validator after it has read this content in chunks of this size."""
    validator = Validator(
        settings.pop("endpoint", CHAT), settings.pop("max_request_bytes", LIMIT), settings.pop("max_lines", 50_000), **settings
    )
    for start in range(0, len(text), size):
        validator.feed(text[start : start + size])
    validator.close()
    return validator


VALID = [
    pytest.param(line() + b"\n", [1], id="one line"),
    pytest.param(line(), [1], id="no end of the last line"),
    pytest.param(line("a") + b"\r\n" + line("b") + b"\r\n", [1, 2], id="CRLF"),
    pytest.param(b"\xef\xbb\xbf" + line("a") + b"\n" + line("b"), [1, 2], id="BOM"),
    pytest.param(b"\n  \n" + line("a") + b"\n\t\r\n\n" + line("b") + b"\n\n", [3, 6], id="blank lines"),
    pytest.param(b"  " + line("a") + b" \n", [1], id="space around a line"),
    pytest.param(line("ключ 🔑"), [1], id="any Unicode in an id"),
    pytest.param(line("x" * 512), [1], id="the longest id"),
    pytest.param(line(extra=1), [1], id="an unknown field beside the body"),
    pytest.param(line(body=BODY | {"stream": False}), [1], id="a stream that is none"),
    pytest.param(line(body=BODY | {"stream": None}), [1], id="a stream that is null"),
    pytest.param(line(body={}), [1], id="a body without a model fails later, alone"),
    pytest.param(line().replace(b"Hello", b"\\ud83d cut"), [1], id="half a surrogate pair in a message"),
    pytest.param(line().replace(b"Hello", b"a\\u0000b"), [1], id="NUL in a message"),
    pytest.param(line(body=BODY | {"seed": 10**30}), [1], id="a large number"),
]


async def test_a_file_of_blank_lines_takes_little_time() -> None:
    async with within(3):
        validator = checked(b"\n \r\n" * 10_000_000 + line(), size=128 * 1024)
    assert [found.number for found in validator.lines] == [20_000_001]


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(("text", "numbers"), VALID)
def test_valid_lines_are_found_at_their_place(text: bytes, numbers: list[int], size: int) -> None:
    validator = checked(text, size=size)
    assert validator.faults == []
    assert [found.number for found in validator.lines] == numbers
    for found in validator.lines:
        whole = text[found.offset : found.offset + found.size]
        assert json.loads(whole)["custom_id"] == found.custom_id
        assert isinstance(request_body(CHAT, whole, ("messages",)), dict)


DEEP = b'{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
FAULTS = [
    pytest.param(b"", "empty_file", None, None, id="empty"),
    pytest.param(b"\n \r\n", "empty_file", None, None, id="only blank lines"),
    pytest.param(line()[:-1], "invalid_json_line", 1, None, id="cut"),
    pytest.param(b"\n" + line() + b"}", "invalid_json_line", 2, None, id="text behind the object"),
    pytest.param(b"[" + line() + b"]", "invalid_json_line", 1, None, id="a list"),
    pytest.param(b'"text"', "invalid_json_line", 1, None, id="text"),
    pytest.param(line().replace(b"Hello", b"a\0b"), "invalid_json_line", 1, None, id="a plain NUL"),
    pytest.param(b"\0" * 100, "invalid_json_line", 1, None, id="only NULs"),
    pytest.param(line().replace(b"Hello", b"\xff"), "invalid_json_line", 1, None, id="invalid UTF-8"),
    pytest.param(line().decode().encode("utf-16"), "invalid_json_line", 1, None, id="UTF-16"),
    pytest.param(line(body=BODY | {"temperature": float("nan")}), "invalid_json_line", 1, None, id="NaN"),
    pytest.param(DEEP, "invalid_json_line", 1, None, id="deep"),
    pytest.param(line(body={"messages": "x" * LIMIT + "y" * 70_000}), "line_too_large", 1, None, id="too large"),
    pytest.param(line(...), "missing_custom_id", 1, "custom_id", id="no id"),
    pytest.param(line(None), "missing_custom_id", 1, "custom_id", id="null for an id"),
    pytest.param(line(""), "missing_custom_id", 1, "custom_id", id="an empty id"),
    pytest.param(line(7), "invalid_custom_id", 1, "custom_id", id="a number for an id"),
    pytest.param(line(10**40), "invalid_custom_id", 1, "custom_id", id="a large number for an id"),
    pytest.param(line({"a": [1]}), "invalid_custom_id", 1, "custom_id", id="an object for an id"),
    pytest.param(line("x" * 513), "invalid_custom_id", 1, "custom_id", id="a long id"),
    pytest.param(line("ж" * 257), "invalid_custom_id", 1, "custom_id", id="a long id in bytes"),
    pytest.param(line("a\0b"), "invalid_custom_id", 1, "custom_id", id="NUL in an id"),
    pytest.param(line("a\ud83d"), "invalid_custom_id", 1, "custom_id", id="half a surrogate pair in an id"),
    pytest.param(line("a") + b"\n" + line("b") + b"\n" + line("a"), "duplicate_custom_id", 3, "custom_id", id="the same id twice"),
    pytest.param(line(method="GET"), "invalid_method", 1, "method", id="GET"),
    pytest.param(line(method=...), "invalid_method", 1, "method", id="no method"),
    pytest.param(line(url="/v1/completions"), "url_mismatch", 1, "url", id="another endpoint"),
    pytest.param(line(url=...), "url_mismatch", 1, "url", id="no URL"),
    pytest.param(line(url=5), "url_mismatch", 1, "url", id="a number for a URL"),
    pytest.param(line(body=...), "missing_body", 1, "body", id="no body"),
    pytest.param(line(body=None), "missing_body", 1, "body", id="null for a body"),
    pytest.param(line(body=[BODY]), "invalid_body", 1, "body", id="a list for a body"),
    pytest.param(line(body="text"), "invalid_body", 1, "body", id="text for a body"),
    pytest.param(line(body=BODY | {"stream": True}), "unsupported_parameter", 1, "body.stream", id="a stream"),
    pytest.param(line("a") + b"\n" + line("b") + b"\n\n" + line("c"), "too_many_tasks", 4, None, id="too many lines"),
]


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize(("text", "code", "number", "param"), FAULTS)
def test_each_fault_has_a_code_and_its_line(text: bytes, code: str, number: int | None, param: str | None, size: int) -> None:
    if size == 1 and len(text) > 10_000:
        size = 5000
    validator = checked(text, size=size, max_lines=2 if code == "too_many_tasks" else 100)
    [fault] = validator.faults
    assert (fault.code, fault.line, fault.param) == (code, number, param)
    assert len(fault.message) < 400
    # Faults are stored and shown as JSON.
    fault.message.encode()
    assert "\0" not in fault.message
    assert validator.lines == []


def test_all_faults_of_a_line_are_reported() -> None:
    text = line("a") + b"\n" + line(..., method="PUT", url="/", body=[])
    assert [(fault.code, fault.line) for fault in checked(text).faults] == [
        ("missing_custom_id", 2),
        ("invalid_method", 2),
        ("url_mismatch", 2),
        ("invalid_body", 2),
    ]


def test_the_number_of_faults_is_bounded_and_the_rest_is_not_read() -> None:
    validator = checked(b"?\n" * 1000)
    assert validator.is_full
    assert [fault.line for fault in validator.faults] == list(range(1, MAX_FAULTS + 1))


def test_the_number_of_models_is_bounded() -> None:
    text = b"\n".join(line(str(number), body=BODY | {"model": f"m{number}"}) for number in range(MAX_MODELS + 5))
    assert checked(text, size=100_000).faults == [
        Fault(
            "too_many_models",
            "The input file names more than 1,000 models. Divide it into several batches.",
            MAX_MODELS + 1,
            "body.model",
        )
    ]


def test_names_of_models_are_cut() -> None:
    [found] = checked(line(body=BODY | {"model": "m" * 100_000}), size=9999).lines
    assert found.model == "m" * 200
    nothing: tuple[Any, ...] = (None, 5, [], "")
    for model in nothing:
        [found] = checked(line(body=BODY | {"model": model})).lines
        assert found.model == ""


def test_a_huge_line_is_not_held() -> None:
    validator = Validator(CHAT, LIMIT, 50_000)
    chunk = b'"' + b"x" * (1 << 20)
    tracemalloc.start()
    try:
        for _ in range(64):
            validator.feed(chunk)
        validator.feed(b"\n" + line() + b"\n")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    validator.close()
    assert [(fault.code, fault.line) for fault in validator.faults] == [("line_too_large", 1)]
    assert peak < 4 << 20


def lines_of(count: int, custom_id_bytes: int, line_bytes: int) -> Iterator[bytes]:
    filler = "x" * (line_bytes - custom_id_bytes - 160)
    for number in range(count):
        yield line(f"{number:0{custom_id_bytes}d}", body=BODY | {"user": filler}) + b"\n"


def test_the_memory_does_not_grow_with_the_file() -> None:
    validator = Validator(CHAT, LIMIT, 50_000)
    tracemalloc.start()
    try:
        for each in lines_of(5000, 512, 4000):
            validator.feed(each)
        validator.close()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(validator.lines) == 5000
    # 100 MB for 50,000 lines with the longest ids.
    assert used < 10_000_000


def test_lines_of_messages_have_params() -> None:
    text = json.dumps({"custom_id": "a", "params": {"model": "tiny", "max_tokens": 5, "messages": []}}).encode()
    validator = checked(text + b"\n", endpoint=MESSAGES)
    [found] = validator.lines
    assert (found.custom_id, found.model) == ("a", "tiny")
    assert request_body(MESSAGES, text, ()) == {"model": "tiny", "max_tokens": 5, "messages": []}
    [fault] = checked(b'{"custom_id": "a", "body": {}}', endpoint=MESSAGES).faults
    assert (fault.code, fault.param) == ("missing_body", "params")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"body": {"a": 1, "a": 2}}', "the same key twice"),
        (b'{"body": 5}', "'body' must be a JSON object"),
        (b'{"params": {}}', "'body' must be a JSON object"),
        (b"{", "The line is not valid JSON"),
        (b'{"body": {"user": "\\u0000"}}', "'user' contains the character NUL"),
    ],
)
def test_a_request_is_read_as_strictly_as_over_http(text: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        request_body(CHAT, text, ("messages",))


def test_strings_for_a_model_are_mended() -> None:
    text = line().replace(b"Hello", b"\\ud83d cut\\u0000")
    assert request_body(CHAT, text, ("messages",))["messages"][0]["content"] == "\ufffd cut\0"
