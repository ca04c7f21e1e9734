"""The fake engine's generation: sequences that grow by one word per step, their queue, a prefix cache and counters."""

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

#: Cached prompts are counted in whole blocks of this many tokens, as on vLLM's CPU backend.
BLOCK = 128
#: A request without a limit ends after this many tokens plus a number below it that depends on the prompt.
NATURAL_LENGTH = 24
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "ti", "vo", "wu", "ya", "zo")
_WORDS = tuple(f" {a}{b}{c}".encode() for c in ("", *_SYLLABLES) for b in _SYLLABLES for a in _SYLLABLES)
#: The words twice, so that every slice from the first half has its full length.
WORDS = _WORDS + _WORDS


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one prompt. `pieces` is its whole text, one piece per token. `made` of them are generated and `sent` are sent.

    A sequence without pieces is an input of a pooling engine, which generates nothing: it ends with its first step.
    """

    index: int
    model: str
    prompt_tokens: int
    blocks: list[int]
    pieces: tuple[bytes, ...]
    end: bytes
    stop_reason: bytes
    wake: asyncio.Event
    made: int = 0
    sent: int = 0
    cached_tokens: int = 0
    finish: bytes | None = None
    #: True once the finish has been sent to the client.
    told: bool = False
    #: The request id that the client sent.
    request: str = ""
    #: The name and the arguments of the function that is called instead of generating `pieces`.
    call: tuple[str, str] | None = None
    #: Those above 0 give way to others, as in an engine of lmaas.
    priority: int = 0


@dataclass(slots=True)
class Engine:
    """The running and the queued sequences, the adapters and the counters."""

    name: str
    max_model_len: int
    max_num_seqs: int
    max_loras: int
    token_s: float
    adapters: dict[str, str] = field(default_factory=dict)
    #: Called for each sequence that arrives and each token that is generated, before a client can see it.
    truth: Callable[[Sequence], None] | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    #: The sequences of each request, by the engine's request id, for aborts.
    requests: dict[str, list[Sequence]] = field(default_factory=dict)
    _running: dict[Sequence, None] = field(default_factory=dict)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _cache: set[int] = field(default_factory=set)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences in the order of their arrival."""
        for sequence in sequences:
            self._waiting.append(sequence)
            if self.truth is not None and sequence.pieces:
                self.truth(sequence)
        self._arrived.set()

    def finish(self, sequence: Sequence, reason: bytes) -> None:
        """End a running or queued sequence, unless it has ended."""
        if sequence.finish is None:
            sequence.finish = reason
            self._running.pop(sequence, None)
            sequence.wake.set()

    def die(self) -> None:
        """End all sequences with an error, as a stopped engine does."""
        for sequence in [*self._running, *self._waiting]:
            self.finish(sequence, b"error")

    async def work(self) -> None:
        """Generate tokens until cancelled."""
        due = time.monotonic()
        while True:
            if not self._running and not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
                due = time.monotonic()
            self._admit()
            due = max(due + self.token_s, time.monotonic())
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            for sequence in list(self._running):
                self._step(sequence)

    def _give_way(self) -> None:
        """Move interactive sequences to the front of the queue. The youngest background ones give them their places, and continue
        later."""
        urgent = sum(sequence.priority <= 0 and sequence.finish is None for sequence in self._waiting)
        if not urgent:
            return
        background = [sequence for sequence in self._running if sequence.priority > 0]
        while background and len(self._running) + urgent > self.max_num_seqs:
            youngest = background.pop()
            del self._running[youngest]
            self._waiting.appendleft(youngest)
        self._waiting = deque(sorted(self._waiting, key=lambda sequence: sequence.priority > 0))

    def _admit(self) -> None:
        self._give_way()
        if not self._waiting or len(self._running) >= self.max_num_seqs:
            return
        adapters = {sequence.model for sequence in self._running} - {self.name}
        passed = []
        while self._waiting and len(self._running) < self.max_num_seqs:
            sequence = self._waiting.popleft()
            if sequence.finish is not None:
                continue
            if sequence.model != self.name:
                if sequence.model not in adapters and len(adapters) >= self.max_loras:
                    passed.append(sequence)  # as in vLLM, later sequences that fit run first
                    continue
                adapters.add(sequence.model)
            self._running[sequence] = None
        self._waiting.extendleft(reversed(passed))

    def _step(self, sequence: Sequence) -> None:
        if sequence.made == 0:
            self.prompt_tokens += sequence.prompt_tokens
            for hit, block in enumerate(sequence.blocks):
                if block not in self._cache or (hit + 1) * BLOCK >= sequence.prompt_tokens:
                    break
                sequence.cached_tokens += BLOCK
            self._cache.update(sequence.blocks)
        if not sequence.pieces:
            if self.truth is not None:
                self.truth(sequence)
            self.finish(sequence, b"stop")
            return
        sequence.made += 1
        self.generated_tokens += 1
        if self.truth is not None:
            self.truth(sequence)
        sequence.wake.set()
        if sequence.made == len(sequence.pieces):
            self.finish(sequence, sequence.end)

    def metrics(self) -> str:
        """Return the counters in Prometheus' text format."""
        label = f'{{engine="0",model_name="{self.name}"}}'
        waiting = sum(sequence.finish is None for sequence in self._waiting)
        lines = []
        for name, kind, value in (
            ("num_requests_running", "gauge", len(self._running)),
            ("num_requests_waiting", "gauge", waiting),
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("generation_tokens_total", "counter", self.generated_tokens),
        ):
            lines += [f"# HELP vllm:{name} See vLLM.", f"# TYPE vllm:{name} {kind}", f"vllm:{name}{label} {float(value)}"]
        return "\n".join(lines) + "\n"


