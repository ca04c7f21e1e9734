"""What a process notes about requests beside its metrics: the request log."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from lmaas.config import Settings
from lmaas.http import Ended
from lmaas.inference.request_log import LOGGER, RequestLog
from lmaas.line_writer import LineWriter
from lmaas.observability import Count


@dataclass(frozen=True, slots=True)
class Observers:
    """The request log, None if it is off. `dropped` counts what could not be written, by kind."""

    requests: RequestLog | None = None
    dropped: Mapping[str, Count] = field(default_factory=dict)

    @property
    def ended(self) -> Ended | None:
        """What to call at the end of a client's request."""
        return None if self.requests is None else self.requests.ended


@contextmanager
def observing(settings: Settings) -> Iterator[Observers]:
    """Open what the settings ask for, and write at the end what is left."""
    if not settings.request_log or not logging.getLogger(LOGGER).isEnabledFor(logging.INFO):
        yield Observers()
        return
    with LineWriter() as lines:
        yield Observers(RequestLog(lines.add), {"log_line": lambda: lines.dropped})
