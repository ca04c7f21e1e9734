"""One Ray cluster for the tests that add and kill its nodes themselves."""

from collections.abc import Iterator

import pytest

from tests.support.processes import free_port
from tests.system.ray.cluster import Fleet, temporary_ray


@pytest.fixture(scope="session")
def client_port() -> int:
    """The port on which the cluster's head serves Ray clients."""
    return free_port()


@pytest.fixture(scope="session")
def fleet(client_port: int) -> Iterator[Fleet]:
    """A head without nodes that could hold a replica."""
    with temporary_ray() as folder:
        fleet = Fleet(folder, client_port=client_port)
        yield fleet
        fleet.close()
