"""Replays a trace with each arrangement of engines in turn."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from redis import Redis

from lmaas.control.autoscaler import Policy
from lmaas.simulation.clock import Clock
from lmaas.simulation.pool import Pool
from lmaas.simulation.profile import Profile
from lmaas.simulation.queue import Queue
from lmaas.simulation.scaling import Scaling
from lmaas.simulation.tally import Tally, percentile
from lmaas.simulation.trace import Request, Trace

MS_PER_HOUR = 3_600_000
#: Progress is reported once for so many requests.
REPORT_EVERY = 100


class Arrangement(StrEnum):
    """The arrangements: which tenants have their own engines, and when these run."""

    ALWAYS_ON = "always-on per tenant"
    SCALE_TO_ZERO = "scale-to-zero per tenant"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class Options:
    """The parameters of a simulation. The idle timeout is the same for all arrangements. Only the shared pool may have more than one
    engine.

    `engine_price` is in micro-dollars per hour of an engine. A request that has waited for `deadline_s` expires.
    """

    profile: Profile = field(default_factory=Profile)
    idle_timeout_s: float = 300.0
    max_replicas: int = 8
    max_queued: int = 20_000
    deadline_s: float = 300.0
    engine_price: int = 400_000

    def policy(self, arrangement: Arrangement) -> Policy:
        """Return the autoscaler's bounds."""
        low = 1 if arrangement is Arrangement.ALWAYS_ON else 0
        high = self.max_replicas if arrangement is Arrangement.SHARED else 1
        return Policy(low, high, self.idle_timeout_s, self.profile.slots)


@dataclass(frozen=True, slots=True)
class Result:
    """The cost and the latencies of an arrangement. TTFTs are sorted."""

    arrangement: Arrangement
    tally: Tally
    engine_price: int
    ttft_s: list[float]

    @property
    def cost_microusd(self) -> int:
        """The price of the engines' time."""
        return round(round(self.tally.engine_s * 1000) * self.engine_price / MS_PER_HOUR)

    def ttft_percentile_s(self, percent: float) -> float:
        """Return this percentile of the times to first token."""
        return percentile(self.ttft_s, percent)


def replay(
    trace: Trace, arrangement: Arrangement, options: Options, redis: Redis, progress: Callable[[int], None] = lambda _: None
) -> Result:
    """Replay every request of the trace at its time, with an empty queue. `progress` is called with the number of requests submitted so
    far."""
    redis.flushall()
    clock, tally = Clock(), Tally()
    queue = Queue(redis, lambda: clock.now_s)
    open_pool = partial(_pool, clock, queue, tally, options, arrangement)
    pools: dict[str, Pool] = {}
    if arrangement is Arrangement.ALWAYS_ON:
        pools = {tenant: open_pool(tenant) for tenant in trace.tenants}
    _feed(iter(trace), 0, clock, partial(_submit, pools, open_pool, arrangement), progress)
    clock.run()
    for pool in pools.values():
        # An engine that is always on is paid for the trace's own time, however long its last requests wait. A trace of one request has
        # none.
        pool.close(trace.span_s or tally.last_s)
    return Result(arrangement, tally, options.engine_price, sorted(tally.ttft_s))


def _pool(clock: Clock, queue: Queue, tally: Tally, options: Options, arrangement: Arrangement, name: str) -> Pool:
    scaling = Scaling(options.policy(arrangement))
    return Pool(name, clock, queue, scaling, options.profile, tally, max_queued=options.max_queued, deadline_s=options.deadline_s)


def _submit(pools: dict[str, Pool], open_pool: Callable[[str], Pool], arrangement: Arrangement, number: int, request: Request) -> None:
    name = "all" if arrangement is Arrangement.SHARED else request.tenant
    if name not in pools:
        pools[name] = open_pool(name)
    pools[name].submit(str(number), request)


def _feed(
    requests: Iterator[Request], number: int, clock: Clock, submit: Callable[[int, Request], None], progress: Callable[[int], None]
) -> None:
    """Submit the next request at its time, and only then read the one after it."""
    request = next(requests, None)
    if request is None:
        return

    def come() -> None:
        submit(number, request)
        if number % REPORT_EVERY == 0:
            progress(number)
        _feed(requests, number + 1, clock, submit, progress)

    clock.at(request.at_s, come)
