"""The streaming client of the bars: it measures the first token that can be seen, and refuses incomplete responses."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.client import Ask, Client, Place, client, percentile

ROLE: dict[str, Any] = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
WORD: dict[str, Any] = {"choices": [{"delta": {"content": "word"}}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": tokens}}


@asynccontextmanager
async def answering(*events: dict[str, Any] | str) -> AsyncIterator[tuple[Client, Place]]:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}"
            await response.write(text.encode() + b"\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", stream)
    async with TestServer(app) as server, client() as asker:
        yield asker, Place(str(server.make_url("/v1")), "model", "key")


async def test_a_whole_answer() -> None:
    async with answering(": queued", ROLE, WORD, WORD, usage(2), "data: [DONE]") as (asker, place):
        answer = await asker.ask(Ask(place, "Hi", 2))
    assert 0 < answer.ttft_s <= answer.total_s
    assert answer.completion_tokens == 2
    assert len(answer.gaps_s) == 1
    assert 0 <= answer.gaps_s[0] <= answer.total_s - answer.ttft_s


@pytest.mark.parametrize(
    "events",
    [
        (ROLE, WORD, usage(1), "data: [DONE]"),
        (ROLE, WORD, WORD, usage(2)),
        (ROLE, usage(2), "data: [DONE]"),
        (ROLE, WORD, {"error": {"message": "broken"}}),
        ({"error": {"message": "broken"}},),
        ("data: [DONE]",),
        (),
    ],
    ids=["too short", "cut", "nothing to see", "failed later", "failed at once", "only its end", "empty"],
)
async def test_half_answers_are_none(events: tuple[dict[str, Any] | str, ...]) -> None:
    async with answering(*events) as (asker, place):
        with pytest.raises(RuntimeError):
            await asker.ask(Ask(place, "Hi", 2))


async def test_a_load_keeps_its_order_and_stops_at_the_first_failure() -> None:
    async with answering(ROLE, WORD, usage(1), "data: [DONE]") as (asker, place):
        run = await asker.run([Ask(place, "Hi", 1)] * 7, at_once=3)
        assert len(run.answers) == 7
        assert run.tokens_per_s == pytest.approx(7 / run.took_s)
        with pytest.raises(ExceptionGroup):
            await asker.run([Ask(place, "Hi", 1), Ask(place, "Hi", 2)], at_once=1)


def test_percentiles_are_figures_that_were_seen() -> None:
    figures = [float(number) for number in range(1, 101)]
    assert percentile(figures, 50) == 50
    assert percentile(figures, 99) == 99
    assert percentile([3.0, 1.0, 2.0], 50) == 2
    assert percentile([5.0], 99) == 5
