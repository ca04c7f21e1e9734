"""The common parts of several measurements: limits, usage events, and the CPU time of a process."""

import psutil

from lmaas.metering.usage import UsageRecord
from lmaas.scheduling.client import LimitedScope
from lmaas.states import UsageStatus

#: Typical limits of a tenant and of a key, high enough to refuse nothing.
SCOPES = (
    LimitedScope("ten_1", "tenant", 10**9, 10**12, 10**6, 10**14, 10**14),
    LimitedScope("key_1", "key", 10**9, None, None, None, None),
)


def record(number: int, tenant: str, round_: int = 0) -> str:
    """Return a usage event in the form that a gateway writes."""
    found = UsageRecord(f"req_{round_:04}{number:028}", tenant, "key_0123456789abcdef", "base", "support-bot", None, None, stream=True)
    found.start("rep_0123456789abcdef", 1, 2)
    found.count({"prompt_tokens": 700, "completion_tokens": 200, "prompt_tokens_details": {"cached_tokens": 300}})
    found.end(UsageStatus.COMPLETED)
    return found.event()


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time that the process has used so far."""
    times = process.cpu_times()
    return float(times.user + times.system)
