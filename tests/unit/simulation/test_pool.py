"""The number of engines over time, from their spans."""

from lmaas.simulation.tally import Span, engines_over_time


def test_how_many_engines_there_are_over_time() -> None:
    assert engines_over_time([Span(0, 10), Span(5, 20), Span(10, 12)]) == [(0, 1), (5, 2), (10, 2), (12, 1), (20, 0)]
