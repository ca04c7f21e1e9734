"""`lmaas files` against a running service."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.api.test_base_models import lmaas
from tests.integration.gateway.stack import Stack, running


@pytest.fixture
async def stack(postgres_url: str, valkey_url: str, tmp_path: Path) -> AsyncIterator[Stack]:
    async with running(postgres_url, valkey_url, tmp_path / "stack") as stack:
        yield stack


async def test_files(stack: Stack, operator_key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, content = (await stack.tenant()).key, b'{"custom_id": "1"}\n' * 100_000
    source, copies = tmp_path / "größe 1.jsonl", tmp_path / "copies"
    source.write_bytes(content)
    copies.mkdir()
    monkeypatch.chdir(copies)
    code, out, err = await lmaas(stack, key, "--json", "files", "upload", str(source), "--expires-after", "3600")
    assert (code, err) == (0, "")
    file = json.loads(out)
    assert (file["purpose"], file["bytes"], file["filename"]) == ("batch", len(content), source.name)
    assert file["expires_at"] == file["created_at"] + 3600
    # The output for people, which is not JSON.
    for command in (("list",), ("show", file["id"])):
        code, out, _ = await lmaas(stack, key, "files", *command)
        assert code == 0
        assert all(text in out for text in (file["id"], source.name, str(len(content)), "batch"))
    assert json.loads((await lmaas(stack, key, "--json", "files", "list", "--purpose", "evals"))[1]) == []
    # Download under the file's own name, under another name and to standard output, but never over another file.
    for target, path in ((), source.name), (("other.jsonl",), "other.jsonl"):
        code, out, _ = await lmaas(stack, key, "files", "download", file["id"], *target)
        assert (code, (copies / path).read_bytes() == content) == (0, True), out
    code, _, err = await lmaas(stack, key, "files", "download", file["id"])
    assert (code, "exists already. Name another TARGET" in err) == (1, True)
    code, out, _ = await lmaas(stack, key, "files", "download", file["id"], "-")
    assert (code, out.encode() == content) == (0, True)
    assert sorted(path.name for path in copies.iterdir()) == [source.name, "other.jsonl"]
    code, out, _ = await lmaas(stack, key, "files", "delete", file["id"], "--yes")
    assert (code, out) == (0, f"The file '{file['id']}' is deleted.\n")
    for words in (["show"], ["download"], ["delete", "--yes"]):
        code, _, err = await lmaas(stack, key, "files", *words, file["id"])
        assert (code, "The file does not exist" in err) == (1, True)
    assert not (copies / f"{source.name}.partial").exists()
    # Operators do not see files.
    for options in ((), ("--tenant", "acme")):
        code, _, err = await lmaas(stack, operator_key, *options, "files", "list")
        assert (code, "Only a tenant's own key may do this" in err) == (2, True)


async def test_a_tenant_of_this_stack_is_named(stack: Stack, tmp_path: Path) -> None:
    """The only tenant of a stack is found by the key that `lmaas up` keeps for it."""
    acme, home = await stack.tenant(), tmp_path / "home"
    home.mkdir()
    credentials: dict[str, Any] = {"base_url": f"{stack.url}/v1", "operator_key": "sk-none", "tenants": {"acme": {"api_key": acme.key}}}
    (home / "credentials.json").write_text(json.dumps(credentials))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LMAAS_")} | {"LMAAS_HOME": str(home)}

    async def run(*arguments: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "lmaas", *arguments),
            env=environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    assert await run("--json", "--tenant", "acme", "files", "list") == (0, "[]\n", "")
    code, _, err = await run("--tenant", "globex", "files", "list")
    assert (code, "has no key of the tenant 'globex'" in err) == (1, True)
    # A command needs no --tenant if the stack has only one tenant, and needs one if there are several.
    assert await run("--json", "files", "list") == (0, "[]\n", "")
    credentials["tenants"]["globex"] = {"api_key": "sk-lmaas-x"}
    (home / "credentials.json").write_text(json.dumps(credentials))
    code, _, err = await run("files", "list")
    assert (code, "Name the tenant: --tenant NAME. It is one of acme, globex." in err) == (2, True)
