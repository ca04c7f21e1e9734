"""The judge of durable work in the chaos test: it reports every fault, and nothing else."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from lmaas.states import UsageStatus
from lmaas.store.usage import UsageEvent
from lmaas.testing.truth import Delivery
from tests.support.durable_verdict import BatchEnd, judge_durable

COMPLETED, WASTED = UsageStatus.COMPLETED, UsageStatus.WASTED


def made(request_id: str, tokens: int, prompt: int = 9) -> Delivery:
    return Delivery(7, request_id, prompt, {0: [1.0] * tokens})


def event(request_id: str, status: UsageStatus, tokens: int, prompt: int = 9, charge: int = 0) -> UsageEvent:
    values: dict[str, Any] = dict.fromkeys(UsageEvent.__slots__) | {
        "request_id": request_id,
        "status": str(status),
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "charge_picousd": charge or (5 if status is COMPLETED else 0),
        "created_at": datetime.now(UTC),
    }
    return UsageEvent(**values)


def answer(custom_id: str, request_id: str, tokens: int = 4) -> dict[str, Any]:
    body = {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return {"id": f"batch_{custom_id}", "custom_id": custom_id, "response": response, "error": None}


def error(custom_id: str, code: str) -> dict[str, Any]:
    return {"id": f"batch_{custom_id}", "custom_id": custom_id, "response": None, "error": {"code": code, "message": "No."}}


def batch(status: str = "completed", total: int = 2, completed: int = 1, **facts: Any) -> dict[str, Any]:
    counts = {"total": total, "completed": completed, "failed": total - completed}
    return {"id": "batch_1", "status": str(status), "request_counts": counts, "usage": {"input_tokens": 9, "output_tokens": 4}} | facts


def response(status: str, tokens: int = 4) -> dict[str, Any]:
    return {"id": "resp_r1", "status": str(status), "usage": {"input_tokens": 9, "output_tokens": tokens}}


USAGE = {"input_tokens": 9, "output_tokens": 5}
SENT, FAILING = ("a", "b"), frozenset({"b"})
END = BatchEnd(batch(), SENT, FAILING, [answer("a", "r1")], [error("b", "model_not_found")])
LEDGER = [event("r0", WASTED, 2), event("r1", COMPLETED, 4)]
TRUTH = {"r0": [made("r0", 3)], "r1": [made("r1", 4)]}
CANCELLED = BatchEnd(batch("cancelled"), SENT, frozenset(), [answer("a", "r1")], [error("b", "batch_cancelled")])


@pytest.mark.parametrize(
    ("end", "cancelled"),
    [
        (END, frozenset()),
        (CANCELLED, frozenset({"batch_1"})),
        (BatchEnd(batch("cancelled", 0, 0, usage=None), SENT, frozenset()), frozenset({"batch_1"})),
    ],
)
def test_what_is_right_is_no_complaint(end: BatchEnd, cancelled: frozenset[str]) -> None:
    ledger = LEDGER if end.output else LEDGER[:1]
    verdict = judge_durable([end], [], ledger, TRUTH, cancelled=cancelled)
    assert verdict.complaints == []
    assert (verdict.charged, verdict.wasted) == (4 if end.output else 0, 2)


@pytest.mark.parametrize(
    ("end", "ledger", "truth", "complaint"),
    [
        (BatchEnd(batch("in_progress"), SENT, FAILING), [], {}, "not ended"),
        (BatchEnd(batch("cancelled"), SENT, FAILING, END.output, END.errors), LEDGER, TRUTH, "may not end like this"),
        (BatchEnd(batch("failed"), SENT, FAILING, END.output, END.errors), LEDGER, TRUTH, "may not end like this"),
        (BatchEnd(batch(), SENT, FAILING, END.output), LEDGER, TRUTH, "exactly one result"),
        (BatchEnd(batch(), SENT, FAILING, [*END.output, answer("b", "r1")]), LEDGER, TRUTH, "two results have one attempt"),
        (BatchEnd(batch(), SENT, FAILING, [*END.output, *END.output], END.errors), LEDGER, TRUTH, "exactly one result"),
        (BatchEnd(batch(completed=2), SENT, FAILING, END.output, END.errors), LEDGER, TRUTH, "the counts are"),
        (
            BatchEnd(batch(usage=USAGE), SENT, FAILING, END.output, END.errors),
            LEDGER,
            TRUTH,
            "its usage is",
        ),
        (BatchEnd(batch(), SENT, frozenset(), END.output, [error("b", "engine_failed")]), LEDGER, TRUTH, "a line failed that should not"),
        (BatchEnd(batch(), SENT, frozenset(), END.output, [error("b", "batch_cancelled")]), LEDGER, TRUTH, "a line failed that should not"),
        (BatchEnd(batch(), SENT, frozenset({"a", "b"}), END.output, END.errors), LEDGER, TRUTH, "no such answer is possible"),
        (END, LEDGER[:1], TRUTH, "not in the ledger"),
        (END, [event("r1", WASTED, 4)], TRUTH, "has not completed it"),
        (END, [event("r1", COMPLETED, 3)], TRUTH, "the ledger has other tokens"),
        (END, LEDGER, {"r0": TRUTH["r0"]}, "no engine worked on it"),
        (END, LEDGER, TRUTH | {"r1": [made("r1", 5)]}, "the engine made other tokens"),
        (END, [*LEDGER, event("r3", COMPLETED, 4)], TRUTH | {"r3": [made("r3", 4)]}, "charged without a result"),
        (END, [LEDGER[1], event("r0", WASTED, 2, charge=1)], TRUTH, "waste is charged"),
        (END, [LEDGER[1], event("r0", WASTED, 4)], TRUTH, "more is recorded than was made"),
    ],
)
def test_what_is_wrong_is_found(end: BatchEnd, ledger: list[UsageEvent], truth: dict[str, list[Delivery]], complaint: str) -> None:
    assert complaint in "\n".join(judge_durable([end], [], ledger, truth).complaints)


def test_waste_is_exact_where_nothing_was_killed() -> None:
    assert "not all of the waste" in "\n".join(judge_durable([END], [], LEDGER, TRUTH, killed=False).complaints)
    exact = [event("r0", WASTED, 3), LEDGER[1]]
    assert judge_durable([END], [], exact, TRUTH, killed=False).complaints == []


@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (response("completed"), ""),
        (response("incomplete"), ""),
        (response("completed", 5), "the ledger has other tokens"),
        (response("completed") | {"id": "resp_3"}, "0 of its attempts are completed"),
        (response("cancelled"), "it was not cancelled"),
        (response("queued"), "no response may end like this"),
        (response("failed"), "no response may end like this"),
    ],
)
def test_background_responses(response: dict[str, Any], complaint: str) -> None:
    ledger = [replace(event, request_id=f"req_{event.request_id}") for event in LEDGER]
    complaints = judge_durable([], [response], ledger, {f"req_{request_id}": made for request_id, made in TRUTH.items()}).complaints
    assert bool(complaints) == bool(complaint)
    assert complaint in "\n".join(complaints)
