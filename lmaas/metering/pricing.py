"""Charges for tokens. Money is whole picodollars (10⁻¹² $) until it is shown, and is rounded once, after summing."""

from dataclasses import dataclass

from lmaas.states import UsageStatus

PICOUSD_PER_MICROUSD = 1_000_000
#: The statuses of requests that are charged for their tokens, including those whose client disconnected or whose response was cut.
CHARGED = frozenset({UsageStatus.COMPLETED, UsageStatus.ABORTED, UsageStatus.FAILED, UsageStatus.LOST})


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in micro-dollars per million tokens. A price times tokens is a whole number of picodollars."""

    prompt: int
    #: Prompt tokens that the engine found in its prefix cache.
    cached: int
    completion: int


def charge_picousd(prices: Prices, status: UsageStatus, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
    """Return the charge of one request in picodollars. Cached tokens are a part of the prompt's tokens."""
    if status not in CHARGED:
        return 0
    cached = min(cached_tokens, prompt_tokens)
    return (prompt_tokens - cached) * prices.prompt + cached * prices.cached + completion_tokens * prices.completion


def microusd(picousd: int) -> int:
    """Return whole micro-dollars, rounded half up."""
    return (2 * picousd + PICOUSD_PER_MICROUSD) // (2 * PICOUSD_PER_MICROUSD)
