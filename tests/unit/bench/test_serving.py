"""The requests of the serving bars, and which of two ways counts."""

from bench.client import Answer, Place, Run
from bench.frame import Bar, attempted
from bench.serving import STOCK, STRAIGHT, Load, worse

LOAD = Load(40, at_once=4, prompt_tokens=(3, 5), completion_tokens=(7, 9))
PLACES = [Place("http://a/v1", "x"), Place("http://a/v1", "y"), Place("http://b/v1", "z")]


def runs(*tokens_per_s: float) -> list[Run]:
    return [Run([Answer(0.1, 1.0, 100)], 100 / figure) for figure in tokens_per_s]


def test_a_load_asks_in_turn_and_is_the_same_for_the_same_seed() -> None:
    asks = LOAD.asks(PLACES, seed=1)
    assert [ask.place for ask in asks[:4]] == [*PLACES, PLACES[0]]
    assert len(asks) == 40
    assert {len(ask.prompt) for ask in asks} == {3, 4, 5}
    assert {ask.completion_tokens for ask in asks} == {7, 8, 9}
    assert asks == LOAD.asks(PLACES, seed=1) != LOAD.asks(PLACES, seed=2)


def test_the_worse_way_counts_round_by_round() -> None:
    figures = {"one": runs(10, 20, 90), "many": runs(12, 30, 60), STOCK: runs(10, 10, 30), STRAIGHT: runs(5, 5, 5)}
    lowest = worse("figure", ">=", 1.2, figures, lambda run: run.tokens_per_s)
    assert lowest.value == lowest.detail["median"] == 2  # of 1.2, 3 and 2; the other has 1, 2 and 3
    assert lowest.holds
    figures["many"] = runs(50, 50, 50)
    assert worse("figure", ">=", 1.2, figures, lambda run: run.tokens_per_s).detail["worse"] == "one"
    highest = worse("figure", "<=", 1.2, figures, lambda run: run.tokens_per_s)
    assert highest.detail["worse"] == "many"
    assert highest.value == 5
    assert not highest.holds
    assert highest.detail["÷ the same engine"]["many"]["median"] == 10


async def test_the_reason_of_a_failed_load_is_told() -> None:
    async def failing() -> Bar:
        raise ExceptionGroup("tasks", [ExceptionGroup("more", [RuntimeError("answered 503")]), ValueError("later")])

    assert (await attempted("figure", failing())).detail["why"] == "RuntimeError: answered 503"
