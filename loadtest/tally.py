"""Figures that Locust's statistics do not keep: errors by their codes, and queue times, which only the service knows."""

import time
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from locust.stats import RequestStats

from lmaas.api import table
from lmaas.errors import ApiError, LmaasError
from loadtest.service import Service

#: The maximum number of requests whose queue time is read.
MAX_REQUESTS = 100_000
#: The time to wait for the ledger, which has the last requests after a second or two.
LEDGER_S = 10.0
PAGE = 1000


class Tally:
    """The errors of a run, and the names under which its requests are reported."""

    def __init__(self) -> None:
        #: By the name of the requests and a code.
        self.errors: Counter[tuple[str, str]] = Counter()
        self._names: dict[str, str] = {}
        # A clock that differs a little from the service's hides no request.
        self._began = datetime.now(UTC) - timedelta(minutes=1)

    def sent(self, request_id: str, name: str) -> None:
        """Record the id of a request."""
        if request_id and len(self._names) < MAX_REQUESTS:
            self._names[request_id] = name

    def add_queue_times(self, service: Service, keys: Collection[str], stats: RequestStats) -> None:
        """Add the queue times of all requests that the ledger has, as the kind `queue`. Those that it lacks after LEDGER_S are left out."""
        missing, deadline = dict(self._names), time.monotonic() + LEDGER_S
        while missing:
            before = len(missing)
            for key in keys:
                self._take(service, key, missing, stats)
            if time.monotonic() > deadline or (len(missing) == before and before < len(self._names)):
                return
            time.sleep(1)

    def _take(self, service: Service, key: str, missing: dict[str, str], stats: RequestStats) -> None:
        client, after = service.client.with_key(key), None
        try:
            while True:
                page = client.send(table.LIST_EVENTS, query={"limit": PAGE, "after": after})
                for event in page["data"]:
                    name = missing.pop(event["request_id"], None)
                    if name is not None:
                        stats.get(name, "queue").log(event["queue_ms"], 0)
                after = page["last_id"]
                if not page["has_more"] or datetime.fromisoformat(page["data"][-1]["created_at"]) < self._began:
                    return
        except (ApiError, LmaasError):
            return  # a key that is not valid has no events, and the run has reported it
        finally:
            client.close()
