"""Compares the clients' observations, the engines' records (the truth) and the ledger. Pure.

`complaints` lists each line of the ledger that breaks a rule:

| status in the ledger | rule |
| --- | --- |
| completed | ledger == truth, for prompt and completion, and == what the client saw, unless it disconnected or its gateway was killed |
| aborted | The client had disconnected. Ledger == truth; if the engine was killed too, what the client saw <= ledger <= truth |
| failed | An engine that worked on it was killed, and the client got an error. Ledger == what the client saw |
| expired | There is no charge |
| lost | Its gateway was killed. Ledger <= truth, and of a stream, ledger >= what the engine had made CHECKPOINT_S before the kill |

Each accepted request has one line, each request that an engine received has one, and each rejected request has none. Each line belongs to
a request. A request that was answered with 503 `queue_unavailable` may have a line without tokens: the queue had accepted it, and failed
before its reply.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmaas.states import UsageStatus
from lmaas.store.usage import UsageEvent
from lmaas.testing.truth import Delivery

#: The maximum age of a checkpoint is one second. A busy machine with two cores adds up to 1.5 s.
CHECKPOINT_S = 1.0 + 1.5
#: The time in which a gateway settles a request. If it is killed this soon after the client's response, it may not have settled.
SETTLE_S = 2.0
#: Statuses of requests that were rejected before anything was accepted.
REJECTED = {400, 401, 404, 429}


@dataclass(slots=True)
class Attempt:
    """One HTTP request, as its client saw it. Times are wall-clock seconds."""

    kind: str
    key_id: str
    gateway: str
    model: str
    stream: bool
    began: float
    ended: float = 0.0
    request_id: str | None = None
    status: int | None = None
    code: str | None = None
    #: The number of tokens received, and the usage that the response named.
    tokens: int = 0
    usage: dict[str, Any] | None = None
    #: The request ended successfully.
    done: bool = False
    #: The client itself disconnected.
    cut: bool = False
    #: The connection was lost without a response.
    broken: bool = False
    #: No connection was made.
    refused: bool = False
    hung: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that the test caused. `target` is a gateway's name or an engine's pid. Times are wall-clock seconds."""

    kind: str
    target: str
    began: float
    ended: float


@dataclass(slots=True)
class Verdict:
    """The result. `oldest_checkpoint_s` is the largest loss to a killed gateway, in seconds of its stream."""

    complaints: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    oldest_checkpoint_s: float = 0.0


def judge(attempts: list[Attempt], ledger: list[UsageEvent], truth: dict[str, list[Delivery]], faults: list[Fault]) -> Verdict:
    """Compare the ledger, the engines' records and the clients' observations."""
    verdict = Verdict()
    say = verdict.complaints.append
    events = {event.request_id: event for event in ledger if event.status != UsageStatus.PROBE}
    for request_id, count in Counter(attempt.request_id for attempt in attempts if attempt.request_id).items():
        if count > 1:
            say(f"{request_id} is the id of {count} requests")
    owners = _owners(attempts, events.values(), say)
    for request_id, deliveries in truth.items():
        if request_id not in events and not request_id.startswith("probe"):
            say(f"{request_id} was worked on and is not in the ledger: {deliveries}")
    for attempt in attempts:
        verdict.answers[f"{attempt.kind}: {_answer(attempt)}"] += 1
        if attempt.hung:
            say(f"a request never ended: {attempt}")
        if _accepted(attempt) and attempt.request_id not in events:
            say(f"accepted and not in the ledger: {attempt}")
        if _rejected(attempt) and attempt.request_id in events:
            say(f"rejected and in the ledger: {attempt} {events[str(attempt.request_id)]}")
    for request_id, attempt in owners.items():
        event = events[request_id]
        verdict.statuses[event.status] += 1
        verdict.tokens += event.completion_tokens
        for complaint in _judge_one(attempt, event, truth.get(request_id, []), faults, verdict):
            say(f"{event.status}: {complaint}: {attempt} {event} {[(one.pid, one.tokens) for one in truth.get(request_id, [])]}")
    return verdict


def _answer(attempt: Attempt) -> str:
    if attempt.cut or attempt.broken or attempt.hung:
        return "cut" if attempt.cut else "broken" if attempt.broken else "hung"
    return "done" if attempt.done else f"{attempt.status} {attempt.code}"


def _accepted(attempt: Attempt) -> bool:
    return attempt.status == 200 or attempt.code in {"engine_failed", "no_capacity", "adapter_load_failed"}


def _rejected(attempt: Attempt) -> bool:
    return attempt.status in REJECTED or attempt.code == "database_unavailable"


