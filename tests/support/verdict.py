"""What must hold between the clients' experience, the engines' truth and the ledger: a pure function.

`complaints` finds every line of the ledger that is not as it must be:

| the ledger says | then |
| --- | --- |
| completed | ledger == truth, prompt and completion; and == what the client saw, unless it cut the connection or its gateway was killed |
| aborted | the client had cut. Ledger == truth; if the engine was killed too: what the client saw <= ledger <= truth |
| failed | an engine that worked on it was killed, and the client was told. Ledger == what the client saw |
| expired | nobody was charged anything |
| lost | its gateway was killed. Ledger <= truth, and of a stream, ledger >= what the engine had made CHECKPOINT_S before the kill |

and, about the requests: each that was accepted has one line; each that an engine has seen has one; each that was rejected has none; no
line belongs to nobody. A request that was answered with 503 `queue_unavailable` may have a line without tokens: the queue had taken it, and
died before it could say so.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lmaas.states import UsageStatus
from lmaas.store.usage import UsageEvent
from lmaas.testing.truth import Delivery

#: A checkpoint is a second old at most; and what a busy machine of two cores adds to that.
CHECKPOINT_S = 1.0 + 1.5
#: A gateway that is killed just after the client has had its answer cannot settle any more.
SETTLE_S = 2.0
#: Rejected before anything was accepted.
REJECTED = {400, 401, 404, 429}


@dataclass(slots=True)
class Attempt:
    """One HTTP request, and what its client saw of it. Times are of the wall clock, in seconds."""

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
    #: Tokens that came, and the usage that the answer named.
    tokens: int = 0
    usage: dict[str, Any] | None = None
    #: It ended as a success.
    done: bool = False
    #: The client itself cut it.
    cut: bool = False
    #: The connection broke without a word.
    broken: bool = False
    #: There was no connection at all.
    refused: bool = False
    hung: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that the test did. `target` is a gateway's name or an engine's pid; times are of the wall clock, in seconds."""

    kind: str
    target: str
    began: float
    ended: float


@dataclass(slots=True)
class Verdict:
    """What was found. `oldest_checkpoint_s` is the largest loss to a killed gateway, in seconds of its stream."""

    complaints: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    oldest_checkpoint_s: float = 0.0


def judge(attempts: list[Attempt], ledger: list[UsageEvent], truth: dict[str, list[Delivery]], faults: list[Fault]) -> Verdict:
    """Compare everything with everything."""
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
    """Request id → who sent it. One that never heard its id is found by its key, which is its worker's own, and the time."""
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
            # A gateway may read a request that its client has given up already: else the last before it.
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
                yield "not what the engine did"
            if attempt.done and attempt.tokens != charged:
                yield "not what the client saw"
            if attempt.usage and attempt.done and attempt.usage["completion_tokens"] != charged:
                yield "not what the client was told"
            if not (attempt.done or attempt.cut or _killed_gateway(attempt, faults)):
                yield "the client did not have it"
        case UsageStatus.ABORTED:
            if not attempt.cut:
                yield "the client had not cut it"
            if attempt.tokens > charged or (not lost_engine and charged != last.tokens):
                yield "not what was made for a client that went"
        case UsageStatus.FAILED if event.code == "engine_failed":
            # Engines write a request down with its first token: two that were killed before that have not.
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
            # The queue was away when this was to be delivered once more; the service was away for longer than the deadline; or no host
            # checked grammars.
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
        return  # its engine had not said anything
    later = sorted(at for times in last.made.values() for at in times)[event.completion_tokens :]
    age_s = max(0.0, fault.began - later[0]) if later else 0.0
    verdict.oldest_checkpoint_s = max(verdict.oldest_checkpoint_s, age_s)
    if age_s > CHECKPOINT_S:
        yield f"its checkpoint was {age_s:.1f} s old"


def _killed_gateway(attempt: Attempt, faults: list[Fault]) -> Fault | None:
    """The kill that ended this attempt's gateway, if one did."""
    for fault in faults:
        if (
            fault.kind == "gateway"
            and fault.target == attempt.gateway
            and attempt.began <= fault.ended
            and fault.began <= attempt.ended + SETTLE_S
        ):
            return fault
    return None
