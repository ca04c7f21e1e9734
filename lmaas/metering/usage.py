"""The record of one request's usage, from its acceptance to its end."""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii
from typing import Any

from lmaas.metering.pricing import Prices, charge_picousd
from lmaas.states import UsageStatus, WorkClass
from lmaas.store.usage import UsageEvent
from lmaas.types import TokenCounts

#: The codes of wasted attempts: the slot was taken back; the work was cancelled; the process that ran it stopped.
PUT_BACK, CANCELLED, STOPPED = "put_back", "cancelled", "runner_stopped"


@dataclass(slots=True)
class UsageRecord:
    """The usage of one request so far. The scheduler keeps it as JSON, and charges it if this gateway dies.

    Token counts are the engine's. Without a call of `end`, the status is ABORTED, because the client disconnected.
    """

    request_id: str
    tenant_id: str | None
    key_id: str | None
    base_model: str
    model: str
    adapter: str | None
    adapter_version: int | None
    stream: bool
    status: UsageStatus = UsageStatus.ABORTED
    code: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: int = 0
    load_ms: int = 0
    replica_id: str | None = None
    #: The base model's prices when the request was accepted: micro-dollars per million tokens.
    prompt_price: int = 0
    cached_price: int = 0
    completion_price: int = 0
    work: WorkClass = WorkClass.INTERACTIVE
    #: True if the caller stores the result of this attempt and its event together. Until then the attempt counts as wasted.
    durable: bool = False
    #: The code of a wasted attempt whose caller leaves it.
    left: str = CANCELLED
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    #: Returns the engine's latest `usage` object while a response is streamed.
    _source: Callable[[], dict[str, Any] | None] | None = None
    #: The part of the event that does not change, as the beginning of a JSON object.
    _head: str = ""
    _accepted: float = field(default_factory=time.monotonic)
    _started: float | None = None
    _ended: float | None = None

    def start(self, replica_id: str, queue_ms: int, load_ms: int) -> None:
        """Record that the request is sent to an engine, for the first time or again after an engine was lost."""
        self.replica_id, self.queue_ms, self.load_ms = replica_id, queue_ms, load_ms
        self._started = time.monotonic()

    def count(self, usage: dict[str, Any]) -> None:
        """Set the counts to those of the engine's `usage` object, which are totals of the request."""
        self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        self.completion_tokens = int(usage.get("completion_tokens") or 0)
        self.cached_tokens = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)

    def follow(self, source: Callable[[], dict[str, Any] | None] | None) -> None:
        """Read the counts from `source` whenever they are needed. None reads them a last time and ends this."""
        self._read()
        self._source = source

    def _read(self) -> None:
        usage = self._source() if self._source is not None else None
        if usage is not None:
            self.count(usage)

    def end(self, status: UsageStatus, code: str | None = None) -> None:
        """Record how the request ended."""
        self.status, self.code = status, code
        self._ended = time.monotonic()

    @property
    def queued_ms(self) -> int:
        """Milliseconds from the acceptance to the lease, or until now without one."""
        return self.queue_ms if self._started is not None else round((time.monotonic() - self._accepted) * 1000)

    @property
    def run_ms(self) -> int | None:
        """Milliseconds from the lease to the end, or None without a lease."""
        if self._started is None:
            return None
        return round(((self._ended or time.monotonic()) - self._started) * 1000)

    def progress(self) -> TokenCounts | None:
        """Return the checkpoint: the tokens so far, or None before the engine has reported any."""
        self._read()
        if not self.prompt_tokens and not self.completion_tokens:
            return None
        return TokenCounts(self.prompt_tokens, self.cached_tokens, self.completion_tokens)

    def used(self) -> TokenCounts | None:
        """Return the tokens that count for limits when the attempt has ended: None for a wasted one, which is not charged."""
        is_left = self.durable and self.work is WorkClass.BACKGROUND and self.status is UsageStatus.ABORTED
        return None if is_left or self.status is UsageStatus.WASTED else self.progress()

    def event(self) -> str:
        """Return the usage event as JSON, with the counts so far. For durable work it is a stand-in for the attempt's own event."""
        if self.durable:
            # Without an end, its caller has left.
            return self._event(UsageStatus.WASTED, self.left if self.status is UsageStatus.ABORTED else self.code)
        return self._event(self.status, self.code)

    def own_event(self) -> UsageEvent:
        """Return the attempt's own event, which durable work stores with its result."""
        return parse_event(self._event(self.status, self.code))

    def _event(self, status: UsageStatus, code: str | None) -> str:
        self._read()
        if not self._head:
            # The event is written twice, with the ticket and at the end. This half is the same both times.
            self._head = (
                f'{{"request_id": {_text(self.request_id)}, "tenant_id": {_text(self.tenant_id)}, "key_id": {_text(self.key_id)}, '
                f'"base_model": {_text(self.base_model)}, "model": {_text(self.model)}, "adapter": {_text(self.adapter)}, '
                f'"adapter_version": {"null" if self.adapter_version is None else self.adapter_version}, '
                f'"stream": {"true" if self.stream else "false"}, "prompt_price": {self.prompt_price}, '
                f'"cached_price": {self.cached_price}, "completion_price": {self.completion_price}, '
                f'"created_at": "{self.created_at.isoformat()}", "work": "{self.work}"'
            )
        return (
            f'{self._head}, "status": "{status}", "code": {_text(code)}, "prompt_tokens": {self.prompt_tokens}, '
            f'"cached_tokens": {self.cached_tokens}, "completion_tokens": {self.completion_tokens}, "queue_ms": {self.queued_ms}, '
            f'"load_ms": {self.load_ms}, "run_ms": {self.run_ms or 0}, "replica_id": {_text(self.replica_id)}}}'
        )


def _text(value: str | None) -> str:
    return "null" if value is None else encode_basestring_ascii(value)


_EVENT_FIELDS = tuple(each.name for each in dataclasses.fields(UsageEvent) if each.name != "charge_picousd")


def parse_event(text: str) -> UsageEvent:
    """Parse an event that `UsageRecord.event` wrote, and compute its charge. Raises ValueError, KeyError or TypeError for anything else.

    An event without prices, of an older release, is charged nothing. Unknown fields, of a newer release, are ignored.
    """
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise TypeError("a usage event is an object")
    fields["created_at"] = datetime.fromisoformat(fields["created_at"])
    fields["status"] = UsageStatus(fields["status"])
    # An older release does not write the class.
    fields["work"] = WorkClass(fields.get("work", WorkClass.INTERACTIVE))
    prices = Prices(*(int(fields.pop(name, 0)) for name in ("prompt_price", "cached_price", "completion_price")))
    charge = charge_picousd(prices, fields["status"], *(fields[name] for name in ("prompt_tokens", "cached_tokens", "completion_tokens")))
    return UsageEvent(**{name: fields[name] for name in _EVENT_FIELDS if name in fields}, charge_picousd=charge)