def prompt_blocks(seed: object, tokens: list[Any]) -> list[int]:
    """Return the chained hashes of a prompt's whole blocks, which are the keys of the prefix cache."""
    blocks, key = [], hash(seed)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        blocks.append(key)
    return blocks


def called(body: dict[str, Any]) -> tuple[str, str] | None:
    """Return the function to call, with the smallest arguments that its schema allows, or None.

    A call is made if the request requires one, or if the last message, but for a system's, is a user's with the words "use the tool". It is
    the function that the request or this message names. Otherwise it is the first one; after a function's result, the last one, which is
    how agents let a model hand over its final output.
    """
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return None
    last = next((message for message in reversed(body["messages"]) if message["role"] not in ("system", "developer")), body["messages"][-1])
    said = json.dumps(last.get("content"))
    if choice == "auto" and (last["role"] != "user" or "use the tool" not in said.lower()):
        return None
    functions = [tool["function"] for tool in tools]
    wanted = choice["function"]["name"] if isinstance(choice, dict) else None
    first = functions[-1 if last["role"] == "tool" else 0]
    function = next((each for each in functions if each["name"] == wanted or (wanted is None and each["name"] in said)), first)
    return function["name"], _least_json(function.get("parameters"))


def formatted(body: dict[str, Any]) -> str | None:
    """Return the smallest JSON that the format of the request allows, or None if the format is text or ignores the end."""
    form = body.get("response_format") or {}
    if body.get("ignore_eos") or form.get("type") not in ("json_object", "json_schema"):
        return None
    return _least_json((form.get("json_schema") or {}).get("schema"))


def _least_json(schema: dict[str, Any] | None) -> str:
    """Return a small JSON text that a schema allows, or an empty object for one that has no such value, or that is not understood."""
    try:
        return json.dumps(least(schema or {}))
    except (TypeError, LookupError, AttributeError, RecursionError):
        return "{}"


def least(schema: dict[str, Any], definitions: dict[str, Any] | None = None) -> Any:
    """Return a small value that a schema allows. It covers the schemas that clients' libraries make from types."""
    definitions = schema.get("$defs", {}) if definitions is None else definitions
    if "$ref" in schema:
        return least(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return least(schema[union][0], definitions)
    kind = schema.get("type", "object")
    if isinstance(kind, list):
        kind = kind[0]
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: least(properties.get(name, {}), definitions) for name in schema.get("required", ())}
    if kind == "array":
        return [least(schema.get("items") or {}, definitions)] * (schema.get("minItems") or 0)
    return {"string": "x", "integer": 1, "number": 1.5, "boolean": True}.get(kind)


def write(seed: int, limit: int, body: dict[str, Any], echo: str, chat: bool) -> tuple[tuple[bytes, ...], bytes, bytes]:
    """Return a sequence's tokens as pieces of a JSON string, the reason why it ends, and the stop string that ended it."""
    if limit == 0:
        # vLLM generates one token even in this case, but does not return it.
        return (json.dumps(echo)[1:-1].encode(),), b"length", b"null"
    natural = max(NATURAL_LENGTH + seed % NATURAL_LENGTH, body.get("min_tokens") or 0)
    count, end = (limit, b"length") if body.get("ignore_eos") or limit <= natural else (natural, b"stop")
    start = seed % len(_WORDS)
    pieces = WORDS[start : start + count]
    if count > len(pieces):
        pieces = (pieces * (count // len(pieces) + 1))[:count]
    reason = b"null"
    if chat:
        pieces = (pieces[0].lstrip(), *pieces[1:])
    if form := formatted(body):
        # A token for each word. The limit may cut it off, as on a real engine.
        words = [json.dumps(word)[1:-1].encode() for word in re.findall(r"\s*\S+", form)]
        pieces, end = tuple(words[:limit]), b"stop" if len(words) <= limit else b"length"
    stops = body.get("stop") or []
    text = b"".join(pieces) if stops else b""
    found = [(at, stop) for stop in ([stops] if isinstance(stops, str) else stops) if (at := text.find(stop.encode())) >= 0]
    if found:
        at, stop = min(found)
        kept: list[bytes] = []
        position = 0
        for piece in pieces:
            kept.append(piece[: max(0, at - position)])
            position += len(piece)
            if position >= at + len(stop):
                break
        pieces, end, reason = tuple(kept), b"stop", json.dumps(stop).encode()
    if echo:
        pieces = (json.dumps(echo)[1:-1].encode() + pieces[0], *pieces[1:])
    return pieces, end, reason
