"""The batches and the windows of the bars about background work."""

import json
import random

from bench.background import TOKENS, WORDS, Window, batch_file, completion_tokens
from bench.client import Answer


def test_the_lines_of_a_batch_differ_and_say_how_long_their_answers_are() -> None:
    lines = batch_file("base", 50, random.Random(1))
    parsed = [json.loads(line) for line in lines.splitlines()]
    assert lines.endswith(b"\n")
    assert len({line["custom_id"] for line in parsed}) == len({line["body"]["messages"][0]["content"] for line in parsed}) == 50
    assert {line["body"]["model"] for line in parsed} == {"base"}
    assert all(WORDS[0] <= len(line["body"]["messages"][0]["content"].split()) <= WORDS[1] for line in parsed)
    lengths = [line["body"]["max_tokens"] for line in parsed]
    assert TOKENS[0] <= min(lengths) < max(lengths) <= TOKENS[1]
    assert completion_tokens(lines) == sum(lengths)


def test_a_window_has_the_medians_of_its_requests_and_of_all_tokens() -> None:
    window = Window(100.0, [Answer(0.1, 1.0, 3, (0.2, 0.3)), Answer(0.5, 1.0, 2, (0.1,)), Answer(0.2, 1.0, 3, (0.4, 0.5))])
    assert (window.ttft_s, window.itl_s) == (0.2, 0.3)
