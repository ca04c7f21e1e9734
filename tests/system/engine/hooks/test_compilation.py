"""The supervisor's notes of vLLM's compilations."""

# ruff: noqa: SLF001 (the hook changes a method of vLLM that begins with an underscore)

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar

from lmaas.engine import hooks
from lmaas.engine.compiling import VARIABLE, running
from lmaas.engine.hooks import compilation, validation
from tests.support.conditions import until


class Backend:
    """A backend that compiles until it may stop."""

    def __init__(self) -> None:
        self.may_stop = threading.Event()

    def compile_grammar(self, kind: object, text: object, stop_token_ids: object) -> str:
        """Compile."""
        assert self.may_stop.wait(60)
        return f"{kind} {text}"

    def compile_pattern(self, pattern: str) -> str:
        """Compile."""
        assert self.may_stop.wait(60)
        return pattern


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the notes, while the hook is installed."""
    monkeypatch.setattr(StructuredOutputManager, "_create_grammar", StructuredOutputManager._create_grammar)
    monkeypatch.setattr(backend_xgrammar, "compile_regex_with_timeout", backend_xgrammar.compile_regex_with_timeout)
    compilation.install()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "notes"))
    return tmp_path / "notes"


def create(backend: Backend) -> Any:
    request = SimpleNamespace(structured_output_request=SimpleNamespace(structured_output_key=("json", "{}")), sampling_params=None)
    return StructuredOutputManager._create_grammar(SimpleNamespace(backend=backend), request)


async def test_a_grammar_is_noted_until_it_is_compiled(noted: Path) -> None:
    backend, made = Backend(), []
    threads = [threading.Thread(target=lambda: made.append(create(backend))) for _ in range(2)]
    for thread in threads:
        thread.start()
    await until(lambda: len(running(noted, time.monotonic())) == 2)
    backend.may_stop.set()
    for thread in threads:
        thread.join()
    assert made == ["json {}"] * 2
    assert running(noted, time.monotonic()) == []


async def test_a_pattern_is_noted_after_vllm_has_given_up(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_REGEX_COMPILATION_TIMEOUT_S", "1")
    backend = Backend()
    with pytest.raises(ValueError, match="timed out"):
        backend_xgrammar.compile_regex_with_timeout(backend.compile_pattern, "a")
    assert len(running(noted, time.monotonic())) == 1
    backend.may_stop.set()
    await until(lambda: running(noted, time.monotonic()) == [])
    assert backend_xgrammar.compile_regex_with_timeout(backend.compile_pattern, "b") == "b"


def test_nothing_is_noted_where_nothing_is_asked_for(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    backend = Backend()
    backend.may_stop.set()
    assert create(backend) == "json {}"
    assert not noted.exists()


def test_a_folder_that_cannot_be_made_stops_nothing(noted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    noted.write_text("a file")
    backend = Backend()
    backend.may_stop.set()
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    assert [create(backend), create(backend)] == ["json {}"] * 2
    assert caplog.text.count("not watched") == 1


def test_another_vllm_runs_without_the_hooks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(hooks.records, "install", lambda: None)
    monkeypatch.delattr(StructuredOutputManager, "_create_grammar")
    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", backend_xgrammar.validate_xgrammar_grammar)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hooks.install()
    assert caplog.text.count("has no place for lmaas.engine.hooks.compilation") == 1
    assert hasattr(backend_xgrammar.validate_xgrammar_grammar, "_lmaas_validation")
    assert validation.__name__ not in caplog.text
