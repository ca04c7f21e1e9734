"""The order in which lines are leased."""

from datetime import UTC, datetime

import pytest

from lmaas.jobs.turns import URGENT_S, shares
from lmaas.store.line_leases import Offer


def offer(tenant: str, batch: str, pending: int, left_s: float = 80_000) -> Offer:
    return Offer(tenant, batch, "pool", pending, "key", "/v1/chat/completions", "file", datetime.now(UTC), left_s)


@pytest.mark.parametrize(
    ("offers", "count", "served", "expected"),
    [
        ([], 5, {}, {}),
        ([offer("a", "1", 9)], 0, {}, {}),
        ([offer("a", "1", 9)], 5, {}, {("a", "1"): 5}),
        ([offer("a", "1", 3)], 5, {}, {("a", "1"): 3}),
        # Each tenant gets the same, however many batches it has.
        ([offer("a", "1", 90), offer("a", "2", 90), offer("b", "3", 90)], 10, {}, {("a", "1"): 5, ("b", "3"): 5}),
        # The others get the part that one tenant does not need.
        ([offer("a", "1", 2), offer("b", "2", 90), offer("c", "3", 90)], 12, {}, {("a", "1"): 2, ("b", "2"): 5, ("c", "3"): 5}),
        # A tenant's batches go by deadline.
        ([offer("a", "late", 90, 9_000), offer("a", "soon", 3, 8_000)], 5, {}, {("a", "soon"): 3, ("a", "late"): 2}),
        # The odd one goes to the tenant that had the fewest.
        ([offer("a", "1", 9), offer("b", "2", 9)], 1, {"a": 4, "b": 3}, {("b", "2"): 1}),
        ([offer("a", "1", 9), offer("b", "2", 9)], 3, {"b": 3}, {("a", "1"): 2, ("b", "2"): 1}),
        # Batches near their deadline come first, and among them the nearest.
        (
            [offer("a", "1", 90), offer("b", "2", 4, URGENT_S - 1), offer("c", "3", 2, 60)],
            8,
            {"b": 99, "c": 99},
            {("c", "3"): 2, ("b", "2"): 4, ("a", "1"): 2},
        ),
        ([offer("a", "1", 90), offer("b", "2", 40, 60)], 8, {}, {("b", "2"): 8}),
    ],
)
def test_shares(offers: list[Offer], count: int, served: dict[str, int], expected: dict[tuple[str, str], int]) -> None:
    assert shares(offers, count, served) == expected


def test_more_tenants_than_lines() -> None:
    offers = [offer(f"t{number}", f"b{number}", 5) for number in range(100)]
    served: dict[str, int] = {}
    for _ in range(10):
        for (tenant_id, _), count in shares(offers, 10, served).items():
            served[tenant_id] = served.get(tenant_id, 0) + count
    assert served == dict.fromkeys((f"t{number}" for number in range(100)), 1)