def _owners(attempts: list[Attempt], events: Iterable[UsageEvent], say: Callable[[str], None]) -> dict[str, Attempt]:
    """Return the attempt for each request id. An attempt that never received its id is found by its worker's key and by the time."""
    known = {attempt.request_id: attempt for attempt in attempts if attempt.request_id}
    nameless = [attempt for attempt in attempts if attempt.request_id is None and not attempt.refused]
    found: dict[str, Attempt] = {}
    for event in sorted(events, key=lambda event: event.created_at):
        attempt = known.get(event.request_id)
        if attempt is None:
            at = event.created_at.timestamp()
            same = (event.key_id, event.model, event.stream)
            fits = [one for one in nameless if (one.key_id, one.model, one.stream) == same and one.began <= at]
            if not fits:
                say(f"nobody sent this request: {event}")
                continue
            # A gateway may read a request after its client has given it up. Without a request that was open then, take the last one before.
            attempt = min(fits, key=lambda one: (one.ended < at, -one.began))
            nameless.remove(attempt)
        found[event.request_id] = attempt
    return found


def _judge_one(attempt: Attempt, event: UsageEvent, deliveries: list[Delivery], faults: list[Fault], verdict: Verdict) -> Iterable[str]:
    killed = {int(fault.target) for fault in faults if fault.kind == "engine"}
    last = deliveries[-1] if deliveries else Delivery(0, event.request_id)
    charged = event.completion_tokens
    lost_engine = any(one.pid in killed for one in deliveries)
    if (event.key_id, event.model, event.stream) != (attempt.key_id, attempt.model, attempt.stream):
        yield "somebody else's line"
    if attempt.done and event.status not in (UsageStatus.COMPLETED, UsageStatus.LOST):
        yield "the client had the whole answer"
    if charged > max((one.tokens for one in deliveries), default=0):
        yield "charged more than was made"
    if charged and event.prompt_tokens != last.prompt_tokens:
        yield f"the prompt had {last.prompt_tokens} tokens"
    match event.status:
        case UsageStatus.COMPLETED:
            if (event.prompt_tokens, charged) != (last.prompt_tokens, last.tokens):
                yield f"not what the engine did, which read {last.prompt_tokens} tokens"
            if attempt.done and attempt.tokens != charged:
                yield "not what the client saw"
            if attempt.usage and attempt.done and attempt.usage["completion_tokens"] != charged:
                yield "not what the client was told"
            if not (attempt.done or attempt.cut or _killed_gateway(attempt, faults)):
                yield "the client did not have it"
        case UsageStatus.ABORTED:
            if not attempt.cut:
                yield "the client had not cut it"
            if event.prompt_tokens > last.prompt_tokens:
                yield f"charged more than the {last.prompt_tokens} tokens that were read"
            if attempt.tokens > charged or (not lost_engine and charged != last.tokens):
                yield "not what was made for a client that went"
        case UsageStatus.FAILED if event.code == "engine_failed":
            # An engine records a request with its first token. If two engines were killed before that, there is no record.
            if (
                not lost_engine
                and len([fault for fault in faults if fault.kind == "engine" and attempt.began <= fault.began <= attempt.ended]) < 2
            ):
                yield "its engines lived"
            if attempt.code != "engine_failed" and not attempt.cut:
                yield "the client was not told"
            if charged < attempt.tokens or (charged != attempt.tokens and not attempt.cut):
                yield "not what was delivered"
        case UsageStatus.FAILED | UsageStatus.EXPIRED if event.code in ("queue_unavailable", "no_capacity", "grammar_check_unavailable"):
            # Possible reasons: the queue was unavailable for a second delivery, the service was unavailable for longer than the deadline,
            # or no host checked grammars.
            if charged or attempt.tokens or not (attempt.cut or attempt.code == event.code):
                yield "the client saw something else"
        case UsageStatus.LOST:
            yield from _judge_lost(attempt, event, last, faults, verdict)
        case _:
            yield "no request may end like this"


def _judge_lost(attempt: Attempt, event: UsageEvent, last: Delivery, faults: list[Fault], verdict: Verdict) -> Iterable[str]:
    fault = _killed_gateway(attempt, faults)
    if fault is None:
        if attempt.code != "queue_unavailable" or event.completion_tokens:
            yield "its gateway lived"
        return
    if not attempt.stream:
        return  # the response was not a stream, so its engine had sent nothing
    later = sorted(at for times in last.made.values() for at in times)[event.completion_tokens :]
    age_s = max(0.0, fault.began - later[0]) if later else 0.0
    verdict.oldest_checkpoint_s = max(verdict.oldest_checkpoint_s, age_s)
    if age_s > CHECKPOINT_S:
        yield f"its checkpoint was {age_s:.1f} s old"


def _killed_gateway(attempt: Attempt, faults: list[Fault]) -> Fault | None:
    """Return the kill that ended this attempt's gateway, if there was one."""
    for fault in faults:
        if (
            fault.kind == "gateway"
            and fault.target == attempt.gateway
            and attempt.began <= fault.ended
            and fault.began <= attempt.ended + SETTLE_S
        ):
            return fault
    return None
