"""The dtype in which an engine computes, and the process that chooses it."""

from typing import Any

import pytest

from lmaas.engine import launch, source
from lmaas.engine.launch import EngineSpec, command_line
from lmaas.engine.source import engine_dtype
from lmaas.store.models import BaseModel


def spec(dtype: str) -> EngineSpec:
    return EngineSpec("m", "/models/x", "x", dtype, 2048, 4, 2, 16, 4, 2**20)


@pytest.mark.parametrize(
    ("asked", "cpu", "engine", "config", "kept", "started"),
    [
        ("auto", True, True, {"dtype": "bfloat16"}, "float32", "float32"),
        ("auto", False, True, {"dtype": "float16"}, "float16", "float16"),
        ("auto", False, True, {"torch_dtype": "bfloat16"}, "bfloat16", "bfloat16"),
        # A gateway's image has no engine, and must not choose for machines that it does not know.
        ("auto", False, False, {"dtype": "bfloat16"}, "auto", None),
        ("bfloat16", True, True, {}, "bfloat16", "bfloat16"),
        ("float32", False, False, {}, "float32", "float32"),
    ],
)
def test_what_is_registered(
    monkeypatch: pytest.MonkeyPatch, asked: str, cpu: bool, engine: bool, config: dict[str, Any], kept: str, started: str | None
) -> None:
    monkeypatch.setattr(source, "has_cpu_build", lambda: cpu)
    monkeypatch.setattr(launch, "has_cpu_build", lambda: cpu)
    monkeypatch.setattr(source, "has_engine", lambda: engine)
    assert engine_dtype(asked, config) == kept
    if started is not None:
        command = command_line(spec(kept), 1)
        assert command[command.index("--dtype") + 1] == started


@pytest.mark.parametrize(("cpu", "started"), [(True, "float32"), (False, "auto")])
def test_an_engine_decides_where_the_gateway_could_not(monkeypatch: pytest.MonkeyPatch, cpu: bool, started: str) -> None:
    monkeypatch.setattr(launch, "has_cpu_build", lambda: cpu)
    command = command_line(spec("auto"), 1)
    assert command[command.index("--dtype") + 1] == started


def test_an_adapter_must_fit_whatever_that_will_be() -> None:
    model = BaseModel("mod_1", "x", "/models/x", "auto", {"a": [2, 3]}, 8, 1, 1, 1, 16, 1, "")
    assert model.shapes.dtype == "float16"
