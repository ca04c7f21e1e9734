"""Libraries for Node: those of OpenAI and Anthropic, and Vercel's AI SDK. Each file in `node` is a test for Node's own test runner."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from tests.integration.clients.conftest import NODE, Service


@pytest.mark.parametrize("name", sorted(file.name for file in NODE.glob("*.mjs")))
async def test_a_library(packages: Path, service: Service, tmp_path: Path, name: str) -> None:
    # Node looks for packages beside the file.
    (tmp_path / "node_modules").symlink_to(packages)
    shutil.copy(NODE / name, tmp_path)
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OPENAI_BASE_URL": service.openai_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.url,
        "ANTHROPIC_API_KEY": service.key,
    }
    command = ["node", "--test-reporter=tap", name]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, env=variables, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 0, output.decode()
    assert b"\n# fail 0\n" in output
    assert b"\n# pass 0\n" not in output
