"""A zygote for the tests: real vLLM in memory, one for the module."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lmaas.engine.launch import VLLM, EngineSpec
from tests.system.engine.zygote.place import Place, zygote_in


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    """A home folder whose zygote has imported everything."""
    async with zygote_in(tmp_path_factory.mktemp("home")) as there:
        yield there


@pytest.fixture
def spec(model_folder: Path) -> EngineSpec:
    """A small engine."""
    return EngineSpec(VLLM, str(model_folder), "base", "float32", 512, 4, 2, 16, 4, 64 * 1024 * 1024)
