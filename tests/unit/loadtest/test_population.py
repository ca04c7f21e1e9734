"""The tenants and the models of requests."""

import random
from collections import Counter

from loadtest.population import Population, Target

TARGETS = [
    Target(f"load-{tenant:03d}", "key", model, is_adapter=model != "base") for tenant in range(5) for model in ("one", "two", "base")
]


def test_popularity_falls_with_the_rank_as_zipf_has_it() -> None:
    population = Population(TARGETS, 1.0)
    chance = random.Random(1)
    calls = Counter(population.choose(chance) for _ in range(50_000))
    assert [target for target, _ in calls.most_common(3)] == population.targets[:3]
    first = calls[population.targets[0]]
    for rank in (2, 3, 5, 10, 15):
        assert abs(first / calls[population.targets[rank - 1]] / rank - 1) < 0.15, rank


def test_ranks_do_not_follow_the_tenants_order_and_are_the_same_in_every_run() -> None:
    population = Population(TARGETS, 1.0)
    assert population.targets != TARGETS
    assert sorted(map(str, population.targets)) == sorted(map(str, TARGETS))
    assert population.targets == Population(TARGETS, 2.0).targets


def test_only_some_tenants() -> None:
    population = Population(TARGETS, 1.0)
    assert population.tenants == ["load-000", "load-001", "load-002", "load-003", "load-004"]
    chance = random.Random(1)
    called = {population.choose(chance, population.tenants[1:3]) for _ in range(1000)}
    assert called == {target for target in TARGETS if target.tenant in ("load-001", "load-002")}
