"""Limits on the simultaneous work of a tenant in one process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lmaas.errors import OverLimit

#: After this time a client may try again what the tenant does too often at once.
RETRY_S = 5


class Slots:
    """Counts what each tenant does at the same time, at most `most`. `what` names it in the plural, `code` is that of the error."""

    def __init__(self, most: int, what: str, code: str) -> None:
        self._most, self._what, self._code = most, what, code
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant_id: str) -> Iterator[None]:
        """Count one for the block. Raises OverLimit if the tenant has as many as it may."""
        if self._taken[tenant_id] >= self._most:
            raise OverLimit(
                f"This tenant has {self._most} {self._what} under way, the maximum. Retry after {RETRY_S} s.",
                code=self._code,
                retry_after_s=RETRY_S,
            )
        self._taken[tenant_id] += 1
        try:
            yield
        finally:
            self._taken[tenant_id] -= 1
            if not self._taken[tenant_id]:
                del self._taken[tenant_id]
