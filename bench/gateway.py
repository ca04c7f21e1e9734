"""Measures the gateway's cost: the CPU time per request of one gateway process with all features on, and of other proxies.

One engine that costs almost nothing serves all of them. CONNECTIONS clients send requests to one proxy at a time, as fast as it responds.
The CPU time of the proxy's process is divided by the number of requests. The CPU time of other processes (engine, clients, Postgres,
Valkey, controller) is not counted. Other work on the machine makes a round slower, but hardly changes its CPU time. Memory and commands to
Valkey are measured too.
"""

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from bench.frame import ROUNDS, Bar, Op, Say, attempted, interleaved, ratios, summary
from bench.gateways import peers
from bench.gateways.counted import counted
from bench.gateways.engine import TOKENS
from bench.gateways.processes import Load, Proxy, core_of_its_own, free_port, loading, running
from bench.gateways.service import Service, service
from bench.gateways.waiting import allow_files, waiting
from lmaas.config import Settings
from lmaas.scheduling.client import Scheduler, connect
from lmaas.store.models import put_base_model

KINDS = ("plain", "stream")
#: The proxy to compare with, and the ratio to reach. For LiteLLM the ratio is inverted.
BARS: dict[str, tuple[str, Op, float]] = {
    "gateway_cost_vs_bare_plain": ("bare", "<=", 2.2),
    "gateway_cost_vs_bare_stream": ("bare", "<=", 1.7),
    "gateway_cost_vs_litellm_plain": ("litellm", ">=", 25),
    "gateway_cost_vs_litellm_stream": ("litellm", ">=", 50),
    "gateway_cost_vs_vllm_router_plain": ("vllm_router", "<=", 6),
    "gateway_cost_vs_vllm_router_stream": ("vllm_router", "<=", 2.7),
}
ADMISSION, COMMANDS = "admission_cost", "redis_commands_per_request"
AT_REST, PER_WAITING = "gateway_memory_at_rest_mb", "gateway_memory_per_waiting_kb"
NAMES = (*BARS, ADMISSION, COMMANDS, AT_REST, PER_WAITING)

CONNECTIONS = 32
#: This bar is too close to 1 for five rounds on a machine with other work.
ADMISSION_ROUNDS = 11
#: The length of a round with one proxy, long enough for CPU times, which the system counts in hundredths of a second.
ROUND_S, WARM_S = 3.0, 1.0
#: The least duration of a real engine's step. Tokens then arrive one at a time; without a pause, a proxy receives several at once.
PACED_MS = 5.0
#: The pace of the tokens of long streams, and their number, for counting commands to Valkey while streams run.
LONG_MS, STREAMS = 100.0, 50
WAITING, WAITING_TENANTS, WAITING_MODEL = 5000, 10, "never-served"


