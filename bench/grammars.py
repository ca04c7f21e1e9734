"""Measures the cost of checking grammars, and the effect on a tenant while another one sends schemas that take very long to compile."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from bench.client import Ask, Client, Place, client, percentile
from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.gateways.processes import Load, Proxy, core_of_its_own, loading
from bench.gateways.service import service
from bench.stack import Stack, Tenant, stack

KNOWN, INNOCENT = "grammar_known_cost", "grammar_innocent_p99"
NAMES = (KNOWN, INNOCENT)

CONNECTIONS, ROUND_S, WARM_S = 32, 3.0, 1.0
#: The bar is too close to 1 for a few rounds on a machine with other work.
KNOWN_ROUNDS = 15
#: A typical schema: a flat object with a few kinds of fields.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "The person's full name."},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 10},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}

#: The innocent tenant's requests in a round, how many at once, and their tokens. Both kinds: plain chat, and a known schema.
REQUESTS, AT_ONCE, TOKENS = 60, 4, 16
#: The number of connections on which the other tenant sends one schema after the other.
ATTACKERS = 4
ATTACK_WARM_S = 3.0


@dataclass(frozen=True)
class KnownProxy(Proxy):
    """A gateway whose requests have a schema."""

    def order(self, *, stream: bool, connections: int, seconds: float) -> dict[str, Any]:
        """Return the order, with the schema."""
        order = super().order(stream=stream, connections=connections, seconds=seconds)
        return order | {"body": order["body"] | {"response_format": FORM}}


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if KNOWN in wanted:
        yield await attempted(KNOWN, _known(folder, say))
    if INNOCENT in wanted:
        yield await attempted(INNOCENT, _innocent(model, folder / "innocent", say))


async def _known(folder: Path, say: Say) -> Bar:
    """Measure the gateway's CPU time for a request with a known schema, with the check ÷ without."""
    say("starting a gateway that does not check grammars, and one that does")
    async with loading() as load, service(folder) as ours:
        plain = {
            "with": await ours.gateway("checked", "lmaas", "gateway"),
            "without": await ours.gateway("unchecked", "bench.gateways.unchecked_gateway"),
        }
        proxies = {name: KnownProxy(each.running, each.url, each.model, each.headers) for name, each in plain.items()}
        for proxy in proxies.values():
            await load.until_right(proxy)
            await load.ask(proxy.order(stream=False, connections=CONNECTIONS, seconds=WARM_S))
        with core_of_its_own([proxy.running for proxy in proxies.values()]):
            figures = await interleaved(KNOWN_ROUNDS, {name: partial(_cost, load, proxy) for name, proxy in proxies.items()})
    found = summary(ratios(figures["with"], figures["without"]))
    return Bar(KNOWN, found["median"], "<=", 1.02, found | {"cpu_ms": {name: summary(each) for name, each in figures.items()}})


async def _cost(load: Load, proxy: Proxy, _: int) -> float:
    """Return the CPU milliseconds per request."""
    before = proxy.running.cpu_s()
    result = await load.ask(proxy.order(stream=False, connections=CONNECTIONS, seconds=ROUND_S))
    return (proxy.running.cpu_s() - before) * 1000 / int(result["requests"])


async def _innocent(model: Path, home: Path, say: Say) -> Bar:
    """Measure a tenant's p99 from request to last token while another one sends expensive schemas ÷ without that, in the same rounds."""
    say("starting lmaas")
    async with stack(model, home) as running, client() as asker:
        await running.keep_one_engine()
        innocent = await running.tenant("innocent")
        place = running.base(innocent)
        await asker.ask(Ask(place, "Hello", 2))
        await _known_schema(place)
        numbers = itertools.count()
        refusals: dict[str, int] = {}

        async def quiet(number: int) -> float:
            return await _p99(asker, place, number)

        async def attacked(number: int) -> float:
            attacker = await running.tenant(f"attacker-{number}")  # a new tenant, which has not used its limits
            attacks = [asyncio.create_task(_attack(running, attacker, numbers, refusals)) for _ in range(ATTACKERS)]
            try:
                await asyncio.sleep(ATTACK_WARM_S)
                return await _p99(asker, place, number)
            finally:
                for attack in attacks:
                    attack.cancel()
                for attack in attacks:
                    with contextlib.suppress(asyncio.CancelledError):
                        await attack

        figures = await interleaved(ROUNDS, {"quiet": quiet, "attacked": attacked})
    found = summary(ratios(figures["attacked"], figures["quiet"]))
    detail = {"p99_s": {name: summary(each) for name, each in figures.items()}, "answers to the attack": refusals}
    return Bar(INNOCENT, found["median"], "<=", 1.5, found | detail)


async def _p99(asker: Client, place: Place, number: int) -> float:
    asks = [Ask(place, f"Tell me something about the number {number * REQUESTS + each}.", TOKENS) for each in range(REQUESTS)]
    schemas = asyncio.create_task(_known_schemas(place))
    run = await asker.run(asks, AT_ONCE)
    return percentile([answer.total_s for answer in run.answers] + await schemas, 99)


async def _known_schemas(place: Place) -> list[float]:
    """Return the seconds of each of some consecutive requests with a known schema."""
    return [await _known_schema(place) for _ in range(REQUESTS // 10)]


async def _known_schema(place: Place) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    status = await _post(place, {"response_format": FORM, "max_tokens": TOKENS})
    if status != 200:
        raise RuntimeError(f"a request with a known schema was answered {status}")
    return loop.time() - began


async def _attack(running: Stack, tenant: Tenant, numbers: "itertools.count[int]", answers: dict[str, int]) -> None:
    """Send expensive schemas, each a new one, until cancelled."""
    place = running.base(tenant)
    while True:
        number = next(numbers)
        schema = _EXPLODING[number % len(_EXPLODING)](number)
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        status = str(await _post(place, {"response_format": form, "max_tokens": 1}))
        answers[status] = answers.get(status, 0) + 1
        if status == "429":
            await asyncio.sleep(0.05)


#: Different kinds of expensive schemas, each with a new schema for every number.
_EXPLODING = (
    lambda number: {"type": "integer", "multipleOf": 2147483648 + number},
    lambda number: {"type": "string", "maxLength": 1_000_000 + number},
    lambda number: {"type": "string", "pattern": f"([a-z]{{1,{400 + number % 99}}}){{400}}{number}"},
    lambda number: {"type": "string", "pattern": f"{number}" + "a" * 99_000},
    lambda number: {"type": "string", "pattern": f"(.*,){{{999 + number}}}.*"},
)


async def _post(place: Place, more: dict[str, Any]) -> int:
    body = {"model": place.model, "messages": [{"role": "user", "content": "Hello"}], "temperature": 0} | more
    headers = {"authorization": f"Bearer {place.key}"}
    async with aiohttp.ClientSession(headers=headers) as http, http.post(f"{place.url}/chat/completions", json=body) as response:
        await response.read()
        return response.status
