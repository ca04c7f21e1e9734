"""Soak test: half of the clients disconnect at random times. The gateway must not keep anything of their requests."""

import time

import gevent
from gevent import Greenlet
from locust import between, events, task
from locust.env import Environment

from loadtest.users import ChatUser

CUT_SHARE = 0.5
#: The range of times after which a client disconnects, with equal probability per decade: in the queue, before the first token, in
#: mid-stream.
CUT_S = (0.002, 5.0)
SAMPLE_S = 1.0
#: The time within which a cut request disappears. The gateway aborts it on the engine, and waits up to 3 s.
GONE_WITHIN_S = 10.0


class SoakUser(ChatUser):
    """A user that cuts half of its requests."""

    wait_time = between(0.05, 0.5)

    @task
    def ask(self) -> None:
        """Send a request, and cut half of them."""
        target = self.population.choose(self.chance)
        low, high = CUT_S
        cut_after_s = low * (high / low) ** self.chance.random() if self.chance.random() < CUT_SHARE else None
        self.chat(target, f"soak {target.kind}", cut_after_s)


class Watch:
    """Samples the gateway's requests in flight, and checks at the end that none is left. The service must have no other users."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._sampling: Greenlet[..., None] = gevent.spawn(self._sample)

    def _sample(self) -> None:
        while True:
            self._environment.stats.get("in flight", "count").log(ChatUser.service.in_flight(), 0)
            gevent.sleep(SAMPLE_S)

    def end(self, **_: object) -> None:
        """Wait until nothing is in flight, after all users have stopped. A request that stays and a sampling that failed are failures."""
        problem: Exception | None = None if not self._sampling.dead else Exception(f"/metrics failed: {self._sampling.exception!r}")
        self._sampling.kill()
        began = time.monotonic()
        while left := ChatUser.service.in_flight():
            if time.monotonic() - began > GONE_WITHIN_S:
                problem = Exception(f"{left} requests are still in flight")
                break
            gevent.sleep(0.1)
        self._environment.events.request.fire(
            request_type="check",
            name="nothing left in flight",
            response_time=1000 * (time.monotonic() - began),
            response_length=0,
            exception=problem,
            context={},
        )


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    """Watch from the start to the end."""

    def watch(**_: object) -> None:
        environment.events.test_stop.add_listener(Watch(environment).end)

    environment.events.test_start.add_listener(watch)
