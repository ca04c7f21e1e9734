"""Noisy neighbour: one tenant floods the service while others send occasional requests. For comparison, the first third has no flood."""

import time

import gevent
from locust import between, constant, events, task
from locust.env import Environment

from lmaas.api.table import CHANGE_TENANT
from loadtest.users import ChatUser

POLITE_USERS = 4
#: A low limit, which the flood reaches soon.
FLOOD_MAX_QUEUED = 8
RUN_S = 60


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    """Give the flooding tenant a short queue, if it was created for this run."""
    options = environment.parsed_options
    if options and options.tenants:
        flooder = ChatUser.population.tenants[0]
        ChatUser.service.operator.send(CHANGE_TENANT, {"max_queued": FLOOD_MAX_QUEUED}, tenant=flooder)


class NoisyUser(ChatUser):
    """Base class of both kinds of users: the time at which the flood begins."""

    abstract = True
    least_tenants = 2

    def on_start(self) -> None:
        """Record the start, which is the same for all users."""
        options = self.environment.parsed_options
        self.flood_at = time.monotonic() + ((options and options.run_time) or RUN_S) / 3


class PoliteUser(NoisyUser):
    """A user of one of the other tenants."""

    fixed_count = POLITE_USERS
    wait_time = between(0.2, 1.0)

    @task
    def ask(self) -> None:
        """Send a request, reported under the part of the run in which it began."""
        target = self.population.choose(self.chance, self.population.tenants[1:])
        self.chat(target, "noisy polite, alone" if time.monotonic() < self.flood_at else "noisy polite, flooded")


class FloodUser(NoisyUser):
    """A user of the flooding tenant, which sends the next request immediately after any response."""

    expects_429 = True
    wait_time = constant(0.02)

    @task
    def ask(self) -> None:
        """Send a request after the flood has begun."""
        gevent.sleep(max(0.0, self.flood_at - time.monotonic()))
        self.chat(self.population.choose(self.chance, self.population.tenants[:1]), "noisy flood")
