"""The fleet, for operators: what each pool does and why, its replicas, where the time of their starts went, and its bounds."""

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from lmaas.api.table import CHANGE_MODEL, GET_MODEL, LIST_MODELS, LIST_REPLICAS, STOP_REPLICA
from lmaas.console.api import Unread
from lmaas.console.command import command
from lmaas.console.numbers import typed_number
from lmaas.console.page import OPERATORS, Fields, Page, Section, Visit, errors_of, get, post
from lmaas.errors import ApiError

LIST = "/fleet"
PAGE_SIZE = 50
MAX_REPLICAS = 1000
#: The number of the newest replicas of all pools that are read. Those of them that have ended are shown.
ENDED_READ = 100
BOUNDS = ("min_replicas", "max_replicas", "idle_timeout_s")
#: The stages of a start in their order, in words. The adapter's runs beside the first token.
STAGES = (
    ("spawn_ms", "starting the process"),
    ("zygote_ms", "forking the engine"),
    ("import_ms", "imports"),
    ("weights_ms", "weights"),
    ("kv_ms", "memory for the context"),
    ("warmup_ms", "warming up"),
    ("first_token_ms", "first token"),
)
KINDS = {"ready": "good", "starting": "busy", "draining": "warn", "stopped": "quiet", "failed": "bad"}


async def show_list(visit: Visit) -> Response:
    """Show the pools and the replicas; for htmx only these."""
    after = visit.query.get("after")
    found = await visit.api.read_all(
        models=visit.api.send(LIST_MODELS, query={"after": after, "limit": PAGE_SIZE}),
        replicas=visit.api.send(LIST_REPLICAS, query={"limit": PAGE_SIZE}),
    )
    template = "fleet_part.html" if visit.is_part else "fleet.html"
    status = 503 if visit.is_part and isinstance(found["models"], Unread) else 200
    commands = [command(visit, "model", "list"), command(visit, "replica", "list")]
    return visit.render(template, status=status, after=after, kinds=KINDS, age=_age, sentence=_sentence, commands=commands, **found)


async def show(visit: Visit) -> Response:
    """Show one pool; for htmx only what changes."""
    model = await visit.api.send(GET_MODEL, model=visit.path["model"])
    return await _shown(visit, model)


async def change(visit: Visit) -> Response:
    """Change the bounds of a pool. An empty field puts the default back."""
    model = await visit.api.send(GET_MODEL, model=visit.path["model"])
    body: dict[str, Any] = {}
    for name in BOUNDS:
        text = visit.form[name].strip()
        try:
            body[name] = typed_number(text, whole=name != "idle_timeout_s") if text else None
        except ValueError as error:
            return await _shown(visit, model, visit.form, Fields({name: str(error)}), 400)
    try:
        await visit.api.send(CHANGE_MODEL, body, model=model["name"])
    except ApiError as error:
        if error.status in (401, 403):
            raise
        return await _shown(visit, model, visit.form, errors_of(error, BOUNDS), error.status)
    return visit.redirect(f"{LIST}/{model['name']}", f"The bounds of {model['name']} were changed. The controller follows within a second.")


async def stop(visit: Visit) -> Response:
    """Drain a replica and stop it."""
    replica = visit.form["replica"]
    await visit.api.send(STOP_REPLICA, replica=replica)
    return visit.redirect(f"{LIST}/{visit.path['model']}", f"{replica} takes no new requests. It stops when its last one has ended.")


async def _shown(
    visit: Visit, model: dict[str, Any], typed: Fields | None = None, errors: Fields | None = None, status: int = 200
) -> Response:
    name = model["name"]
    found = await visit.api.read_all(
        alive=visit.api.send(LIST_REPLICAS, query={"limit": MAX_REPLICAS}),
        all=visit.api.send(LIST_REPLICAS, query={"limit": ENDED_READ, "ended": True}),
    )
    alive = found["alive"] if isinstance(found["alive"], Unread) else _of(found["alive"], name)
    ended = found["all"] if isinstance(found["all"], Unread) else [row for row in _of(found["all"], name) if row["ended_at"]]
    present = Fields({bound: str(model[bound]).removesuffix(".0") for bound in BOUNDS})
    bounds = [part for bound in BOUNDS for part in (f"--{bound.replace('_', '-')}", present[bound])]
    return visit.render(
        "pool_part.html" if visit.is_part else "pool.html",
        status=status,
        model=model,
        alive=alive,
        ended=ended,
        starts=[] if isinstance(alive, Unread) or isinstance(ended, Unread) else _starts([*alive, *ended]),
        typed=typed or present,
        errors=errors or Fields(),
        kinds=KINDS,
        age=_age,
        sentence=_sentence,
        show_command=command(visit, "model", "show", name),
        change_command=command(visit, "model", "change", name, *bounds),
    )


def _of(replicas: dict[str, Any], model: str) -> list[dict[str, Any]]:
    return [replica for replica in replicas["data"] if replica["base_model"] == model]


def _starts(replicas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the starts of which the stages are known: each stage with its place and length in ms."""
    starts = []
    for replica in replicas:
        record = replica["start"] or {}
        stages, at = [], 0
        for name, words in STAGES:
            ms = record.get(name)
            if ms:
                stages.append({"words": words, "ms": ms, "at": at})
                at += ms
        if stages:
            total = record.get("total_ms") or at
            known = {"by": record["by"], "adapter_ms": record.get("adapter_ms"), "total_ms": total, "of": max(total, at)}
            starts.append({"id": replica["id"], "stages": stages, **known})
    return starts


def _sentence(reason: str | None) -> str:
    """Return the controller's reason as a sentence."""
    return f"{reason[0].upper()}{reason[1:].removesuffix('.')}." if reason else "Nothing yet."


def _age(moment: str | None) -> float | None:
    """Return the milliseconds since a time of the API."""
    if moment is None:
        return None
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds() * 1000)


PAGE = Page(
    LIST,
    "Fleet",
    Section.OPERATIONS,
    OPERATORS,
    (
        get(LIST, show_list),
        get(LIST + "/{model}", show),
        post(LIST + "/{model}", change),
        post(LIST + "/{model}/stop", stop),
    ),
)
