"""The judge of the chaos test: it reports every fault, and nothing else."""

from datetime import UTC, datetime
from typing import Any

import pytest

from lmaas.states import UsageStatus
from lmaas.store.usage import UsageEvent
from lmaas.testing.truth import Delivery
from tests.support.verdict import Attempt, Fault, judge

BEGAN = 1_000_000.0
ENGINE, GATEWAY = Fault("engine", "7", BEGAN + 5, BEGAN + 5), Fault("gateway", "gateway-0", BEGAN + 5, BEGAN + 6)
STREAM: dict[str, Any] = {"request_id": "r", "status": 200, "tokens": 40}
DONE = STREAM | {"done": True}
#: Four seconds of a stream, ten tokens a second.
MADE = Delivery(7, "r", 9, {0: [BEGAN + 1 + token / 10 for token in range(40)]})


def attempt(**facts: Any) -> Attempt:
    return Attempt("stream", "key", "gateway-0", "m", True, BEGAN, **{"ended": BEGAN + 5} | facts)


def event(status: UsageStatus, tokens: int, code: str | None = None, **facts: Any) -> UsageEvent:
    values: dict[str, Any] = {
        "request_id": "r",
        "tenant_id": "t",
        "key_id": "key",
        "base_model": "m",
        "model": "m",
        "adapter": None,
        "adapter_version": None,
        "status": status,
        "code": code,
        "stream": True,
        "prompt_tokens": 9 if tokens else 0,
        "cached_tokens": 0,
        "completion_tokens": tokens,
        "queue_ms": 0,
        "load_ms": 0,
        "run_ms": 0,
        "replica_id": "rep",
        "created_at": datetime.fromtimestamp(BEGAN + 0.1, UTC),
    }
    return UsageEvent(**values | facts)


COMPLETED, ABORTED, FAILED, LOST = UsageStatus.COMPLETED, UsageStatus.ABORTED, UsageStatus.FAILED, UsageStatus.LOST


@pytest.mark.parametrize(
    ("client", "lines", "faults"),
    [
        (attempt(**DONE), [event(COMPLETED, 40)], []),
        (attempt(**DONE), [event(LOST, 35)], [GATEWAY]),
        (attempt(**STREAM | {"tokens": 11, "cut": True}), [event(ABORTED, 40)], []),
        (attempt(**STREAM | {"tokens": 11, "cut": True}), [event(ABORTED, 12)], [ENGINE]),
        (attempt(**STREAM | {"tokens": 38, "code": "engine_failed"}), [event(FAILED, 38, "engine_failed")], [ENGINE]),
        (attempt(broken=True, **STREAM), [event(LOST, 25)], [GATEWAY]),
        # Its client never received the id.
        (attempt(cut=True), [event(ABORTED, 40)], []),
    ],
)
def test_what_is_right_is_no_complaint(client: Attempt, lines: list[UsageEvent], faults: list[Fault]) -> None:
    assert judge([client], lines, {"r": [MADE], "probe_1": [MADE]}, faults).complaints == []


@pytest.mark.parametrize(
    ("client", "lines", "faults", "complaint"),
    [
        (attempt(**DONE), [], [], "accepted and not in the ledger"),
        (attempt(cut=True), [], [], "worked on and is not in the ledger"),
        (attempt(**DONE), [event(COMPLETED, 40), event(COMPLETED, 40, request_id="r2", key_id="other")], [], "nobody sent this"),
        (attempt(request_id="r", status=429, code="queue_full"), [event(ABORTED, 0)], [], "rejected and in the ledger"),
        (attempt(hung=True, **STREAM), [event(COMPLETED, 40)], [], "never ended"),
        (attempt(refused=True, broken=True), [event(LOST, 0)], [GATEWAY], "nobody sent this"),
        (attempt(**DONE), [event(COMPLETED, 39)], [], "not what the engine did"),
        (attempt(**DONE), [event(COMPLETED, 80)], [], "charged more than was made"),
        (attempt(**DONE | {"tokens": 39}), [event(COMPLETED, 40)], [], "not what the client saw"),
        (attempt(**DONE), [event(COMPLETED, 40, prompt_tokens=8)], [], "the prompt had 9"),
        (attempt(broken=True, **STREAM), [event(COMPLETED, 40)], [], "the client did not have it"),
        (attempt(**DONE), [event(COMPLETED, 40, model="other")], [], "somebody else's"),
        (attempt(**DONE), [event(ABORTED, 40)], [], "the client had not cut it"),
        (attempt(**STREAM | {"tokens": 11, "cut": True}), [event(ABORTED, 12)], [], "not what was made for a client that went"),
        (attempt(**STREAM | {"tokens": 11, "cut": True}), [event(ABORTED, 10)], [ENGINE], "not what was made for a client that went"),
        (attempt(**STREAM | {"code": "engine_failed"}), [event(FAILED, 40, "engine_failed")], [], "its engines lived"),
        (attempt(**STREAM | {"code": "engine_failed"}), [event(FAILED, 30, "engine_failed")], [ENGINE], "not what was delivered"),
        (attempt(broken=True, **STREAM), [event(FAILED, 40, "engine_failed")], [ENGINE], "the client was not told"),
        (attempt(**STREAM), [event(FAILED, 40, "internal_error")], [ENGINE], "no request may end like this"),
        (attempt(broken=True, **STREAM), [event(LOST, 40)], [], "its gateway lived"),
        (attempt(broken=True, **STREAM), [event(LOST, 0)], [GATEWAY], "its checkpoint was 4.0 s old"),
    ],
)
def test_what_is_wrong_is_found(client: Attempt, lines: list[UsageEvent], faults: list[Fault], complaint: str) -> None:
    found = judge([client], lines, {"r": [MADE]}, faults).complaints
    assert any(complaint in one for one in found), found


def test_one_id_for_two_requests_is_found() -> None:
    found = judge([attempt(**DONE), attempt(**DONE)], [event(COMPLETED, 40)], {"r": [MADE]}, []).complaints
    assert found == ["r is the id of 2 requests"]
