"""The charge of a request."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmaas.metering.pricing import Prices, charge_picousd, microusd
from lmaas.metering.usage import UsageRecord, parse_event
from lmaas.states import UsageStatus
from lmaas.types import MAX_PRICE

PRICES = Prices(prompt=150_000, cached=15_000, completion=600_000)


@pytest.mark.parametrize(
    ("prompt", "cached", "completion", "picousd"),
    [
        (0, 0, 0, 0),
        (1, 0, 0, 150_000),  # 0.15 $ a million is 0.15 micro-dollars each
        (1, 1, 0, 15_000),
        (0, 0, 1, 600_000),
        (1000, 128, 50, 872 * 150_000 + 128 * 15_000 + 50 * 600_000),
        (1_000_000, 0, 0, 150_000 * 10**6),
        (3, 5, 0, 3 * 15_000),  # an engine's invalid counts do not become a credit
    ],
)
def test_tokens_times_price(prompt: int, cached: int, completion: int, picousd: int) -> None:
    assert charge_picousd(PRICES, UsageStatus.COMPLETED, prompt, cached, completion) == picousd


@pytest.mark.parametrize("status", UsageStatus)
def test_who_pays(status: UsageStatus) -> None:
    pays = status not in (UsageStatus.EXPIRED, UsageStatus.WASTED, UsageStatus.PROBE)
    assert (charge_picousd(PRICES, status, 1, 0, 0) > 0) is pays


@pytest.mark.parametrize(
    ("picousd", "shown"), [(0, 0), (499_999, 0), (500_000, 1), (1_499_999, 1), (1_500_000, 2), (2**80 * 10**6 + 1, 2**80)]
)
def test_rounding_is_to_the_nearest_halves_up(picousd: int, shown: int) -> None:
    assert microusd(picousd) == shown


def accepted(prices: Prices) -> UsageRecord:
    record = UsageRecord(
        "r", "ten_1", None, "base", "base", None, None, stream=False,
        prompt_price=prices.prompt, cached_price=prices.cached, completion_price=prices.completion,
    )  # fmt: skip
    record.start("rep_1", 1, 2)
    return record


@settings(deadline=None)
@given(st.integers(0, MAX_PRICE), st.integers(0, MAX_PRICE), st.integers(0, MAX_PRICE), st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_events_charge_is_its_tokens_at_its_prices(prompt: int, cached: int, completion: int, tokens: int, made: int) -> None:
    record = accepted(Prices(prompt, cached, completion))
    record.count({"prompt_tokens": tokens, "completion_tokens": made, "prompt_tokens_details": {"cached_tokens": tokens // 3}})
    record.end(UsageStatus.COMPLETED)
    event = parse_event(record.event())
    assert event.charge_picousd == (tokens - tokens // 3) * prompt + tokens // 3 * cached + made * completion


def test_an_event_of_a_version_without_prices_is_free() -> None:
    record = accepted(PRICES)
    record.count({"prompt_tokens": 7, "completion_tokens": 5})
    record.end(UsageStatus.COMPLETED)
    fields = json.loads(record.event())
    assert parse_event(json.dumps(fields)).charge_picousd > 0
    older = {name: value for name, value in fields.items() if not name.endswith("_price")}
    event = parse_event(json.dumps(older))
    assert (event.prompt_tokens, event.completion_tokens, event.charge_picousd) == (7, 5, 0)


def test_the_largest_price_fits_where_it_is_kept() -> None:
    # The scheduler's Lua writes numbers with 14 digits, the ledger takes 64 bits.
    assert float(f"{MAX_PRICE:.14g}") == MAX_PRICE
    assert charge_picousd(Prices(MAX_PRICE, MAX_PRICE, MAX_PRICE), UsageStatus.COMPLETED, 9 * 10**8, 0, 0) < 2**63
