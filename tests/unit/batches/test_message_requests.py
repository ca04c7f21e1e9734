"""The body that creates a message batch, read in pieces of any size."""

import json
import time
import tracemalloc
from typing import Any

import pytest

from lmaas.batches.message_requests import RequestReader
from lmaas.errors import InvalidRequest

PARAMS = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": 'Grüße 🦜 \\ " ] } , {'}]}


def request(custom_id: Any = "a", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "params": PARAMS, **more}


def read(body: bytes, *, size: int = 7, most: int = 100, request_bytes: int = 100_000) -> list[dict[str, Any]]:
    reader = RequestReader(request_bytes, most)
    lines = [line for start in range(0, len(body), size) for line in reader.feed(body[start : start + size])]
    lines += reader.feed(b"", last=True)
    assert reader.count == len(lines)
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("size", [1, 2, 5, 64, 10_000])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_requests_become_lines(size: int, form: dict[str, Any]) -> None:
    requests = [request(f"id-{number}_X") for number in range(5)]
    assert read(json.dumps({"requests": requests}, **form).encode(), size=size) == requests


def test_space_is_allowed_wherever_json_allows_it() -> None:
    text = json.dumps(request()).encode()
    assert read(b' \r\n{ "requests"\t: [\n ' + text + b" \r\n,  " + text.replace(b'"a"', b'"b"') + b"\n ]\r\n } \n") == [
        request("a"),
        request("b"),
    ]


GOOD = json.dumps({"requests": [request()]}).encode()
WRONG = [
    (b"", "invalid_json", "requests"),
    (b"[]", "invalid_json", "requests"),
    (b"{}", "invalid_json", "requests"),
    (b'{"requests": 5}', "invalid_json", "requests"),
    (b'{"other": 1, "requests": []}', "invalid_json", "requests"),
    (b'{"requests": []}', "out_of_range", "requests"),
    (b'{"requests": [5]}', "invalid_json", "requests.0"),
    (b'{"requests": [{}]}', "missing_custom_id", "requests.0.custom_id"),
    (GOOD[:-1], "invalid_json", "requests"),
    (GOOD[:-2], "invalid_json", None),
    (GOOD[:-10], "invalid_json", None),
    (GOOD + b"x", "invalid_json", "requests"),
    (GOOD + b" " * 5000, "invalid_json", None),
    (GOOD.replace(b"]}", b'], "other": 1}'), "invalid_json", "requests"),
    (GOOD[:-2] + b",]}", "invalid_json", None),
    (GOOD[:-2] + b" {}]}", "invalid_json", None),
    (GOOD.replace(b'"tiny"', b"NaN"), "invalid_json", "requests.0"),
    (GOOD.replace(b"tiny", b"ti\xff"), "invalid_json", None),
    (GOOD.replace(b"tiny", b"ti\0"), "invalid_json", None),
    (GOOD.replace(b'"tiny"', b"[" * 50_000), "invalid_json", None),
    (json.dumps({"requests": [request(), request()]}).encode(), "duplicate_custom_id", "requests.1.custom_id"),
    (json.dumps({"requests": [request("a b")]}).encode(), "invalid_custom_id", "requests.0.custom_id"),
    (json.dumps({"requests": [request("x" * 65)]}).encode(), "invalid_custom_id", "requests.0.custom_id"),
    (json.dumps({"requests": [request(5)]}).encode(), "invalid_custom_id", "requests.0.custom_id"),
    (json.dumps({"requests": [{"custom_id": "a"}]}).encode(), "missing_body", "requests.0.params"),
    (json.dumps({"requests": [request(), {"custom_id": "b", "params": []}]}).encode(), "invalid_body", "requests.1.params"),
    (json.dumps({"requests": [request(params=PARAMS | {"stream": True})]}).encode(), "unsupported_parameter", "requests.0.params.stream"),
    (json.dumps({"requests": [request(str(number)) for number in range(101)]}).encode(), "too_many_tasks", "requests"),
    (json.dumps({"requests": [request(params=PARAMS | {"system": "x" * 200_000})]}).encode(), "line_too_large", "requests.0"),
]


@pytest.mark.parametrize("size", [3, 100_000])
@pytest.mark.parametrize(("body", "code", "param"), WRONG)
def test_each_fault_names_its_place(body: bytes, code: str, param: str | None, size: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(body, size=size if len(body) < 20_000 else 9000)
    assert (caught.value.error_code, caught.value.param) == (code, param)
    assert len(caught.value.message) < 400


def test_the_memory_does_not_grow_with_the_body() -> None:
    reader = RequestReader(1_000_000, 50_000)
    tracemalloc.start()
    try:
        count = len(list(reader.feed(b'{"requests": [')))
        for number in range(20_000):
            count += len(list(reader.feed(json.dumps(request(f"request-{number}")).encode() + b",")))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 20_000
    # The ids, which must differ.
    assert peak < 20_000 * 300


def test_a_request_without_an_end_is_not_held() -> None:
    reader = RequestReader(100_000, 100)
    assert list(reader.feed(b'{"requests": [{"a": "')) == []
    fed = 0

    def feed_forever() -> None:
        nonlocal fed
        while fed < 1000:
            assert list(reader.feed(b"x" * 10_000)) == []
            fed += 1

    with pytest.raises(InvalidRequest, match="more than"):
        feed_forever()
    assert fed < 50


@pytest.mark.parametrize("before", [GOOD[:-2], GOOD[:-2] + b","])
def test_space_between_requests_is_not_held(before: bytes) -> None:
    reader = RequestReader(1_000_000, 100)
    list(reader.feed(before))
    space = b" \n" * 32_768
    tracemalloc.start()
    try:
        for _ in range(64):
            assert list(reader.feed(space)) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(space)
    more = [] if before == GOOD[:-2] else list(reader.feed(json.dumps(request("b")).encode()))
    assert len(more) == (before != GOOD[:-2])
    assert list(reader.feed(b"]}", last=True)) == []


def test_small_chunks_of_a_large_request_cost_no_more_than_large_ones() -> None:
    body = json.dumps({"requests": [request(params=PARAMS | {"system": "x" * 8_000_000})]}).encode()
    began = time.process_time()
    assert len(read(body, size=512, request_bytes=10_000_000)) == 1
    # This takes 0.2 s. If each chunk copied the chunks before it, 64 GB would be copied.
    assert time.process_time() - began < 2
