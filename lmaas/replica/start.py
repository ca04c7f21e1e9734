"""Divides the time of a start into stages. Pure."""

import time
from dataclasses import dataclass
from pathlib import Path

from lmaas.engine import marks
from lmaas.states import START_PHASES


@dataclass(slots=True)
class Times:
    """When a start reached what, by time.monotonic(), in seconds. `asked`: its supervisor's process began; `began`: there is a process of
    the engine; `healthy`: its server answers; `generated`: it made a token; `resident`: the adapters that were waited for are loaded;
    `ready`: requests may come."""

    asked: float
    began: float = 0.0
    healthy: float = 0.0
    generated: float = 0.0
    resident: float = 0.0
    ready: float = 0.0
    #: For how many seconds it has waited for a zygote that was still on its way.
    waited: float = 0.0


def start_record(by: str, times: Times, marked: dict[str, float]) -> dict[str, int | str]:
    """What is kept of a start. `by`: "zygote" or "plain". `marked` are the engine's own marks; where it wrote none, all the time until its
    server answered is in `import_ms`, which holds imports, configuration and the start of the engine's processes."""
    loading = marked.get(marks.LOADING, times.healthy)
    loaded = marked.get(marks.LOADED, loading)
    cached = marked.get(marks.CACHED, loaded)
    spans = {
        "spawn_ms": times.began - times.asked - times.waited,
        "zygote_ms": times.waited,
        "import_ms": loading - times.began,
        "weights_ms": loaded - loading,
        "kv_ms": cached - loaded,
        # The engine's own warm-up, and its HTTP server.
        "warmup_ms": times.healthy - cached,
        "first_token_ms": times.generated - times.healthy,
        "adapter_ms": times.resident - times.healthy,
        "total_ms": times.ready - times.asked,
    }
    return {"by": by} | {name: max(0, round(1000 * spans[name])) for name in START_PHASES}


def process_began() -> float:
    """When this process began, by time.monotonic(); for one that was forked, when it was forked. To 10 ms."""
    # The 22nd field; the second, the name in parentheses, may hold anything.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100
    return time.monotonic() - age
