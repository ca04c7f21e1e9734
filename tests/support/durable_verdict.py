"""Compares durable work with the ledger and the engines' records (the truth): batches by their files, background responses by their end.
Pure.

Every line of a batch has exactly one result, and the counts of its batch add up. An answered line has one line in the ledger, with the
tokens that its answer names and that the engine made. Every other attempt is waste, which is charged to no tenant, and of which no more is
recorded than was made. Every attempt that an engine received is in the ledger once.

`complaints` lists each deviation.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmaas.states import UsageStatus
from lmaas.store.usage import UsageEvent
from lmaas.testing.truth import Delivery

#: The states in which a batch ends.
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


@dataclass(frozen=True, slots=True)
class BatchEnd:
    """A batch after its end, as its owner sees it: the custom ids of its input file (`sent`), those of them that cannot succeed
    (`failing`), and the lines of its files (`output` and `errors`)."""

    batch: Mapping[str, Any]
    sent: Sequence[str]
    failing: frozenset[str]
    output: Sequence[Mapping[str, Any]] = ()
    errors: Sequence[Mapping[str, Any]] = ()


@dataclass(slots=True)
class Durable:
    """The result. `charged` and `wasted` are completion tokens."""

    complaints: list[str] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    charged: int = 0
    wasted: int = 0
    #: The ids of the attempts whose results their owners have.
    answered: set[str] = field(default_factory=set)


def judge_durable(
    batches: Iterable[BatchEnd],
    responses: Iterable[Mapping[str, Any]],
    ledger: Iterable[UsageEvent],
    truth: Mapping[str, Sequence[Delivery]],
    *,
    cancelled: frozenset[str] = frozenset(),
    killed: bool = True,
) -> Durable:
    """Compare the results of durable work with its lines in the ledger, which has the keys of durable work only.

    `cancelled` are the ids of the batches and responses whose cancellation was requested. Unless processes were `killed`, waste must be
    recorded to the token.
    """
    verdict = Durable()
    say = verdict.complaints.append
    events = {event.request_id: event for event in ledger}
    for end in batches:
        _judge_batch(end, events, truth, cancelled, verdict)
    for response in responses:
        _judge_response(response, events, truth, cancelled, verdict)
    for request_id, event in events.items():
        verdict.statuses[event.status] += 1
        made = [one.tokens for one in truth.get(request_id, ())]
        read = max((one.prompt_tokens for one in truth.get(request_id, ())), default=0)
        if event.completion_tokens > max(made, default=0) or event.prompt_tokens > read:
            say(f"more is recorded than was made: {event} {made}")
        if request_id in verdict.answered:
            verdict.charged += event.completion_tokens
            continue
        verdict.wasted += event.completion_tokens
        if event.status == UsageStatus.WASTED:
            if event.charge_picousd:
                say(f"waste is charged: {event}")
            if not killed and event.completion_tokens != sum(made):
                say(f"not all of the waste is recorded: {event} {made}")
        elif event.charge_picousd and event.status != UsageStatus.ABORTED:
            say(f"charged without a result: {event}")
    return verdict


def _judge_batch(
    end: BatchEnd,
    events: Mapping[str, UsageEvent],
    truth: Mapping[str, Sequence[Delivery]],
    cancelled: frozenset[str],
    verdict: Durable,
) -> None:
    def say(complaint: str) -> None:
        verdict.complaints.append(f"batch {batch['id']}: {complaint}")

    batch, counts = end.batch, end.batch["request_counts"]
    if batch["status"] not in ENDED:
        say(f"it has not ended: {batch['status']}")
        return
    if batch["status"] == "failed" or (batch["status"] == "cancelled") > (batch["id"] in cancelled):
        say(f"it may not end like this: {batch}")
    results = Counter(line["custom_id"] for line in (*end.output, *end.errors))
    # A batch that was cancelled before its validation has no lines.
    if results != Counter(end.sent) and not (batch["status"] == "cancelled" and not results and not counts["total"]):
        wrong = (results - Counter(end.sent)) + (Counter(end.sent) - results)
        say(f"{len(wrong)} lines do not have exactly one result: {list(wrong)[:5]}")
    if counts["completed"] != len(end.output) or counts["total"] != sum(results.values()):
        say(f"the counts are {counts}, the files have {len(end.output)} and {len(end.errors)} lines")
    if len({line["id"] for line in (*end.output, *end.errors)}) != sum(results.values()):
        say("two results have one id")
    usage = [0, 0]
    for line in end.output:
        answer, request_id = line["response"]["body"], line["response"]["request_id"]
        if line["custom_id"] in end.failing or line["response"]["status_code"] != 200 or line.get("error"):
            say(f"no such answer is possible: {line}")
        tokens = _tokens(answer["usage"])
        usage = [usage[0] + tokens[0], usage[1] + tokens[1]]
        for complaint in _judge_answer(request_id, tokens, events, truth, verdict):
            say(f"{complaint}: {line['custom_id']} {tokens} {events.get(request_id)} {truth.get(request_id)}")
    for line in end.errors:
        told = line["error"] or line["response"]["body"]["error"]
        unfinished = told["code"] in ("batch_cancelled", "batch_expired")
        if unfinished > (batch["id"] in cancelled or batch["status"] == "expired") or (
            not unfinished and line["custom_id"] not in end.failing
        ):
            say(f"a line failed that should not: {line}")
    if batch.get("usage") and [batch["usage"]["input_tokens"], batch["usage"]["output_tokens"]] != usage:
        say(f"its usage is {batch['usage']}, that of its lines is {usage}")


def _judge_response(
    response: Mapping[str, Any],
    events: Mapping[str, UsageEvent],
    truth: Mapping[str, Sequence[Delivery]],
    cancelled: frozenset[str],
    verdict: Durable,
) -> None:
    def say(complaint: str) -> None:
        verdict.complaints.append(f"response {response['id']}: {complaint}: {dict(response)}")

    match response["status"]:
        case "completed" | "incomplete":
            tokens = response["usage"]["input_tokens"], response["usage"]["output_tokens"]
            # The ids of its attempts begin with that of the request.
            own = response["id"].replace("resp_", "req_")
            attempts = [events[request_id] for request_id in events if request_id == own or request_id.startswith(f"{own}_")]
            ended = [event.request_id for event in attempts if event.status == UsageStatus.COMPLETED]
            if len(ended) != 1:
                say(f"{len(ended)} of its attempts are completed")
            for request_id in ended:
                for complaint in _judge_answer(request_id, tokens, events, truth, verdict):
                    say(complaint)
        case "cancelled":
            if response["id"] not in cancelled:
                say("it was not cancelled")
        case _:
            say("no response may end like this")


def _judge_answer(
    request_id: str,
    tokens: tuple[int, int],
    events: Mapping[str, UsageEvent],
    truth: Mapping[str, Sequence[Delivery]],
    verdict: Durable,
) -> Iterable[str]:
    """Judge a response that its owner has received."""
    if request_id in verdict.answered:
        yield "two results have one attempt"
    verdict.answered.add(request_id)
    event, deliveries = events.get(request_id), truth.get(request_id)
    if event is None:
        yield "it is not in the ledger"
        return
    if event.status != UsageStatus.COMPLETED:
        yield "the ledger has not completed it"
    if (event.prompt_tokens, event.completion_tokens) != tokens:
        yield "the ledger has other tokens"
    if not deliveries:
        yield "no engine worked on it"
    elif (deliveries[-1].prompt_tokens, deliveries[-1].tokens) != tokens:
        yield "the engine made other tokens"


def _tokens(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Return the tokens of the prompt and of the completion, from the usage of any protocol."""
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["output_tokens"]
    return usage["prompt_tokens"], usage.get("completion_tokens", 0)
