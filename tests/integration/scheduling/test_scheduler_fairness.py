"""The bound of "Fairness in Serving Large Language Models" (OSDI'24), theorem 4.4, measured from outside on the functions in a real Valkey.

Two tenants that wait throughout get service that differs by at most 2 max(wp Linput, wq M) in any interval: wp and wq are the costs of a
prompt and a completion token, Linput the longest prompt, M the tokens that run at once. Service is by share.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from lmaas.scheduling.client import Beat, Bounds, Ticket
from lmaas.states import Observed
from lmaas.types import TokenCounts
from tests.integration.scheduling.build import KEY
from tests.integration.scheduling.contradictions import READ_POOL, read
from tests.integration.scheduling.model.data import Rules, units
from tests.integration.scheduling.side_by_side import POOL, Direct, answer, library_with
from tests.support.effort import tries

PROMPT, COMPLETION = 20, 30
WAITING = ("p", "q")


@dataclass
class Served:
    """The service of each tenant so far, as the events of its tickets report it."""

    scheduler: Direct
    shares: dict[str, float]
    #: Tenant → tokens of a prompt, most tokens of a completion.
    sizes: dict[str, tuple[int, int]]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(100))
    tickets: dict[str, Ticket] = field(default_factory=dict)
    completions: dict[str, int] = field(default_factory=dict)

    def states(self) -> dict[str, str]:
        stored = read(str(self.scheduler.client.eval(READ_POOL, 1, KEY))).get("tickets", {})
        return {name: json.loads(text)["state"] for name, text in stored.items()}

    def submit(self, tenant: str) -> None:
        prompt, completion = self.sizes[tenant]
        one = Ticket(f"r{next(self.numbers)}", POOL, tenant, "g", "", "", 1, "{}", self.shares[tenant], 0, prompt, completion)
        answer(self.scheduler.submit(one, Bounds(100, 1000)))
        self.tickets[one.id] = one

    def both_wait(self) -> None:
        """Submit tickets for each of the two tenants until it has two in the queue."""
        for tenant in WAITING:
            while [self.tickets[name].tenant for name, state in self.states().items() if state == "queued"].count(tenant) < 2:
                self.submit(tenant)

    def serve(self, pick: int, tokens: int) -> None:
        """Let a running ticket generate this many more tokens; if none, end it."""
        running = sorted(name for name, state in self.states().items() if state == "granted")
        name = running[pick % len(running)]
        most = self.tickets[name].completion_tokens
        self.completions[name] = min(most, self.completions.get(name, 0) + tokens)
        used = TokenCounts(self.tickets[name].prompt_tokens, 0, self.completions[name])
        if tokens and self.completions[name] < most:
            answer(self.scheduler.renew(POOL, [(name, used)]))
        else:
            answer(self.scheduler.release(self.tickets[name], "", None, used))

    def service(self, tenant: str) -> float:
        states = self.states()
        placed = [one for name, one in self.tickets.items() if one.tenant == tenant and states.get(name) != "queued"]
        return sum(units((one.prompt_tokens, 0, self.completions.get(one.id, 0))) for one in placed) / self.shares[tenant]


@pytest.fixture(scope="module")
def direct(valkey_url: str) -> Iterator[Direct]:
    with Redis.from_url(valkey_url, decode_responses=True) as client:
        yield Direct(client, library_with(Rules()))


@settings(max_examples=tries(60), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    slots=st.integers(1, 3),
    shares=st.tuples(*[st.sampled_from([0.5, 1.0, 4.0])] * 3),
    sizes=st.tuples(*[st.tuples(st.integers(1, PROMPT), st.integers(0, COMPLETION))] * 3),
    steps=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0, 1, 10, 30])), min_size=40, max_size=80),
)
def test_two_tenants_that_wait_get_the_same_service_within_the_bound(
    direct: Direct,
    slots: int,
    shares: tuple[float, ...],
    sizes: tuple[tuple[int, int], ...],
    steps: list[tuple[int, int]],
) -> None:
    direct.client.flushall()
    direct.client.mset({"now:s": 1_773_144_000, "now:us": 0})
    answer(direct.heartbeat(POOL, "x", Beat("http://x", slots, 1, Observed.READY, [])))
    served = Served(direct, dict(zip("pqr", shares, strict=True)), dict(zip("pqr", sizes, strict=True)))
    ahead = []
    for pick, tokens in steps:
        served.both_wait()
        ahead.append(served.service("p") - served.service("q"))
        if pick == 9:
            served.submit("r")  # a third tenant that comes and goes
        served.serve(pick, tokens)
    running = slots * max(prompt + completion for prompt, completion in sizes)
    bound = 2 * max(units((PROMPT, 0, 0)), units((0, 0, running))) / min(shares[:2])
    assert max(ahead) - min(ahead) <= bound
