"""Tiny traces on the virtual clock, added up by hand: the real queue, the real autoscaler, engines with round numbers."""

import math

import pytest
from redis import Redis

from lmaas.simulation.generate import Day, generate
from lmaas.simulation.replay import Arrangement, Options, replay
from lmaas.simulation.tally import Span
from lmaas.simulation.trace import Request
from tests.integration.simulation.conftest import Replay

SHARED, ZERO, ALWAYS = Arrangement.SHARED, Arrangement.SCALE_TO_ZERO, Arrangement.ALWAYS_ON
#: Time after the idle timeout: the controller notices at its next tick, the supervisor half a second later, and the stop takes a second.
STOPPING_S = 1.5


def ask(at_s: float, tenant: str = "a", adapter: str = "", prompt: int = 100, completion: int = 11) -> Request:
    return Request(at_s, tenant, adapter, prompt, completion)


def test_one_request_costs_a_start_its_run_and_the_idle_timeout(play: Replay) -> None:
    result = play(SHARED, ask(0))
    # Launched at 1, ready at 3, first token at 3.2, done at 4.2; idle for ten seconds at 14.2, noticed at 15, gone at 16.5.
    [span] = result.tally.spans
    assert span.launched_s == pytest.approx(1.0)
    assert span.ended_s == pytest.approx(16.5)
    assert result.tally.engine_s == pytest.approx(2.0 + 1.2 + 10.0 + 0.8 + STOPPING_S)
    assert list(result.tally.ttft_s) == [pytest.approx(3.2)]
    assert list(result.tally.total_s) == [pytest.approx(4.2)]
    assert (result.tally.starts, result.tally.cold_requests) == (1, 1)
    assert result.tally.busy_s == pytest.approx(1.2)


def test_an_engine_that_is_always_on_has_no_start_and_never_stops(play: Replay) -> None:
    result = play(ALWAYS, ask(0), ask(100))
    # It is charged for the trace's own time, and not until its last request is done.
    assert result.tally.engine_s == pytest.approx(100)
    assert list(result.tally.ttft_s) == [pytest.approx(0.2), pytest.approx(0.2)]
    assert (result.tally.starts, result.tally.cold_requests) == (0, 0)


def test_each_tenant_has_an_engine_of_its_own_or_they_share_one(play: Replay) -> None:
    requests = [ask(0, "a"), ask(0, "b")]
    one = play(SHARED, ask(0)).tally.engine_s
    assert play(ALWAYS, *requests).tally.most_engines() == 2
    assert play(ZERO, *requests).tally.engine_s == pytest.approx(2 * one)
    shared = play(SHARED, *requests)
    # Both prompts in one step, which is a tenth of a second longer.
    assert shared.tally.engine_s == pytest.approx(one)
    assert shared.tally.busy_s == pytest.approx(1.3)


def test_a_request_within_the_idle_timeout_finds_the_engine_and_one_after_it_does_not(play: Replay) -> None:
    warm = play(SHARED, ask(0), ask(12))
    assert warm.tally.starts == 1
    assert warm.ttft_s == [pytest.approx(0.2), pytest.approx(3.2)]
    cold = play(SHARED, ask(0), ask(40))
    assert cold.tally.starts == 2
    assert cold.ttft_s == [pytest.approx(3.2), pytest.approx(3.2)]


def test_a_request_that_comes_while_the_engine_stops_has_another_started_once_it_is_gone(play: Replay) -> None:
    # At 15 the controller has decided to stop it, at 15.5 it takes no more work, at 16.5 it is gone: there is room for one engine.
    result = play(SHARED, ask(0), ask(15.7))
    first, second = result.tally.spans
    assert first.ended_s == pytest.approx(16.5)
    assert second.launched_s > first.ended_s
    assert result.tally.completed == 2


def test_what_is_granted_at_the_last_moment_is_not_cut(play: Replay) -> None:
    result = play(SHARED, ask(0), ask(15.2, completion=51))
    # Its engine receives the stop at 15.5; it ends after the last token, at 15.2 + 0.2 + 5.0.
    assert result.tally.starts == 1
    assert result.tally.spans[0].ended_s == pytest.approx(20.4 + 1.0, abs=0.11)


def test_no_more_run_at_once_than_there_are_slots(play: Replay) -> None:
    result = play(ALWAYS, *(ask(0) for _ in range(5)))
    # One prompt until 0.2, three until 0.6, and nine more steps of the first: the fifth begins at 1.5.
    assert result.ttft_s == [pytest.approx(0.2), *[pytest.approx(0.6)] * 3, pytest.approx(1.7)]


def test_more_engines_come_for_more_requests_and_go_after_the_idle_timeout(play: Replay) -> None:
    result = play(SHARED, *(ask(0, completion=101) for _ in range(8)), max_replicas=3)
    assert result.tally.most_engines() == 2
    assert result.tally.completed == 8
    assert all(span.ended_s - span.launched_s < 2 + 11 + 10 + 1 + STOPPING_S + 0.1 for span in result.tally.spans)


