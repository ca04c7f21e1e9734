"""What the gateway costs: CPU time per request of one gateway process with everything on, beside that of other proxies.

One engine that costs nothing answers all of them; CONNECTIONS clients ask one proxy at a time, as fast as it answers, and the CPU time
that its process used meanwhile is divided by the requests. Everybody else's CPU time (engine, clients, Postgres, Valkey, controller) is
not counted, and other work on the machine makes a round slower, but hardly dearer.
"""

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.frame import ROUNDS, Bar, Say, interleaved, ratios, summary
from bench.gateways.processes import Load, Proxy, free_port, loading, running
from bench.gateways.service import Service, service

KINDS = ("plain", "stream")
BARE = {kind: f"gateway_cost_vs_bare_{kind}" for kind in KINDS}
NAMES = tuple(BARE.values())
CONNECTIONS = 32
#: A round with one proxy: long enough for CPU times, which the system counts in hundredths of a second.
ROUND_S, WARM_S = 3.0, 1.0
#: What a real engine's step takes at least. Tokens then come one at a time; without a pause, several wait when a proxy looks.
PACED_MS = 5.0


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """The bars of NAMES that are wanted."""
    if not wanted:
        return
    say("starting Postgres, Valkey, a controller, a replica and gateways")
    async with loading() as load, service(folder) as ours:
        proxies = {"ours": await ours.gateway("gateway", "lmaas", "gateway"), "bare": await _bare(ours, folder)}
        for name, proxy in proxies.items():
            say(f"warming {name}")
            await load.until_right(proxy)
        for kind in KINDS:
            if BARE[kind] in wanted:
                figures = await _costs(load, proxies, kind, say)
                detail = _detail(figures, "ours", "bare")
                if kind == "stream":
                    await ours.pace(PACED_MS)
                    paced = await _costs(load, proxies, kind, say)
                    await ours.pace(0)
                    detail[f"a token every {PACED_MS:g} ms"] = _detail(paced, "ours", "bare")
                yield Bar(BARE[kind], detail["median"], "<=", 2.5, detail)


async def _bare(ours: Service, folder: Path) -> Proxy:
    port = free_port()
    command = [sys.executable, "-m", "bench.gateways.bare", ours.engine_url, str(port)]
    process = await ours.exits.enter_async_context(running(command, folder / "bare.log"))
    return Proxy(process, f"http://127.0.0.1:{port}/v1/chat/completions", ours.model.name)


async def _costs(load: Load, proxies: Mapping[str, Proxy], kind: str, say: Say) -> dict[str, list[float]]:
    """CPU milliseconds per request of each proxy, round by round."""

    async def cost(name: str, _: int) -> float:
        proxy = proxies[name]
        before = proxy.running.cpu_s()
        result = await load.ask(proxy.order(stream=kind == "stream", connections=CONNECTIONS, seconds=ROUND_S))
        return (proxy.running.cpu_s() - before) * 1000 / int(result["requests"])

    for proxy in proxies.values():
        await load.ask(proxy.order(stream=kind == "stream", connections=CONNECTIONS, seconds=WARM_S))
    figures = await interleaved(ROUNDS, {name: partial(cost, name) for name in proxies})
    say(f"{kind}: " + ", ".join(f"{name} {summary(each)['median']:.3f}" for name, each in figures.items()) + " CPU ms per request")
    return figures


def _detail(figures: Mapping[str, Sequence[float]], above: str, below: str) -> dict[str, Any]:
    return summary(ratios(figures[above], figures[below])) | {"cpu_ms": {name: summary(figures[name]) for name in (above, below)}}
