"""Keeps servers and engines out of the unit tier: a test that requests or starts one fails."""

import sys
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import httpx
import pytest

from lmaas.store.database import Database
from tests.unit.unreachable import OPERATOR, TENANT, UnreachableGateway, unreachable_gateway

#: Words in a command line that starts a server or an engine.
PROGRAMS = {"initdb", "pg_ctl", "postgres", "redis-server", "valkey-server", "vllm"}
MODULES = {"lmaas.testing.fake_engine", "lmaas.engine.zygote.server", "vllm.entrypoints.openai.api_server"}
#: Libraries whose import takes seconds.
LIBRARIES = {"peft", "ray", "torch", "transformers", "vllm"}

_guarded = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event == "import":
        if arguments[0] in LIBRARIES:
            pytest.fail(f"A unit test imports {arguments[0]}, which takes seconds. Move the test to tests/system.")
    elif event == "subprocess.Popen":
        words = [str(word) for word in (arguments[0], *arguments[1])]
        for word in words:
            if word in MODULES or PurePath(word).name in PROGRAMS:
                pytest.fail(f"A unit test starts {word}. Move the test to tests/integration or tests/system.")


sys.addaudithook(_audit)


@contextmanager
def _guard() -> Iterator[None]:
    global _guarded  # noqa: PLW0603 - an audit hook cannot be removed, so it is switched on and off
    _guarded = True
    try:
        yield
    finally:
        _guarded = False


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Collect the tests of this folder under guard."""
    with _guard():
        return (yield)


def _under_guard(item: pytest.Item) -> Generator[None, None, None]:
    with _guard():
        return (yield)


#: The fixtures and the body of every test of this folder.
pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_under_guard)
pytest_runtest_call = pytest.hookimpl(wrapper=True)(_under_guard)
pytest_runtest_teardown = pytest.hookimpl(wrapper=True)(_under_guard)


@pytest.fixture(autouse=True)
def _no_library() -> Iterator[None]:
    """Detect an import without an `import` statement, which the hook does not see."""
    before = LIBRARIES & sys.modules.keys()
    yield
    if new := LIBRARIES & sys.modules.keys() - before:
        pytest.fail(f"A unit test imports {', '.join(sorted(new))}, which takes seconds. Move the test to tests/system.")


@pytest.fixture
async def no_database() -> AsyncIterator[Database]:
    """A database that cannot be reached, for code that does not need one or must work without it."""
    database = Database("postgresql://nobody@127.0.0.1:1/none")
    yield database
    await database.close()


@pytest.fixture(scope="module")
async def gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[UnreachableGateway]:
    """A gateway without a database and a queue, for requests that it refuses without them."""
    async with unreachable_gateway(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
async def operator(gateway: UnreachableGateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of that gateway with an operator's key."""
    async with gateway.client(OPERATOR) as client:
        yield client


@pytest.fixture
async def tenant(gateway: UnreachableGateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of that gateway with the key of a tenant's administrator."""
    async with gateway.client(TENANT) as client:
        yield client


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """Fail a test that requests a database."""
    pytest.fail("A unit test asks for Postgres. Move the test to tests/integration.")


@pytest.fixture(scope="session")
def valkey_url() -> str:
    """Fail a test that requests a Valkey."""
    pytest.fail("A unit test asks for Valkey. Move the test to tests/integration.")


@pytest.fixture(scope="session")
def model_folder() -> str:
    """Fail a test that requests the default base model, whose preparation takes half a minute."""
    pytest.fail("A unit test asks for the default base model. Move the test to tests/integration.")
