"""The programs of `examples/` run as they are, and the page about them shows them as they are."""

import asyncio
import os
import secrets
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lmaas.keys import hash_key, new_key, shown_prefix
from lmaas.store.models import put_base_model
from lmaas.store.tenants import create_key
from lmaas.types import Role
from tests.integration.clients.conftest import Service
from tests.support.adapters import base, config, pack, tensors

ROOT = next(parent for parent in Path(__file__).parents if (parent / "pyproject.toml").exists())
EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.iterdir() if path.name != "README.md")
#: Texts that the output of each program must contain.
PRINTED = {
    "chat.sh": ("data: [DONE]",),
    "openai_chat.py": (" tokens",),
    "openai_chat.mjs": (" tokens",),
    "anthropic_chat.py": (" tokens",),
    "langchain_chat.py": (" tokens",),
    "embeddings.py": ("Paris is the capital of France.", "A sonnet has fourteen lines."),
    "batch.py": ("completed", "France - ", "Italy - ", "Spain - "),
    "background_response.py": ("resp_", "completed"),
}


async def run(program: str, service: Service, folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run an example in an empty folder. Return its exit code and its output."""
    shutil.copy(EXAMPLES / program, folder)
    command = {".py": [sys.executable, "-W", "error"], ".sh": ["sh"], ".mjs": ["node"]}[Path(program).suffix]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "SERVER": service.url,
        "KEY": service.key,
        "MODEL": "base",
        "EMBEDDING_MODEL": "embedder",
        "OPENAI_BASE_URL": service.openai_url,
        "OPENAI_API_KEY": service.key,
        "ANTHROPIC_BASE_URL": service.url,
        "ANTHROPIC_API_KEY": service.key,
        **variables,
    }
    process = await asyncio.create_subprocess_exec(
        *command, program, *arguments, cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode or 0, printed.decode()


@pytest.mark.parametrize("program", [name for name in PRINTED if not name.endswith(".mjs")])
async def test_an_example(service: Service, tmp_path: Path, program: str) -> None:
    code, printed = await run(program, service, tmp_path)
    assert code == 0, printed
    assert all(text in printed for text in PRINTED[program]), printed


async def test_the_example_for_node(packages: Path, service: Service, tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(packages)
    code, printed = await run("openai_chat.mjs", service, tmp_path)
    assert code == 0, printed
    assert " tokens" in printed


async def test_an_adapter_is_uploaded_or_the_reason_is_shown(service: Service, tmp_path: Path) -> None:
    shapes = base("float32")
    model = await service.stack.model(f"base-{secrets.token_hex(3)}")
    await put_base_model(service.stack.db, replace(model, linears={name: list(shape) for name, shape in shapes.linears.items()}))
    key = new_key()
    await create_key(service.stack.db, service.tenant.id, Role.TENANT_ADMIN, "test", hash_key(key), shown_prefix(key))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config(r=4))
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors(shapes)))
    code, printed = await run("upload_adapter.py", service, tmp_path, "uploaded", str(folder), KEY=key, MODEL=model.name)
    assert (code, printed.startswith("uploaded@1 is live: rank 4, ")) == (0, True), printed
    (folder / "adapter_config.json").write_bytes(config(r=4, use_dora=True))
    code, printed = await run("upload_adapter.py", service, tmp_path, "uploaded", str(folder), KEY=key, MODEL=model.name)
    assert (code, printed.startswith("unsupported_adapter: ")) == (1, True), printed


def test_every_example_is_run_and_shown() -> None:
    page = (ROOT / "docs" / "how-to" / "examples.md").read_text()
    assert {*PRINTED, "upload_adapter.py"} == set(PROGRAMS)
    assert [name for name in PROGRAMS if f"{(EXAMPLES / name).read_text()}```\n" not in page] == []
