"""A Valkey for simulations, and a way to replay a few requests."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from redis import Redis

from lmaas.simulation.profile import Profile
from lmaas.simulation.replay import Arrangement, Options, Result, replay
from lmaas.simulation.trace import Request, Trace
from tests.support.profiles import ROUND

TEN_SECONDS = Options(profile=ROUND, idle_timeout_s=10.0, max_replicas=1)

Replay = Callable[..., Result]


def trace(*requests: Request) -> Trace:
    """Return these requests as a trace."""
    made = Trace()
    for one in requests:
        made.add(one.at_s, one.tenant, one.adapter, one.prompt_tokens, one.completion_tokens)
    return made.ordered()


@pytest.fixture
def server(valkey_url: str) -> Iterator[Redis]:
    """Return the session's Valkey for a simulation."""
    client = Redis.from_url(valkey_url, decode_responses=True)
    yield client
    client.flushall()
    client.close()


@pytest.fixture
def play(server: Redis) -> Replay:
    """Replay requests with the profile of round numbers. Other options, including those of the profile, are given by name."""
    return partial(_play, server)


def _play(server: Redis, arrangement: Arrangement, *requests: Request, **given: Any) -> Result:
    of_profile = {name: value for name, value in given.items() if name in Profile.__slots__}
    rest = {name: value for name, value in given.items() if name not in of_profile}
    options = replace(TEN_SECONDS, profile=replace(ROUND, **of_profile), **rest)
    return replay(trace(*requests), arrangement, options, server)
