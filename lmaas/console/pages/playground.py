"""The playground: one or two models answer the same message as a stream, with the time, the tokens and the price of each answer."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
from starlette.responses import JSONResponse, Response, StreamingResponse

from lmaas.api.table import LIST_EVENTS
from lmaas.console.api import Unread, read
from lmaas.console.models import GENERATE, adapter_names, base_models
from lmaas.console.numbers import typed_number
from lmaas.console.page import Fields, Page, Section, Visit, get, post
from lmaas.console.request_code import Asked, code_for, request_body
from lmaas.errors import ApiError, InvalidRequest
from lmaas.inference.sink import STREAM_HEADERS
from lmaas.types import Role

CHAT = "/v1/chat/completions"
MODEL_HEADER = "x-lmaas-model"
_LOST = "The connection to the service was lost before the answer was complete. Run the request again."
#: The parameters that are numbers, and whether they are whole ones.
_NUMBERS = {"max_tokens": True, "temperature": False}
_NAMES = ("model", "second", "system", "message", "max_tokens", "temperature")


async def show(visit: Visit) -> Response:
    """Show the form, filled from the address: `model`, `second` and `message`."""
    return await _page(visit, {name: visit.query.get(name, "") for name in _NAMES})


async def run(visit: Visit) -> Response:
    """Answer without JavaScript: wait for the whole answers, then show the page with them."""
    typed = {name: visit.form[name] for name in _NAMES}
    try:
        asked = _asked(typed)
    except InvalidRequest as error:
        return await _page(visit, typed, errors={error.param or "": error.message}, status=400)
    models = [asked.model, *([typed["second"].strip()] if typed["second"].strip() else [])]
    answers = await asyncio.gather(*(_whole(visit, msgspec.structs.replace(asked, model=model)) for model in models))
    return await _page(visit, typed, answers=list(answers))


async def suggest(visit: Visit) -> Response:
    """Return the options of the models' fields for what was typed so far."""
    typed = visit.query.get("model") or visit.query.get("second") or ""
    return visit.render("playground_models.html", **await _suggestions(visit, typed.partition("@")[0].strip()))


async def code(visit: Visit) -> Response:
    """Return the request of the form as code."""
    typed = {name: visit.form[name] for name in _NAMES}
    try:
        shown = code_for(_asked(typed, complete=False), _origin(visit))
    except InvalidRequest:
        return Response(status_code=204)
    return visit.render("playground_code.html", code=shown)


async def answer(visit: Visit) -> Response:
    """Stream the answer of one model: the gateway's events and comments, after an event `head` with the request's id.

    An error is an event with the key `error`, as in the gateway's streams.
    """
    try:
        asked = msgspec.convert(await visit.json(), Asked)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The request is not complete: {error}.") from None
    return StreamingResponse(_events(visit, asked), headers=dict(STREAM_HEADERS))


async def cost(visit: Visit) -> Response:
    """Return the usage event of a request, or 202 as long as it is not in the ledger."""
    event = await _event(visit, visit.query.get("request_id", ""))
    if event is None:
        return JSONResponse({}, 202)
    shown = {name: event[name] for name in ("charge_picousd", "queue_ms", "load_ms", "status")}
    # Tokens are free only where no price is set.
    return JSONResponse(shown | {"is_priced": event["charge_picousd"] > 0 or event["prompt_tokens"] == 0})


async def _events(visit: Visit, asked: Asked) -> AsyncIterator[bytes]:
    body = request_body(asked) | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with visit.api.stream("POST", CHAT, json=body) as response:
            head = {"request_id": response.headers.get("x-request-id", ""), "model": response.headers.get(MODEL_HEADER, "")}
            yield b"event: head\ndata: " + msgspec.json.encode(head) + b"\n\n"
            async for chunk in response.aiter_bytes():
                yield chunk
    except ApiError as error:
        yield _error_event(error.message, error.request_id)
    except httpx.RequestError:
        yield _error_event(_LOST, "")


