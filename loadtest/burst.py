"""Burst from zero: all users ask at the same moment while no engine runs; once all are answered the pool is emptied, and again."""

from typing import ClassVar

from gevent.event import Event
from locust import events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.service import Service
from loadtest.users import ChatUser

EMPTY_WITHIN_S = 120.0


class Gate:
    """Lets users through all at once: the last one to arrive empties the pool and opens it."""

    def __init__(self, service: Service, users: int) -> None:
        self._service, self._users, self._waiting, self._opened, self._closed = service, users, 0, Event(), False

    def arrive(self) -> None:
        """Wait for all the others. Raises StopUser once the run ends, SettingsError if the pool cannot be emptied."""
        self._waiting += 1
        if self._waiting < self._users and not self._closed:
            self._opened.wait()
        elif not self._closed:
            self._service.to_zero(EMPTY_WITHIN_S)
            self._open()
        if self._closed:
            raise StopUser

    def close(self, **_: object) -> None:
        """The run ends: who waits goes home."""
        self._closed = True
        self._open()

    def _open(self) -> None:
        opened, self._opened, self._waiting = self._opened, Event(), 0
        opened.set()


class BurstUser(ChatUser):
    """One request a burst."""

    starts_warm = False
    gate: ClassVar[Gate]

    @task
    def ask(self) -> None:
        """One request, with all the others."""
        self.gate.arrive()
        self.chat(self.population.choose(self.chance), "burst cold")


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    """A gate for all the users that will be."""
    options = environment.parsed_options
    BurstUser.gate = Gate(BurstUser.service, (options and options.num_users) or 1)
    environment.events.test_stopping.add_listener(BurstUser.gate.close)
