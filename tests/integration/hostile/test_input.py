"""Bad input files and bad requests: each gets its clear error, the other lines run, and nothing is left behind."""

import json
from typing import Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError

from tests.integration.gateway.stack import CHAT, Stack
from tests.integration.hostile.conftest import Batches, jsonl, line, many

GOOD = json.dumps(line("good")).encode()
DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        (b"\n\r\n  \n", {("empty_file", None)}),
        (b"\xef\xbb\xbf", {("empty_file", None)}),
        (GOOD + b"\nnot json", {("invalid_json_line", 2)}),
        (b"\0\0\0\0", {("invalid_json_line", 1)}),
        (GOOD.replace(b"good", b"go\0d"), {("invalid_json_line", 1)}),
        (GOOD.replace(b"Hello", b"Hell\xff"), {("invalid_json_line", 1)}),
        (GOOD.replace(b'"Hello."', DEEP), {("invalid_json_line", 1)}),
        (GOOD + b"\n" + DEEP, {("invalid_json_line", 2)}),
        (b"[" + GOOD + b"]", {("invalid_json_line", 1)}),
        (b'"text"\n5\nnull', {("invalid_json_line", 1), ("invalid_json_line", 2), ("invalid_json_line", 3)}),
        (GOOD + b"\n\n" + GOOD, {("duplicate_custom_id", 3)}),
        (GOOD.replace(b"/v1/chat/completions", b"/v1/completions"), {("url_mismatch", 1)}),
        (GOOD.replace(b"/v1/chat/completions", b"https://example.com/v1/chat/completions"), {("url_mismatch", 1)}),
        (many(50_001), {("too_many_tasks", 50_001)}),
    ],
    ids=lambda value: None if isinstance(value, set) else repr(value[:24]),
)
async def test_a_file_that_cannot_be_read_fails_its_batch(batches: Batches, content: bytes, errors: set[tuple[str, int | None]]) -> None:
    batch = await batches.end(await batches.create(content))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert {(error.code, error.line) for error in batch.errors.data or ()} == errors
    assert all(error.message for error in batch.errors.data or ())
    assert (batch.output_file_id, batch.error_file_id, batch.in_progress_at) == (None, None, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {key: value for key, value in line("x").items() if key != "custom_id"},
        line(None),
        line(5),
        line(""),
        line("x" * 1_000_000),
        line("nul\0"),
        line("x", method="GET"),
        line("x", stream=True),
        line("x") | {"method": None},
        line("x") | {"body": [1]},
        line("x") | {"body": None},
        {key: value for key, value in line("x").items() if key != "body"},
        line("x") | {"url": 5},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_a_line_of_another_form_fails_the_batch_by_its_number(batches: Batches, wrong: dict[str, Any]) -> None:
    batch = await batches.end(await batches.create(jsonl([line("first"), wrong])))
    assert batch.status == "failed"
    assert batch.errors is not None
    [error] = batch.errors.data or []
    assert error.line == 2
    assert error.code
    assert len(error.message or "") < 1000


async def test_a_surrogate_in_a_custom_id(batches: Batches) -> None:
    batch = await batches.end(await batches.create(GOOD.replace(b"good", rb"\ud800")))
    assert batch.status == "failed"


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD, GOOD + b"\r\n", b"\n \r\n" + GOOD + b"\n\n", GOOD.replace(b"{", b"{ ", 1)])
async def test_marks_ends_and_blanks_are_harmless(batches: Batches, content: bytes) -> None:
    batch = await batches.end(await batches.create(content))
    output, errors = await batches.results(batch)
    assert (batch.status, set(output), errors) == ("completed", {"good"}, {})


async def test_bodies_that_are_refused_fail_their_lines_only(batches: Batches, stack: Stack) -> None:
    other = await stack.tenant()
    await stack.adapter(other, "secret-bot", batches.base)
    wrong: dict[str, tuple[Any, str | None]] = {
        "other tenant's": ({"model": "secret-bot"}, "model_not_found"),
        "unknown": ({"model": "x" * 100_000}, None),
        "number as model": ({"model": 5}, None),
        "no model": ({"model": None}, None),
        "path as model": ({"model": "../../etc/passwd"}, "model_not_found"),
        "of another kind": ({"model": "embedder"}, None),
        "hot": ({"temperature": "hot"}, None),
        "many": ({"n": 10**6}, None),
        "long": ({"max_tokens": 10**9}, None),
        "negative": ({"max_tokens": -1}, None),
        "no messages": ({"messages": []}, None),
        "messages of numbers": ({"messages": [1]}, None),
        "text": ({"messages": "Hello."}, None),
        "unknown field": ({"unheard_of": 1}, None),
        "priority": ({"priority": -5}, None),
        "too long": ({"messages": [{"role": "user", "content": "word " * 5000}]}, None),
        "background": ({"background": True}, None),
    }
    fine: dict[str, dict[str, Any]] = {
        "nul": {"messages": [{"role": "user", "content": "a\0b"}]},
        "surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
        "null": {"temperature": None},
        'emoji 🦜\n\t"': {},
    }
    content = jsonl([line(name, **body) for name, (body, _) in wrong.items()] + [line(name, **body) for name, body in fine.items()])
    batch = await batches.end(await batches.create(content))
    output, errors = await batches.results(batch)
    assert batch.status == "completed"
    assert set(output) == set(fine)
    assert set(errors) == set(wrong)
    assert {name: errors[name] for name, (_, code) in wrong.items() if code} == {name: code for name, (_, code) in wrong.items() if code}
    text = (await batches.client.files.content(str(batch.error_file_id))).text
    assert "secret-bot" not in text.replace("`secret-bot`", "").replace("'secret-bot'", "").replace('"secret-bot"', "")


