"""What tokens cost a tenant. Money is whole picodollars (10⁻¹² $) until it is shown, and rounded once, after summing."""

from dataclasses import dataclass

from lmaas.states import UsageStatus

PICOUSD_PER_MICROUSD = 1_000_000
#: Who pays for what was made for them: also who left, and whose answer was cut. A request that was never delivered used nothing.
CHARGED = frozenset({UsageStatus.COMPLETED, UsageStatus.ABORTED, UsageStatus.FAILED, UsageStatus.LOST})


@dataclass(frozen=True, slots=True)
class Prices:
    """Micro-dollars per million tokens; times tokens, that is a whole number of picodollars."""

    prompt: int
    #: Prompt tokens that the engine had in its prefix cache.
    cached: int
    completion: int


def charge_picousd(prices: Prices, status: UsageStatus, prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> int:
    """The charge of one request, in picodollars, for the tokens that the engine counted; cached ones are among the prompt's."""
    if status not in CHARGED:
        return 0
    cached = min(cached_tokens, prompt_tokens)
    return (prompt_tokens - cached) * prices.prompt + cached * prices.cached + completion_tokens * prices.completion


def microusd(picousd: int) -> int:
    """Whole micro-dollars, halves up."""
    return (2 * picousd + PICOUSD_PER_MICROUSD) // (2 * PICOUSD_PER_MICROUSD)
