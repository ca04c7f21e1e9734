"""Turns the results of a simulation into rows of numbers, for a table, JSON or a chart."""

import math
from collections.abc import Sequence
from typing import Any

from lmaas.simulation.replay import Arrangement, Result

#: The columns of the table; JSON has all.
COLUMNS = (
    "arrangement",
    "engine_s",
    "cost_microusd",
    "of_always_on",
    "busy",
    "most_engines",
    "starts",
    "cold_requests",
    "ttft_p50_s",
    "ttft_p95_s",
    "ttft_p99_s",
    "expired",
    "refused",
)
PERCENTILES = (50, 95, 99)
#: The part of the requests that may go without an answer before the report warns.
MAX_UNSERVED = 0.1


def row(result: Result, always_on_s: float | None) -> dict[str, Any]:
    """One arrangement. `of_always_on` is its engine time ÷ that of one engine per tenant that never stops; None if that was not simulated.

    `busy` is the part of the engines' time in which something ran, at most 1: the last requests of a saturated trace run after its end. A
    percentile of nothing is None.
    """
    tally = result.tally
    percentiles = {f"ttft_p{percent}_s": _rounded(result.ttft_percentile_s(percent)) for percent in PERCENTILES}
    return {
        "arrangement": str(result.arrangement),
        "engine_s": round(tally.engine_s, 1),
        "cost_microusd": result.cost_microusd,
        "of_always_on": _rounded(tally.engine_s / always_on_s, 4) if always_on_s else None,
        "busy": _rounded(min(1.0, tally.busy_s / tally.engine_s)) if tally.engine_s else None,
        "most_engines": tally.most_engines(),
        "starts": tally.starts,
        "cold_requests": tally.cold_requests,
        **percentiles,
        "completed": tally.completed,
        "expired": tally.expired,
        "refused": tally.refused,
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tally.completion_tokens,
    }


def rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """One row for each arrangement."""
    always_on = next((result.tally.engine_s for result in results if result.arrangement is Arrangement.ALWAYS_ON), None)
    return [row(result, always_on) for result in results]


def warnings(results: Sequence[Result], max_replicas: int, deadline_s: float) -> list[str]:
    """Return a sentence for each arrangement that left too many requests without an answer: its cost is that of less work."""
    found = []
    for result in results:
        tally = result.tally
        unserved, total = tally.expired + tally.refused, tally.completed + tally.expired + tally.refused
        if total and unserved / total >= MAX_UNSERVED:
            engines = f"{max_replicas} engines" if result.arrangement is Arrangement.SHARED else "one engine for each tenant"
            advice = "Raise --max-replicas, or" if result.arrangement is Arrangement.SHARED else "To compare like with like,"
            found.append(
                f"{result.arrangement}: {unserved:,} of {total:,} requests ({unserved / total:.1%}) had no answer within {deadline_s:g} s, "
                f"because {engines} cannot do this work. The cost is that of less work. {advice} simulate a --sample of the trace."
            )
    return found


def _rounded(value: float, digits: int = 3) -> float | None:
    return None if math.isnan(value) else round(value, digits)