async def test_a_batch_of_failures_only_is_completed_without_output(batches: Batches) -> None:
    batch = await batches.end(await batches.create(jsonl(line(f"{number}", model="unknown-bot") for number in range(5))))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert set((await batches.results(batch))[1].values()) == {"model_not_found"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "/v1/messages"},
        {"endpoint": "/v1/files"},
        {"endpoint": 5},
        {"endpoint": None},
        {"completion_window": "1h"},
        {"completion_window": None},
        {"metadata": {f"{number}": "x" for number in range(17)}},
        {"metadata": {"k" * 65: "x"}},
        {"metadata": {"k": "x" * 513}},
        {"metadata": {"k": 5}},
        {"metadata": {"k": "\0"}},
        {"metadata": ["x"]},
        {"output_expires_after": {"anchor": "created_at", "seconds": 1}},
        {"output_expires_after": {"anchor": "now", "seconds": 3600}},
        {"output_expires_after": 5},
        {"input_file_id": None},
        {"input_file_id": 5},
        {"input_file_id": ["file"]},
        {"unheard_of": 1},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
async def test_what_is_wrong_with_the_creation_is_a_400(batches: Batches, http: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    body = {"input_file_id": await batches.upload(GOOD), "endpoint": CHAT, "completion_window": "24h"} | wrong
    response = await http.post("/v1/batches", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert (await batches.client.batches.list()).data == []


HOSTILE_IDS = ["file-unknown", "batch_" + "0" * 32, "../../etc/passwd", "x" * 5000, "' OR 1=1 --", "nul\0", "\ud800", "file-ü", ""]


async def test_files_that_are_not_there_or_not_for_batches(batches: Batches, stack: Stack, http: httpx.AsyncClient) -> None:
    refused: list[tuple[int, Any]] = []

    async def refuse(file_id: str) -> None:
        body = json.dumps({"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"})
        response = await http.post("/v1/batches", content=body, headers={"content-type": "application/json"})
        assert response.status_code in (400, 404), response.text
        refused.append((response.status_code, response.json()["error"]["code"]))

    other = await stack.tenant()
    async with stack.client(other) as theirs:
        response = await theirs.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", GOOD)})
        assert response.status_code == 200, response.text
    gone = await batches.upload(GOOD)
    await batches.client.files.delete(gone)
    for file_id in (response.json()["id"], gone, "file-unknown"):
        await refuse(file_id)
    assert len(set(refused)) == 1, "another tenant's file looks like one that does not exist"
    for file_id in HOSTILE_IDS:
        await refuse(file_id)
    await refuse(await batches.upload(GOOD, "user_data"))


@pytest.mark.parametrize("path", ["/v1/batches/{}", "/v1/files/{}", "/v1/files/{}/content"])
async def test_hostile_ids_in_paths(http: httpx.AsyncClient, path: str) -> None:
    for hostile in ("batch_unknown", "..%2f..%2fetc%2fpasswd", "%00", "%ff", "x" * 5000, "%27%20OR%201=1", "file-%F0%9F%A6%9C"):
        response = await http.get(path.format(hostile))
        assert response.status_code in (400, 404), (hostile, response.text)
        assert response.json()["error"]["message"]


async def test_hostile_parameters_of_lists(batches: Batches, http: httpx.AsyncClient) -> None:
    for path in ("/v1/batches", "/v1/files"):
        for query in (
            "limit=0",
            "limit=-1",
            "limit=x",
            "limit=99999999999999999999",
            "after=%00",
            "after=unknown",
            "order=up",
        ):
            response = await http.get(f"{path}?{query}")
            unknown = "order" in query and path == "/v1/batches"  # batches have no order
            assert response.status_code in ((200, 400) if unknown else (400, 404)), (path, query, response.text)


async def test_others_see_nothing_of_a_batch(batches: Batches, stack: Stack) -> None:
    batch = await batches.end(await batches.create(GOOD))
    other = await stack.tenant()
    async with batches.client.with_options(api_key=other.key) as theirs:
        assert (await theirs.batches.list()).data == []
        assert (await theirs.files.list()).data == []
        with pytest.raises(NotFoundError):
            await theirs.batches.retrieve(batch.id)
        with pytest.raises(NotFoundError):
            await theirs.batches.cancel(batch.id)
        for file_id in (batch.input_file_id, str(batch.output_file_id)):
            with pytest.raises(NotFoundError):
                await theirs.files.content(file_id)
            with pytest.raises(NotFoundError):
                await theirs.files.delete(file_id)
        with pytest.raises((NotFoundError, BadRequestError)):
            await theirs.batches.list(after=batch.id)
