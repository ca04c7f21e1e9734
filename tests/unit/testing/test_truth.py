"""The record of what fake engines computed: one line for each token, and for each input that was embedded."""

import asyncio
from pathlib import Path

from lmaas.testing.generation import Sequence
from lmaas.testing.truth import TruthLog, read_truth


def test_the_tokens_of_generations_and_of_embedded_inputs_are_read_back(tmp_path: Path) -> None:
    record = TruthLog(tmp_path / "truth")
    wake = asyncio.Event()
    text = Sequence(0, "m", 7, [], (b"a", b"b"), b"stop", b"null", wake, request="req_text")
    for text.made in range(3):
        record(text)
    for size in (3, 4):
        # The parts of a request have the same id, and count from 0 again.
        record(Sequence(0, "m", size, [], (), b"stop", b"null", wake, request="req_embedded"))
    found = read_truth(tmp_path / "truth")
    (generated,), (embedded,) = found["req_text"], found["req_embedded"]
    assert (generated.prompt_tokens, generated.tokens) == (7, 2)
    assert (embedded.prompt_tokens, embedded.tokens) == (7, 0)
