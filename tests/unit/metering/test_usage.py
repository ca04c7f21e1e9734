"""What a request's record says of itself while it runs."""

from lmaas.metering.usage import UsageRecord


def test_nothing_is_told_before_the_engine_has_said_anything() -> None:
    record = UsageRecord("r", "t", "k", "base", "base", None, None, stream=True)
    # Not "0,0,0": the scheduler would take it that the prompt, which it has charged by estimate, was empty.
    assert record.progress() == ""
    record.count({"prompt_tokens": 5, "completion_tokens": 0})
    assert record.progress() == "5,0,0"
