"""Caches which grammars are valid. vLLM validates the grammar of every request in the event loop of its server, which delays all
streams."""

import functools
import hashlib
import json
import threading
from collections import OrderedDict
from typing import Any

#: The number of grammars, by digest, in the cache. The least recently used one is removed first.
MAX_KNOWN = 4096
#: The longest text that is kept for a grammar which validation rewrites, in characters.
MAX_REWRITTEN = 65536
#: The fields of a request that validation reads and may rewrite.
FIELDS = ("regex", "choice", "json", "grammar", "structural_tag")


class Known:
    """Valid grammars, with the changes that validation made to the request: `choice` becomes `grammar`. Thread-safe."""

    def __init__(self, size: int = MAX_KNOWN) -> None:
        self._size = size
        self._changes: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._changes)

    def find(self, digest: bytes) -> dict[str, Any] | None:
        """Return the changes for a known grammar, or None if it is unknown."""
        with self._lock:
            changes = self._changes.get(digest)
            if changes is not None:
                self._changes.move_to_end(digest)
            return changes

    def add(self, digest: bytes, changes: dict[str, Any]) -> None:
        """Add a valid grammar, unless its changes are too long to be kept."""
        if sum(len(value) for value in changes.values() if isinstance(value, str)) > MAX_REWRITTEN:
            return
        with self._lock:
            self._changes[digest] = changes
            while len(self._changes) > self._size:
                self._changes.popitem(last=False)


def digest(grammar: dict[str, Any]) -> bytes | None:
    """Return the digest of the fields that are validated, or None for values that are not JSON."""
    try:
        text = json.dumps(grammar, ensure_ascii=True, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError):
        return None
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def install() -> None:
    """Wrap vLLM's validation of grammars for xgrammar. All callers look the function up when they call it."""
    from vllm.v1.structured_output import backend_xgrammar  # noqa: PLC0415 (only inside an engine)

    validate = backend_xgrammar.validate_xgrammar_grammar
    if hasattr(validate, "_lmaas_validation"):
        return
    known = Known()

    @functools.wraps(validate)
    def validate_xgrammar_grammar(sampling_params: Any) -> None:
        params = sampling_params.structured_outputs
        if params is None:
            return
        before = {name: getattr(params, name) for name in FIELDS}
        key = digest(before)
        changes = known.find(key) if key is not None else None
        if changes is None:
            validate(sampling_params)
            if key is not None:
                after = {name: getattr(params, name) for name in FIELDS}
                known.add(key, {name: value for name, value in after.items() if value is not before[name]})
            return
        for name, value in changes.items():
            setattr(params, name, value)

    validate_xgrammar_grammar._lmaas_validation = True  # type: ignore[attr-defined]  # so that it is wrapped once
    backend_xgrammar.validate_xgrammar_grammar = validate_xgrammar_grammar
