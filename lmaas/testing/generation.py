"""The fake engine's generation: sequences that grow by a word a step, their queue, a prefix cache and counters."""

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

#: Cached prompts are counted in whole blocks of this many tokens, as on vLLM's CPU backend.
BLOCK = 128
#: A request that sets no limit ends by itself after so many tokens and up to as many again.
NATURAL_LENGTH = 24
_SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "ti", "vo", "wu", "ya", "zo")
_WORDS = tuple(f" {a}{b}{c}".encode() for c in ("", *_SYLLABLES) for b in _SYLLABLES for a in _SYLLABLES)
#: Twice: any slice that begins in the first half is whole.
WORDS = _WORDS + _WORDS


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one prompt. `pieces` is its whole text, one piece a token; `made` of them are generated, `sent` are sent."""

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
    #: Whether the finish has been sent to its client.
    told: bool = False
    #: The id that the request came with.
    request: str = ""
    #: The name and the arguments of the function that is called instead of saying `pieces`.
    call: tuple[str, str] | None = None


@dataclass(slots=True)
class Engine:
    """The sequences that run and those that are queued, the adapters and the counters."""

    name: str
    max_model_len: int
    max_num_seqs: int
    max_loras: int
    token_s: float
    adapters: dict[str, str] = field(default_factory=dict)
    #: Is called for each sequence that arrives and each token that is generated, before a client can see it.
    truth: Callable[[Sequence], None] | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    #: By the engine's id of a request, to abort it.
    requests: dict[str, list[Sequence]] = field(default_factory=dict)
    _running: dict[Sequence, None] = field(default_factory=dict)
    _waiting: deque[Sequence] = field(default_factory=deque)
    _cache: set[int] = field(default_factory=set)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queue sequences, first come first served."""
        for sequence in sequences:
            self._waiting.append(sequence)
            if self.truth is not None:
                self.truth(sequence)
        self._arrived.set()

    def finish(self, sequence: Sequence, reason: bytes) -> None:
        """End a sequence, wherever it is, unless it has ended."""
        if sequence.finish is None:
            sequence.finish = reason
            self._running.pop(sequence, None)
            sequence.wake.set()

    def die(self) -> None:
        """End all sequences, as an engine does that is told to stop."""
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

    def _admit(self) -> None:
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
                    passed.append(sequence)  # as vLLM does: sequences behind it that fit go first
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
        sequence.made += 1
        self.generated_tokens += 1
        if self.truth is not None:
            self.truth(sequence)
        sequence.wake.set()
        if sequence.made == len(sequence.pieces):
            self.finish(sequence, sequence.end)

    def metrics(self) -> str:
        """The counters in Prometheus' text format."""
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
    """The chained hashes of a prompt's whole blocks: the keys of the prefix cache."""
    blocks, key = [], hash(seed)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = hash((key, *tokens[start : start + BLOCK]))
        blocks.append(key)
    return blocks


def called(body: dict[str, Any]) -> tuple[str, str] | None:
    """The function that is called, with the least arguments that its schema allows, or None.

    That is a function that must be called, or the first one while the conversation asks to "use the tool" and has no result of one.
    """
    tools, choice = body.get("tools"), body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return None
    last = body["messages"][-1]
    if choice == "auto" and (last["role"] != "user" or "use the tool" not in json.dumps(last["content"]).lower()):
        return None
    wanted = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == wanted)
    return wanted, json.dumps(_least(function.get("parameters") or {}))


def _least(schema: dict[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties") or {}
        return {name: _least(properties.get(name, {})) for name in schema.get("required", ())}
    return {"string": "x", "integer": 1, "number": 1.5, "boolean": True, "array": []}.get(kind)


def write(seed: int, limit: int, body: dict[str, Any], echo: str, chat: bool) -> tuple[tuple[bytes, ...], bytes, bytes]:
    """A sequence's tokens as pieces of a JSON string, why it ends, and the stop string that ended it."""
    if limit == 0:
        # vLLM generates one token all the same, and does not return it.
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
