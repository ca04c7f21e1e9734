"""Divides the duration of a start into stages. Pure."""

import time
from dataclasses import dataclass
from pathlib import Path

from lmaas.engine import marks
from lmaas.states import START_PHASES


@dataclass(slots=True)
class Times:
    """The times of a start, by time.monotonic(), in seconds.

    - `asked`: the supervisor's process started.
    - `began`: the engine's process started.
    - `healthy`: the engine's server responded.
    - `generated`: the engine generated a token.
    - `resident`: the adapters that requests waited for were loaded.
    - `ready`: the replica accepted requests.
    """

    asked: float
    began: float = 0.0
    healthy: float = 0.0
    generated: float = 0.0
    resident: float = 0.0
    ready: float = 0.0
    #: The seconds for which the start waited for a zygote.
    waited: float = 0.0


def start_record(by: str, times: Times, marked: dict[str, float]) -> dict[str, int | str]:
    """Return the record of a start. `by` is "zygote" or "plain". `marked` are the engine's own marks. Without them, `import_ms` contains
    all the time until the server answered; otherwise it contains imports, configuration and the start of the engine's processes."""
    loading = marked.get(marks.LOADING, times.healthy)
    loaded = marked.get(marks.LOADED, loading)
    cached = marked.get(marks.CACHED, loaded)
    spans = {
        "spawn_ms": times.began - times.asked - times.waited,
        "zygote_ms": times.waited,
        "import_ms": loading - times.began,
        "weights_ms": loaded - loading,
        "kv_ms": cached - loaded,
        # Includes the start of the engine's HTTP server.
        "warmup_ms": times.healthy - cached,
        "first_token_ms": times.generated - times.healthy,
        "adapter_ms": times.resident - times.healthy,
        "total_ms": times.ready - times.asked,
    }
    return {"by": by} | {name: max(0, round(1000 * spans[name])) for name in START_PHASES}


def process_began() -> float:
    """Return the time at which this process started (for a forked process, the time of the fork), by time.monotonic(), to 10 ms."""
    # The 22nd field. The second field, the name in parentheses, may contain anything.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100
    return time.monotonic() - age