def _error_event(message: str, request_id: str) -> bytes:
    return b"data: " + msgspec.json.encode({"error": {"message": message}, "request_id": request_id}) + b"\n\n"


async def _whole(visit: Visit, asked: Asked) -> dict[str, Any]:
    """Return the text and the tokens of a model's answer, or the message of its error."""
    failed = {"text": "", "usage": None}
    try:
        async with visit.api.stream("POST", CHAT, json=request_body(asked)) as response:
            await response.aread()
            done = read(response)
    except ApiError as error:
        return failed | {"error": error.message}
    except httpx.RequestError:
        return failed | {"error": _LOST}
    return {"text": done["choices"][0]["message"]["content"] or "", "usage": done["usage"], "error": ""}


async def _event(visit: Visit, request_id: str) -> dict[str, Any] | None:
    if not request_id:
        return None
    found = await visit.api.send(LIST_EVENTS, query={"request_id": request_id[:200], "limit": 1})
    return next((event for event in found["data"] if event["request_id"] == request_id), None)


async def _suggestions(visit: Visit, search: str) -> dict[str, Any]:
    found = await visit.api.read_all(bases=base_models(visit), adapters=adapter_names(visit.api, search))
    unread = ""
    for name in ("bases", "adapters"):
        if isinstance(found[name], Unread):
            unread, found[name] = found[name].message, []
    bases = [model["id"] for model in found["bases"] if model["kind"] == GENERATE and search in model["id"]]
    generating = {model["id"] for model in found["bases"] if model["kind"] == GENERATE}
    adapters = [(name, base) for name, base in found["adapters"] if not generating or base in generating]
    return {"bases": bases, "adapters": adapters, "unread": unread}


async def _page(
    visit: Visit,
    typed: dict[str, str],
    *,
    answers: list[dict[str, Any]] | None = None,
    errors: dict[str, str] | None = None,
    status: int = 200,
) -> Response:
    suggestions = await _suggestions(visit, "")
    first = next(iter(suggestions["bases"]), "")
    filled = {"model": first, "max_tokens": "256"} | {name: text for name, text in typed.items() if text}
    try:
        code = code_for(_asked(filled, complete=False), _origin(visit))
    except InvalidRequest:
        code = []
    return visit.render(
        "playground.html",
        status=status,
        typed={name: filled.get(name, "") for name in _NAMES},
        answers=answers or [],
        errors=Fields(errors),
        code=code,
        **suggestions,
    )


def _asked(typed: dict[str, str], *, complete: bool = True) -> Asked:
    """Return the values of the form. Raises InvalidRequest with the name of the field."""
    if complete:
        for name, words in (("model", "Choose a model."), ("message", "Write a message.")):
            if not typed.get(name, "").strip():
                raise InvalidRequest(words, param=name)
    numbers: dict[str, Any] = {}
    for name, whole in _NUMBERS.items():
        text = typed.get(name, "").strip()
        if text:
            try:
                numbers[name] = typed_number(text, whole=whole)
            except ValueError as error:
                raise InvalidRequest(str(error), param=name) from None
    return Asked(typed.get("model", "").strip(), typed.get("message", ""), typed.get("system", "").strip(), **numbers)


def _origin(visit: Visit) -> str:
    """Return the address of the service as the person's browser knows it."""
    request = visit.request
    scheme = request.headers.get("x-forwarded-proto", request.url.scheme).split(",")[0].strip()
    return f"{'https' if scheme == 'https' else 'http'}://{request.headers.get('host', 'localhost')}"


PAGE = Page(
    "/playground",
    "Playground",
    Section.MODELS,
    frozenset({Role.TENANT_ADMIN, Role.INFERENCE}),
    (
        get("/playground", show),
        post("/playground", run),
        get("/playground/models", suggest),
        post("/playground/code", code),
        post("/playground/answer", answer),
        get("/playground/cost", cost),
    ),
)
