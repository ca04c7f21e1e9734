"""An engine that compiles one grammar for ever is replaced, while requests without a grammar are served."""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError

from tests.system.e2e.conftest import MODEL, ROOT, Stack, started, wait_for

WORD = "never_compiled"
#: A plugin of vLLM, which exists only in this test: in the engine core, a grammar with the word above is computed without an end. The
#: computation releases Python's lock, as xgrammar does.
PLUGIN = f"""
import hashlib, multiprocessing

def register():
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend
    compile_grammar = XgrammarBackend.compile_grammar
    def hang(self, kind, text, **more):
        if {WORD!r} in text and multiprocessing.current_process().name.startswith("EngineCore"):
            while True:
                hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)
        return compile_grammar(self, kind, text, **more)
    XgrammarBackend.compile_grammar = hang
"""


@pytest.fixture
def fragile(tmp_path: Path, model_folder: Path) -> Iterator[Stack]:
    """A stack whose engines can be made to hang."""
    assert model_folder.exists()
    plugin = tmp_path / "plugin"
    metadata = plugin / "hang-1.0.dist-info"
    metadata.mkdir(parents=True)
    (plugin / "hang_in_engine.py").write_text(PLUGIN)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hang\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nhang = hang_in_engine:register\n")
    path = os.pathsep.join([str(plugin), str(ROOT)])
    with started(tmp_path / "home", tmp_path / "up.log", PYTHONPATH=path) as stack:
        yield stack


def grammar(name: str) -> dict[str, Any]:
    """Return a request's grammar: an object with one property."""
    schema = {"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name], "additionalProperties": False}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}}


def fits(answer: str, name: str) -> bool:
    """Return whether an output fits that grammar."""
    found = json.loads(answer)
    return list(found) == [name] and isinstance(found[name], bool)


async def test_an_engine_that_compiles_for_ever_is_replaced(fragile: Stack) -> None:
    await asyncio.to_thread(fragile.warm)
    (first,) = [row["id"] for row in fragile.replicas()]
    async with fragile.async_openai("acme") as acme, fragile.async_openai("globex") as globex:

        async def ask(name: str) -> str:
            try:
                done = await globex.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": "Yes?"}], max_tokens=60, temperature=0, extra_body=grammar(name)
                )
            except APIStatusError as error:
                return f"{error.status_code} {error.message}"
            return str(done.choices[0].message.content)

        async def plain() -> str:
            done = await acme.completions.create(model=MODEL, prompt="One two", max_tokens=5, extra_body={"ignore_eos": True})
            return str(done.model)

        assert fits(await ask("innocent"), "innocent")
        stuck = [asyncio.create_task(ask(name)) for name in (WORD, "another")]
        served = 0
        while not all(task.done() for task in stuck):
            assert await plain() == MODEL
            served += 1
        assert served > 3
        for answer in await asyncio.gather(*stuck):
            assert answer.startswith("502 ")
            assert "Simplify its schema" in answer
        assert fits(await ask("another"), "another")

    def ended() -> list[dict[str, Any]]:
        return [row for row in fragile.cli("replica", "list", "--ended") if row["id"] == first and row["reason"]]

    (row,) = wait_for(ended, 60, "the first replica has ended")
    assert row["observed"] == "failed"
    assert "compiling one grammar" in row["reason"]
    wait_for(lambda: len(fragile.engines()) == 1, 60, "its engine is gone")
