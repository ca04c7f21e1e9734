"""The consequences of the end of an attempt of a line. Pure."""

from dataclasses import dataclass
from enum import StrEnum

from lmaas.errors import AdapterUnavailable, EngineFailed, LmaasError, OverQuota

#: The number of attempts of a line whose engine failed, or whose adapter could not be loaded. Each attempt may have called two engines.
MAX_FAILURES = 3
#: The number of refusals of a line for a spent budget before the ledger is read: other requests may not use all that they have reserved.
MAX_REFUSALS = 3
#: The pause before the next try. It doubles with each, up to the maximum.
PAUSE_S, MAX_PAUSE_S = 1.0, 30.0
#: The codes of errors that count as failures of the engine or the adapter. Others that pass are tried again until the batch's deadline.
_FAILURES = frozenset({EngineFailed.code, AdapterUnavailable.code})


class Next(StrEnum):
    """The next step of a line after an attempt."""

    #: Its answer is stored.
    DONE = "done"
    #: Its error is stored.
    FAILED = "failed"
    #: It is tried again after a pause.
    AGAIN = "again"
    #: It fails with all other lines of its batch that have not begun, if the ledger confirms that the budget is spent.
    STOP = "stop"


@dataclass(slots=True)
class Tries:
    """The history of a line under one lease."""

    tries: int = 0
    failures: int = 0
    refusals: int = 0
    #: The number of times that the ledger had less than the refusals reported.
    only_reserved: int = 0

    @property
    def pause_s(self) -> float:
        """The pause before the next try."""
        return float(min(MAX_PAUSE_S, PAUSE_S * 2 ** (self.tries - 1)))

    def refused(self, error: LmaasError, *, others_run: bool) -> Next:
        """Return what follows from an error before the line was accepted. `others_run` is whether more lines of its tenant run."""
        if isinstance(error, OverQuota) and error.error_code == OverQuota.code:
            # No longer pause at first, because the rest of the batch waits for what this line finds.
            self.tries = 1 + self.only_reserved
            self.refusals = 0 if others_run else self.refusals + 1
            return Next.STOP if self.refusals >= MAX_REFUSALS else Next.AGAIN
        self.tries += 1
        return self.ended(int(error.status), error.error_code, retryable=error.retryable, counted=True)

    def unspent(self) -> None:
        """Note that a budget is only reserved by others, and not spent: some of it may be given back, later."""
        self.refusals = 0
        self.only_reserved += 1
        self.tries = 1 + self.only_reserved

    def ended(self, status: int, code: str | None, *, retryable: bool, counted: bool = False) -> Next:
        """Return the consequence of an answer with this status, whose error has the code and is retryable or not."""
        self.tries += 0 if counted else 1
        if status < 400:
            return Next.DONE
        if not retryable:
            return Next.FAILED
        if code in _FAILURES:
            self.failures += 1
            if self.failures >= MAX_FAILURES:
                return Next.FAILED
        return Next.AGAIN
