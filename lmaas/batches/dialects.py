"""The two APIs for batches: their limits, and what their ids begin with."""

from collections.abc import Mapping
from dataclasses import dataclass

from lmaas.states import Dialect

_DAY_S = 86_400
#: The time in which a batch has to end, and its name in OpenAI's API.
WINDOW_S, WINDOW = _DAY_S, "24h"
#: The endpoints of OpenAI's batches.
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")


@dataclass(frozen=True, slots=True)
class BatchForm:
    """The limits and rules of one API's batches. `results_expire_after_s` is the time for which result files are kept by default."""

    id_prefix: str
    lines: int
    file_bytes: int
    results_expire_after_s: int


FORMS: Mapping[Dialect, BatchForm] = {
    Dialect.OPENAI: BatchForm("batch", lines=50_000, file_bytes=200_000_000, results_expire_after_s=30 * _DAY_S),
    Dialect.ANTHROPIC: BatchForm("msgbatch", lines=100_000, file_bytes=256_000_000, results_expire_after_s=29 * _DAY_S),
}
