"""What a request's record says of itself while it runs."""

from lmaas.metering.usage import UsageRecord
from lmaas.types import TokenCounts


def test_nothing_is_told_before_the_engine_has_said_anything() -> None:
    record = UsageRecord("r", "t", "k", "base", "base", None, None, stream=True)
    # Not zeros: the scheduler would take it that the prompt, which it has charged by estimate, was empty.
    assert record.progress() is None
    record.count({"prompt_tokens": 5, "completion_tokens": 0})
    assert record.progress() == TokenCounts(prompt=5, cached=0, completion=0)
