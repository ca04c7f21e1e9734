"""Noisy neighbour: one tenant floods, others ask now and then. For the first third of the run the polite ones are alone, to compare."""

import time

import gevent
from locust import between, constant, events, task
from locust.env import Environment

from loadtest.users import ChatUser

POLITE_USERS = 4
#: So that the flood meets its limit soon; a tenant's default is higher.
FLOOD_MAX_QUEUED = 8
RUN_S = 60


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    """The tenant that floods gets a short queue, if it was made for the run."""
    options = environment.parsed_options
    if options and options.tenants:
        flooder = ChatUser.population.tenants[0]
        ChatUser.service.operator.call("PATCH", f"/admin/v1/tenants/{flooder}", json={"max_queued": FLOOD_MAX_QUEUED})


class NoisyUser(ChatUser):
    """What both sorts share: when the flood begins."""

    abstract = True

    def on_start(self) -> None:
        """All users start at once, and so agree on the moment."""
        options = self.environment.parsed_options
        self.flood_at = time.monotonic() + ((options and options.run_time) or RUN_S) / 3


class PoliteUser(NoisyUser):
    """One of the other tenants."""

    fixed_count = POLITE_USERS
    wait_time = between(0.2, 1.0)

    @task
    def ask(self) -> None:
        """One request, named after the time it was made in."""
        target = self.population.choose(self.chance, self.population.tenants[1:])
        self.chat(target, "noisy polite, alone" if time.monotonic() < self.flood_at else "noisy polite, flooded")


class FloodUser(NoisyUser):
    """The tenant that floods: it asks again at once, whatever it is told."""

    expects_429 = True
    wait_time = constant(0.02)

    @task
    def ask(self) -> None:
        """One request, once it is time."""
        gevent.sleep(max(0.0, self.flood_at - time.monotonic()))
        self.chat(self.population.choose(self.chance, self.population.tenants[:1]), "noisy flood")
