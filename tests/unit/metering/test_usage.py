"""The fields of a request's record while it runs."""

import pytest

from lmaas.metering.usage import UsageRecord, parse_event
from lmaas.states import UsageStatus, WorkClass
from lmaas.types import TokenCounts


def test_nothing_is_told_before_the_engine_has_said_anything() -> None:
    record = UsageRecord("r", "t", "k", "base", "base", None, None, stream=True)
    # Not zeros: the scheduler would conclude that the prompt, which it has charged by estimate, was empty.
    assert record.progress() is None
    record.count({"prompt_tokens": 5, "completion_tokens": 0})
    assert record.progress() == TokenCounts(prompt=5, cached=0, completion=0)


def test_wasted_attempts_count_for_no_limit() -> None:
    def ended(status: UsageStatus, *, durable: bool, work: WorkClass = WorkClass.BACKGROUND) -> TokenCounts | None:
        record = UsageRecord("r", "t", "k", "base", "base", None, None, stream=True, work=work, durable=durable)
        record.count({"prompt_tokens": 5, "completion_tokens": 2})
        record.status = status
        return record.used()

    seven = TokenCounts(5, 0, 2)
    assert ended(UsageStatus.WASTED, durable=True) is None
    assert ended(UsageStatus.WASTED, durable=True, work=WorkClass.INTERACTIVE) is None
    assert ended(UsageStatus.ABORTED, durable=True) is None, "a line whose batch was cancelled"
    assert ended(UsageStatus.ABORTED, durable=True, work=WorkClass.INTERACTIVE) == seven
    assert ended(UsageStatus.ABORTED, durable=False, work=WorkClass.INTERACTIVE) == seven
    assert ended(UsageStatus.COMPLETED, durable=True) == ended(UsageStatus.FAILED, durable=True) == seven


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (UsageStatus.ABORTED, None, "cancelled"),
        (UsageStatus.WASTED, "put_back", "put_back"),
        (UsageStatus.FAILED, "engine_failed", "engine_failed"),
        (UsageStatus.COMPLETED, None, None),
    ],
)
def test_a_stand_in_says_why_an_attempt_is_wasted(status: UsageStatus, code: str | None, expected: str | None) -> None:
    record = UsageRecord("r", "t", "k", "base", "base", None, None, stream=True, work=WorkClass.BACKGROUND, durable=True)
    record.end(status, code)
    event = parse_event(record.event())
    assert (event.status, event.code, event.charge_picousd) == (UsageStatus.WASTED, expected, 0)
    assert record.own_event().status is status