async def measure(model: Path, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the requested bars of NAMES."""
    if not wanted:
        return
    if PER_WAITING in wanted:
        allow_files(WAITING)
    say("starting Postgres, Valkey, a controller and a replica")
    async with loading() as load, service(folder) as ours:
        if AT_REST in wanted:
            yield await attempted(AT_REST, _at_rest(load, ours))
        if costs := [name for name in BARS if name in wanted]:
            async for bar in _cost_bars(load, ours, folder, costs, say):
                yield bar
        if ADMISSION in wanted:
            yield await attempted(ADMISSION, _admission(load, ours, say))
        if COMMANDS in wanted:
            yield await attempted(COMMANDS, _commands(load, ours, folder))
        if PER_WAITING in wanted:
            yield await attempted(PER_WAITING, _per_waiting(load, ours, say))


async def _cost_bars(load: Load, ours: Service, folder: Path, wanted: Sequence[str], say: Say) -> AsyncIterator[Bar]:
    """Measure the gateway and all proxies that it is compared with, in the same rounds. A proxy that does not run fails only its own
    bars."""
    starts: dict[str, Callable[[], Awaitable[Proxy]]] = {
        "ours": partial(ours.gateway, "gateway", "lmaas", "gateway"),
        "bare": partial(_bare, ours, folder),
        "litellm": partial(_peer, "litellm", peers.litellm, ours, folder, say),
        "vllm_router": partial(_peer, "vllm-router", peers.vllm_router, ours, folder, say),
    }
    proxies: dict[str, Proxy] = {}
    failed: dict[str, str] = {}
    for name in ["ours", *dict.fromkeys(BARS[bar][0] for bar in wanted)]:
        say(f"starting {name}")
        try:
            proxy = await starts[name]()
            await load.until_right(proxy)
            proxies[name] = proxy
        except Exception as error:  # noqa: BLE001 (the results report every error)
            failed[name] = f"{name} does not run: {type(error).__name__}: {error}"
    for kind in KINDS:
        bars = [name for name in wanted if name.endswith(kind)]
        why = {name: failed.get("ours") or failed.get(BARS[name][0]) for name in bars}
        if any(reason is None for reason in why.values()):
            try:
                figures = await _costs(load, proxies, kind, say)
                paced = await _paced(load, ours, proxies, say) if kind == "stream" else None
            except RuntimeError as error:
                why = dict.fromkeys(bars, str(error))
        for name in bars:
            peer, op, bar = BARS[name]
            if why[name] is not None:
                yield Bar(name, None, op, bar, {"why": why[name]})
                continue
            detail = _compared(figures, peer) | ({} if paced is None else {f"a token every {PACED_MS:g} ms": _compared(paced, peer)})
            yield Bar(name, detail["median"], op, bar, detail)


async def _bare(ours: Service, folder: Path) -> Proxy:
    port = free_port()
    command = [sys.executable, "-m", "bench.gateways.bare", ours.engine_url, str(port)]
    process = await ours.exits.enter_async_context(running(command, folder / "bare.log"))
    return Proxy(process, f"http://127.0.0.1:{port}/v1/chat/completions", ours.model.name)


async def _peer(name: str, start: Callable[[Service, Path, Path], Awaitable[Proxy]], ours: Service, folder: Path, say: Say) -> Proxy:
    return await start(ours, await peers.installed(name, Settings().cache.expanduser() / "bench", say), folder)


async def _costs(load: Load, proxies: Mapping[str, Proxy], kind: str, say: Say) -> dict[str, list[float]]:
    """Return the CPU milliseconds per request of each proxy, round by round."""
    return {name: [cpu_ms for cpu_ms, _ in each] for name, each in (await _loaded(load, proxies, kind, say, ROUNDS)).items()}


async def _loaded(load: Load, proxies: Mapping[str, Proxy], kind: str, say: Say, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the CPU milliseconds per request and the requests per second of each proxy, round by round."""

    async def run(name: str, _: int) -> tuple[float, float]:
        proxy = proxies[name]
        before = proxy.running.cpu_s()
        result = await load.ask(proxy.order(stream=kind == "stream", connections=CONNECTIONS, seconds=ROUND_S))
        requests = int(result["requests"])
        return (proxy.running.cpu_s() - before) * 1000 / requests, requests / float(result["seconds"])

    for name, proxy in proxies.items():
        try:
            await load.ask(proxy.order(stream=kind == "stream", connections=CONNECTIONS, seconds=WARM_S))
        except RuntimeError as error:
            raise RuntimeError(f"{name}: {error}") from error
    figures = await interleaved(rounds, {name: partial(run, name) for name in proxies})
    medians = {name: median(cpu_ms for cpu_ms, _ in each) for name, each in figures.items()}
    say(f"{kind}: " + ", ".join(f"{name} {each:.3f}" for name, each in medians.items()) + " CPU ms per request")
    return figures


async def _paced(load: Load, ours: Service, proxies: Mapping[str, Proxy], say: Say) -> dict[str, list[float]]:
    await ours.pace(PACED_MS)
    try:
        return await _costs(load, proxies, "stream", say)
    finally:
        await ours.pace(0)


def _compared(figures: Mapping[str, Sequence[float]], peer: str) -> dict[str, Any]:
    """Return the gateway's figures ÷ the peer's. For LiteLLM, return the peer's ÷ the gateway's."""
    above, below = ("litellm", "ours") if peer == "litellm" else ("ours", peer)
    return summary(ratios(figures[above], figures[below])) | {"cpu_ms": {name: summary(figures[name]) for name in (above, below)}}


async def _admission(load: Load, ours: Service, say: Say) -> Bar:
    """Measure the gateway's requests per second with admission ÷ without, limited by the CPU time of its one process.

    Each gateway has its own core, as it would with a Redis on another machine. On a core shared with Valkey, the functions that Valkey runs
    for the gateway evict the gateway's data from the core's caches. The ratio on shared cores, from half the rounds, is in the detail, and
    so are requests per second by the clock, to which gateway, engine, clients and Valkey contribute.
    """
    say("starting a gateway without admission")
    proxies = {
        "on": await ours.gateway("admission-on", "lmaas", "gateway"),
        "off": await ours.gateway("admission-off", "bench.gateways.open_gateway", ours.engine_url),
    }
    for proxy in proxies.values():
        await load.until_right(proxy)
    detail: dict[str, Any] = {}
    for kind in KINDS:
        shared = _kept(await _loaded(load, proxies, kind, say, ADMISSION_ROUNDS // 2))
        with core_of_its_own([proxy.running for proxy in proxies.values()]) as apart:
            detail[kind] = _kept(await _loaded(load, proxies, kind, say, ADMISSION_ROUNDS))
        detail[kind] |= {"core of its own": apart, "on shared cores": shared}
    worst = min(KINDS, key=lambda kind: float(detail[kind]["median"]))
    off = "no limits, queue or lease, straight to one engine; usage events are recorded and told as ever"
    detail |= {"worst": worst, "off": off, "limits": list(ours.limits)}
    return Bar(ADMISSION, detail[worst]["median"], ">=", 0.85, {**detail[worst], **detail})


def _kept(figures: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, Any]:
    """Return the ratios with admission ÷ without, by CPU time and by the clock."""
    cpu_ms, per_s = ({name: [pair[place] for pair in each] for name, each in figures.items()} for place in (0, 1))
    by_clock = summary(ratios(per_s["on"], per_s["off"])) | {"requests_per_s": {name: summary(each) for name, each in per_s.items()}}
    kept = summary(ratios(cpu_ms["off"], cpu_ms["on"]))
    return kept | {"cpu_ms": {name: summary(each) for name, each in cpu_ms.items()}, "by the clock": by_clock}


async def _commands(load: Load, ours: Service, folder: Path) -> Bar:
    """Measure the commands that one streamed request, short or long, adds to those that a gateway sends to Valkey.

    A gateway renews all its leases together once a second, and continues for a while after the last one. The count of a window with one
    stream is therefore subtracted from that of the same window with many.
    """
    async with counted(folder / "counted.sock", Path(str(ours.settings.redis_url).removeprefix("unix://"))) as counts:
        gateway = await ours.gateway("commands", "lmaas", "gateway", redis_url=f"unix://{folder / 'counted.sock'}")
        await load.until_right(gateway)
        windows: dict[str, list[Counter[str]]] = {}

        async def sent(streams: int, pace_ms: float, _: int) -> float:
            """Return the number of the gateway's commands in a window in which this many streams begin and end."""
            until = asyncio.get_running_loop().time() + pace_ms * TOKENS / 1000 + 2
            before = counts.copy()
            await ours.pace(pace_ms)
            await load.ask(gateway.order(stream=True, connections=streams, seconds=0))
            await asyncio.sleep(until - asyncio.get_running_loop().time())  # covers reports after the answer, and equal renewals
            windows.setdefault(f"{streams} at {pace_ms}", []).append(counts - before)
            return float((counts - before).total())

        try:
            await sent(STREAMS + 1, LONG_MS, 0)  # opens all connections that are needed
            runs = {(streams, pace): partial(sent, streams, pace) for pace in (0, LONG_MS) for streams in (1, STREAMS + 1)}
            figures = await interleaved(ROUNDS, {f"{streams} at {pace}": run for (streams, pace), run in runs.items()})
        finally:
            await ours.pace(0)
    detail = {}
    for name, pace in (("short", 0), ("long", LONG_MS)):
        pairs = zip(figures[f"{STREAMS + 1} at {pace}"], figures[f"1 at {pace}"], strict=True)
        detail[name] = summary([(many - one) / STREAMS for many, one in pairs])
    worst = max(detail, key=lambda name: float(detail[name]["median"]))
    seen = {f"{streams} long streams": _readable(windows[f"{streams} at {LONG_MS}"][-1]) for streams in (1, STREAMS + 1)}
    windows_s = LONG_MS * TOKENS / 1000 + 2
    return Bar(COMMANDS, detail[worst]["median"], "<=", 3, {**detail[worst], "worst": worst, **detail, f"in {windows_s:g} s": seen})


def _readable(commands: Counter[Any]) -> dict[str, int]:
    return {name if isinstance(name, str) else " ".join(map(str, name)): count for name, count in commands.items()}


async def _at_rest(load: Load, ours: Service) -> Bar:
    """Measure the resident memory of a gateway that is idle after a load."""
    gateway = await ours.gateway("rest", "lmaas", "gateway")
    await load.until_right(gateway)
    started = gateway.running.resident_mb()
    for kind in KINDS:
        await load.ask(gateway.order(stream=kind == "stream", connections=CONNECTIONS, seconds=ROUND_S))
    await asyncio.sleep(2)
    rests = gateway.running.resident_mb()
    return Bar(AT_REST, rests, "<=", 135, {"after its start": started, "after a load": rests})


async def _per_waiting(load: Load, ours: Service, say: Say) -> Bar:
    """Measure the growth of a gateway's resident memory for each waiting streaming request, including its client's connection."""
    say(f"{WAITING} requests wait")
    model = await put_base_model(ours.db, replace(ours.model, id="", name=WAITING_MODEL, min_replicas=0, max_replicas=0))
    gateway = await ours.gateway("waiting", "lmaas", "gateway")
    await load.until_right(gateway)
    keys = await asyncio.to_thread(ours.tenants, gateway, WAITING_TENANTS)
    scheduler = Scheduler(connect(str(ours.settings.redis_url)))
    try:
        before = gateway.running.resident_mb()
        async with waiting(gateway, WAITING_MODEL, keys, WAITING):
            await asyncio.sleep(5)  # meanwhile, the requests are renewed and get reports of their position
            queued = (await scheduler.stats(model.id))["queued"]
            during = gateway.running.resident_mb()
    finally:
        await scheduler.redis.aclose()
    if queued != WAITING:
        raise RuntimeError(f"{queued} of {WAITING} requests wait")
    detail = {"requests": queued, "tenants": WAITING_TENANTS, "mb_before": before, "mb_waiting": during}
    return Bar(PER_WAITING, (during - before) * 1000 / WAITING, "<=", 30, detail)
