"""The command line of an engine of each kind."""

import pytest

from lmaas.engine import launch
from lmaas.engine.launch import EngineSpec, command_line, spec_of
from lmaas.states import PoolKind
from lmaas.store.models import BaseModel


def spec(kind: PoolKind, extra_args: str = "", linears: dict[str, list[int]] | None = None) -> EngineSpec:
    model = BaseModel("mod_1", "x", "/models/x", "float32", linears or {}, 12, 3, 2, 4, 256, 2**20, extra_args, kind)
    return spec_of(model, "m", "127.0.0.1")


def options(spec: EngineSpec) -> dict[str, str]:
    """Return the options and their values; an empty value for a switch."""
    words = command_line(spec, 1)[3:]
    after = [*words[1:], "--"]
    return {word: "" if following.startswith("--") else following for word, following in zip(words, after, strict=True) if word[:2] == "--"}


BOTH = {
    "--model": "/models/x", "--served-model-name": "x", "--host": "127.0.0.1", "--port": "1", "--dtype": "float32",
    "--max-model-len": "256", "--max-num-seqs": "4", "--kv-cache-memory-bytes": "1048576", "--disable-uvicorn-access-log": "",
    "--no-enable-log-requests": "", "--scheduling-policy": "priority",
}  # fmt: skip


LORA = {"--enable-lora": "", "--max-loras": "3", "--max-cpu-loras": "3", "--max-lora-rank": "16"}


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (
            PoolKind.GENERATE,
            LORA
            | {
                "--enable-prompt-tokens-details": "", "--enable-scale-out": "",
                "--enable-auto-tool-choice": "", "--tool-call-parser": "hermes", "--structured-outputs-config": '{"backend":"xgrammar"}',
            },
        ),
        (PoolKind.EMBED, {"--runner": "pooling"}),
    ],
)  # fmt: skip
def test_each_kind_has_its_options(monkeypatch: pytest.MonkeyPatch, cpu: bool, kind: PoolKind, more: dict[str, str]) -> None:
    monkeypatch.setattr(launch, "has_cpu_build", lambda: cpu)
    assert options(spec(kind)) == BOTH | more | ({"--enforce-eager": ""} if cpu else {})


def test_an_engine_that_embeds_takes_adapters_if_its_modules_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "has_cpu_build", lambda: False)
    adapted = spec(PoolKind.EMBED, linears={"encoder.layer.0.output.dense": [2, 3]})
    assert options(adapted) == BOTH | LORA | {"--runner": "pooling"}


@pytest.mark.parametrize(
    ("kind", "fixed"),
    [
        (PoolKind.GENERATE, "--structured-outputs-config"),
        (PoolKind.GENERATE, "--scheduling-policy"),
        (PoolKind.EMBED, "--runner"),
        (PoolKind.EMBED, "--scheduling-policy"),
    ],
)
def test_an_operators_options_come_before_those_that_are_fixed(kind: PoolKind, fixed: str) -> None:
    words = command_line(spec(kind, "--seed 7"), 1)
    assert words.index("--max-num-seqs") < words.index("--seed") < words.index(fixed)
