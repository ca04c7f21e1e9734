"""Makes an engine's processes note which grammars they compile, so that the supervisor can find a compilation that never ends."""

import functools
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lmaas.engine.compiling import VARIABLE, Notes

log = logging.getLogger("vllm.lmaas.hooks")


def install() -> None:
    """Wrap vLLM's compilation of grammars in the engine core, and its compilation of patterns, which each process runs in a separate
    thread."""
    from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar  # noqa: PLC0415 (only inside an engine)

    create, with_timeout = StructuredOutputManager._create_grammar, backend_xgrammar.compile_regex_with_timeout
    if hasattr(create, "_lmaas_compilation"):
        return
    noted = _noter()

    @functools.wraps(create)
    def _create_grammar(manager: Any, request: Any) -> Any:
        with noted():
            return create(manager, request)

    @functools.wraps(with_timeout)
    def compile_regex_with_timeout(compile_pattern: Callable[[str], Any], pattern: str) -> Any:
        # vLLM stops waiting after some seconds, but the compiling thread continues.
        def compile_noted(pattern: str) -> Any:
            with noted():
                return compile_pattern(pattern)

        return with_timeout(compile_noted, pattern)

    _create_grammar._lmaas_compilation = True  # type: ignore[attr-defined]  # so that it is wrapped once
    StructuredOutputManager._create_grammar = _create_grammar
    backend_xgrammar.compile_regex_with_timeout = compile_regex_with_timeout


def _noter() -> Callable[[], AbstractContextManager[None]]:
    """Return a function that opens a block in which this process notes a compilation. A forked process has its own notes."""
    notes: dict[int, Notes | None] = {}
    making = threading.Lock()

    def noted() -> AbstractContextManager[None]:
        folder, process = os.environ.get(VARIABLE), os.getpid()
        if not folder:
            return nullcontext()
        with making:  # two threads may start at the same time
            if process not in notes:
                try:
                    notes[process] = Notes(Path(folder))
                except OSError as error:
                    log.warning("Compilations of grammars are not watched in this process: %s.", type(error).__name__)
                    notes[process] = None
        own = notes[process]
        return own.compiling() if own is not None else nullcontext()

    return noted