def test_an_adapter_that_the_engine_lacks_is_loaded_first(play: Replay) -> None:
    result = play(ALWAYS, ask(0, adapter="a/one"), ask(50, adapter="a/one"))
    assert list(result.tally.ttft_s) == [pytest.approx(0.25 + 0.2), pytest.approx(0.2)]


def test_an_adapter_that_is_waited_for_is_loaded_before_the_engine_is_ready(play: Replay) -> None:
    assert list(play(SHARED, ask(0, adapter="a/one")).tally.ttft_s) == [pytest.approx(3.25 + 0.2)]


def test_no_more_adapters_run_at_once_than_there_are_adapter_slots(play: Replay) -> None:
    adapters = [ask(0, adapter=f"a/{number}") for number in range(3)]
    result = play(ALWAYS, *adapters)
    assert result.ttft_s[2] > result.ttft_s[1] + 1.0


def test_an_engine_keeps_as_many_adapters_as_it_has_room_for(play: Replay) -> None:
    again = [ask(20 * number, adapter=f"a/{number % 5}") for number in range(10)]
    # Five adapters in turn, and room for four: each is gone when its next request comes.
    assert list(play(ALWAYS, *again).tally.ttft_s) == [pytest.approx(0.45)] * 10
    assert list(play(ALWAYS, *again, adapters_resident=5).tally.ttft_s) == [*[pytest.approx(0.45)] * 5, *[pytest.approx(0.2)] * 5]


def test_who_waits_for_too_long_is_given_up(play: Replay) -> None:
    result = play(ALWAYS, *(ask(0, completion=1001) for _ in range(5)), deadline_s=20.0)
    assert (result.tally.completed, result.tally.expired) == (4, 1)


def test_who_waited_and_runs_is_not_given_up(play: Replay) -> None:
    # The engine is ready at 3; it runs until 13.2, long after the deadline of the waiting request.
    result = play(SHARED, ask(0, completion=101), deadline_s=5.0)
    assert (result.tally.completed, result.tally.expired) == (1, 0)


def test_who_finds_a_full_queue_is_refused(play: Replay) -> None:
    result = play(ALWAYS, *(ask(0) for _ in range(7)), max_queued=2)
    assert (result.tally.completed, result.tally.refused) == (6, 1)


def test_tenants_that_wait_take_turns_by_tokens(play: Replay) -> None:
    def wait_of_the_last(tenant: str) -> float:
        flood = [ask(0, "flood", completion=41) for _ in range(40)]
        tally = play(ALWAYS if tenant == "flood" else SHARED, *flood, ask(5, tenant, completion=1)).tally
        # The only request whose first token is its last.
        [wait_s] = [ttft_s for ttft_s, total_s in zip(tally.ttft_s, tally.total_s, strict=True) if ttft_s == total_s]
        return wait_s

    # Four at a time, each for more than four seconds: ten rounds, and the flood's own next request waits for all of them.
    assert wait_of_the_last("flood") > 30
    assert wait_of_the_last("polite") < 6


@pytest.mark.parametrize("arrangement", Arrangement)
def test_every_request_of_a_random_day_ends_once_with_its_own_tokens(server: Redis, arrangement: Arrangement) -> None:
    made = generate(Day(seed=7, tenants=6, adapters=2, bursts=25, length_s=4 * 3600))
    tally = replay(made, arrangement, Options(), server).tally
    assert tally.completed == len(made) == len(tally.ttft_s)
    assert (tally.expired, tally.refused) == (0, 0)
    assert (tally.prompt_tokens, tally.completion_tokens) == made.tokens
    if arrangement is not ALWAYS:
        # Nothing is left in the queue.
        left = {str(key).rpartition(":")[2] for key in server.scan_iter("lmaas:*")}
        assert not left & {"tickets", "queue", "expiry", "needs", "replicas"}
    # Engines exist as long as something runs, and for the idle timeout at most.
    assert tally.busy_s < tally.engine_s


def test_the_same_seed_gives_the_same_outcome_and_another_seed_another(server: Redis) -> None:
    def outcome(seed: int) -> tuple[list[float], list[Span]]:
        tally = replay(generate(Day(seed=seed, bursts=20, length_s=3600)), SHARED, Options(), server).tally
        return list(tally.ttft_s), tally.spans

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)


def test_cost_is_the_engines_time_at_their_price(play: Replay) -> None:
    result = play(ALWAYS, ask(0), ask(3600), engine_price=400_000)
    assert result.tally.engine_s == pytest.approx(3600.0)
    assert result.cost_microusd == 400_000


def test_percentiles_are_of_nothing_if_nothing_was_completed(play: Replay) -> None:
    result = play(ALWAYS, ask(0), max_queued=1)
    assert result.ttft_percentile_s(50) == pytest.approx(0.2)
    assert math.isnan(type(result)(ALWAYS, result.tally, 0, []).ttft_percentile_s(50))
