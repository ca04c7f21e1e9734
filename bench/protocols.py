"""Measures the cost of other protocols for the gateway: its CPU time per request ÷ that of a chat completion of the same size, in one run.

The engine, the clients and the measurement are those of `bench.gateway`. The engine writes each token in its own write. Streams are
measured twice: with tokens as fast as the gateway reads them, of which several arrive in one read, and with a token every PACED_MS
milliseconds, of which each arrives alone. The worse ratio counts.
"""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.frame import ROUNDS, Bar, Say, attempted, interleaved, ratios, summary
from bench.gateways.processes import Load, Proxy, loading
from bench.gateways.protocols import PROTOCOLS
from bench.gateways.service import Service, service

CHAT = "chat"
#: The requests of PROTOCOLS of which the worst counts, and those that are only reported.
COUNTED = {"responses": ("responses",), "messages": ("messages",), "embeddings": ("embeddings, base64", "embeddings, float")}
SHOWN = {"responses": ("responses, store: false",)}
WHOLE, STREAM = 1.5, 2.5
#: The protocol of each bar, and whether it is streamed.
BARS = {f"protocol_cost_{name}_{kind}": (name, kind == "stream") for name in ("responses", "messages") for kind in ("plain", "stream")}
BARS["protocol_cost_embeddings"] = ("embeddings", False)
NAMES = tuple(BARS)
CONNECTIONS, ROUND_S, WARM_S = 32, 3.0, 1.0
#: The least duration of a real engine's step.
PACED_MS = 5.0


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if not wanted:
        return
    say("starting Postgres, Valkey, a controller and replicas")
    async with loading() as load, service(folder) as ours:
        proxy = await ours.gateway("gateway", "lmaas", "gateway")
        await load.until_right(proxy)
        for name in wanted:
            yield await attempted(name, _bar(load, ours, proxy, name, say))


async def cost(load: Load, proxy: Proxy, protocol: str, _: int = 0, *, stream: bool, seconds: float = ROUND_S) -> float:
    """Return the CPU milliseconds per request of this protocol."""
    asked = PROTOCOLS[protocol]
    order = proxy.order(stream=stream, connections=CONNECTIONS, seconds=seconds)
    order |= {
        "url": proxy.url.replace(PROTOCOLS[CHAT].path, asked.path),
        "body": asked.body(asked.model or proxy.model, stream=stream),
        "protocol": protocol,
    }
    before = proxy.running.cpu_s()
    result = await load.ask(order)
    return (proxy.running.cpu_s() - before) * 1000 / int(result["requests"])


async def _bar(load: Load, ours: Service, proxy: Proxy, bar: str, say: Say) -> Bar:
    protocol, stream = BARS[bar]
    counted = COUNTED[protocol]
    asked = [CHAT, *counted, *SHOWN.get(protocol, ())]
    ways: dict[str, dict[str, Any]] = {}
    if stream:
        ways["several tokens in one read"] = await _ratios(load, proxy, asked, stream=True)
        await ours.pace(PACED_MS)
        try:
            ways[f"a token every {PACED_MS:g} ms"] = await _ratios(load, proxy, asked, stream=True)
        finally:
            await ours.pace(0)
    else:
        ways["whole"] = await _ratios(load, proxy, asked, stream=False)
    for way, found in ways.items():
        say(f"{bar}, {way}: " + ", ".join(f"{name} {found['cpu_ms'][name]['median']:.3f}" for name in asked) + " CPU ms per request")
    worst, request = max(((way, name) for way in ways for name in counted), key=lambda pair: float(ways[pair[0]][pair[1]]["median"]))
    detail: dict[str, Any] = {"worst": f"{request}, {worst}", **ways[worst][request], **ways}
    return Bar(bar, detail["median"], "<=", STREAM if stream else WHOLE, detail)


async def _ratios(load: Load, proxy: Proxy, asked: Sequence[str], *, stream: bool) -> dict[str, Any]:
    """Return the ratio of each request to chat, which is the first one, and the CPU milliseconds of all."""
    for name in asked:
        await cost(load, proxy, name, stream=stream, seconds=WARM_S)
    figures = await interleaved(ROUNDS, {name: partial(cost, load, proxy, name, stream=stream) for name in asked})
    found: dict[str, Any] = {name: summary(ratios(figures[name], figures[CHAT])) for name in asked[1:]}
    return found | {"cpu_ms": {name: summary(each) for name, each in figures.items()}}
