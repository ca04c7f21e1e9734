"""Bursts from zero: all users send a request at the same time while no engine runs. When all are answered, the pool is emptied for the next
burst."""

from typing import ClassVar

from gevent.event import Event
from locust import events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.service import Service
from loadtest.users import ChatUser

EMPTY_WITHIN_S = 120.0


class Gate:
    """Releases users together. The last one to arrive empties the pool and opens the gate."""

    def __init__(self, service: Service, users: int) -> None:
        self._service, self._users, self._waiting, self._opened, self._closed = service, users, 0, Event(), False

    def arrive(self) -> None:
        """Wait until all users have arrived. Raises StopUser once the run ends, SettingsError if the pool cannot be emptied."""
        self._waiting += 1
        if self._waiting < self._users and not self._closed:
            self._opened.wait()
        elif not self._closed:
            self._service.to_zero(EMPTY_WITHIN_S)
            self._open()
        if self._closed:
            raise StopUser

    def close(self, **_: object) -> None:
        """Stop the users that wait, because the run ends."""
        self._closed = True
        self._open()

    def _open(self) -> None:
        opened, self._opened, self._waiting = self._opened, Event(), 0
        opened.set()


class BurstUser(ChatUser):
    """Sends one request in each burst."""

    starts_warm = False
    needs_operator = True
    gate: ClassVar[Gate]

    @task
    def ask(self) -> None:
        """Send a request together with all other users."""
        self.gate.arrive()
        self.chat(self.population.choose(self.chance), "burst cold")


@events.init.add_listener
def begin(environment: Environment, **_: object) -> None:
    """Create the gate for all users of the run."""
    options = environment.parsed_options
    BurstUser.gate = Gate(BurstUser.service, (options and options.num_users) or 1)
    environment.events.test_stopping.add_listener(BurstUser.gate.close)
