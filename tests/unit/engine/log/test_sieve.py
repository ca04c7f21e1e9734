"""The lines of an engine's output that are kept."""

import time

import pytest

from lmaas.engine.log import sieve
from lmaas.engine.log.sieve import BURST_BYTES, LINE_BYTES, NOTE_S, RATE_BYTES, Sieve, crash_line

MARK = "\x020123456789abcdef "
SECRET = "SECRETTEXT"


def sealed(now: float = 0.0) -> Sieve:
    """A sieve of an engine that serves tenants."""
    made = Sieve()
    made.seal(MARK, now)
    return made


def record(text: str) -> bytes:
    return f"{MARK}{text}\n".encode()


def test_everything_passes_before_the_seal() -> None:
    made = Sieve()
    assert made.feed(b"[12:00:00] /project/cpp/a.cc:1: hi\nTraceback ", 0) == b"[12:00:00] /project/cpp/a.cc:1: hi\n"
    assert made.feed(b"(most recent\n", 0) == b"Traceback (most recent\n"
    assert made.end(0) == b""


def test_only_records_pass_after_it_without_their_marks() -> None:
    made = sealed()
    data = b"[12:00:00] /project/cpp/a.cc:1: " + SECRET.encode() + b"\n" + record("(EngineCore pid=1) INFO ok") + b"print\n"
    assert (
        made.feed(data, -sieve.NOTE_S)
        == b"(EngineCore pid=1) INFO ok\n" + b"lmaas: 2 lines (49 bytes) of the engine's output were left out\n"
    )


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_records_are_found_wherever_the_pieces_end(size: int) -> None:
    made = sealed()
    made.note(0)
    data = b"".join(record(f"record {number}") + f"{SECRET}\n".encode() for number in range(40))
    kept = b"".join(made.feed(data[at : at + size], 0) for at in range(0, len(data), size))
    lines = [line for line in kept.decode().splitlines() if not line.startswith("lmaas:")]
    assert lines == [f"record {number}" for number in range(40)]


def test_a_record_behind_output_without_a_line_break_passes() -> None:
    made = sealed()
    assert made.feed(SECRET.encode() * 5000 + record("found"), 0).startswith(b"found\n")


def test_a_mark_of_another_engine_is_none() -> None:
    assert sealed().feed(b"\x02fedcba9876543210 (EngineCore pid=1) INFO " + SECRET.encode() + b"\n", 0).startswith(b"lmaas: 1 lines")


@pytest.mark.parametrize("break_every", [10, 5_000_000])
def test_a_flood_becomes_one_line_and_is_cheap(break_every: int) -> None:
    made = sealed()
    line = (SECRET * (break_every // len(SECRET) + 1))[: break_every - 1] + "\n"
    flood = (line * (5_000_000 // break_every)).encode()
    began = time.process_time()
    kept = b"".join(made.feed(flood[at : at + 65536], 1.0) for at in range(0, len(flood), 65536)) + made.end(1.0)
    # 500,000 lines are more than 999 wrong characters of a pattern produce.
    assert time.process_time() - began < 8
    assert len(kept) < 200
    assert SECRET not in kept.decode()
    assert sum(int(part.split()[1]) for part in kept.decode().splitlines()) == len(flood) // break_every


def test_growth_is_bounded_and_notes_are_rare() -> None:
    made = sealed()
    text = "x" * 999
    kept = 0
    for tenth in range(600):
        kept += len(made.feed(record(text) * 50, tenth / 10))
    assert BURST_BYTES < kept < BURST_BYTES + 60 * (RATE_BYTES + 100)
    assert made.owes_note
    assert made.feed(b"", 60.0 + NOTE_S).count(b"were left out") == 1
    assert not made.owes_note


def test_the_last_lines_before_the_end_are_kept_also_after_a_flood() -> None:
    made = sealed()
    made.feed(record("y" * 1000) * 100 + record("y") * 1000, 0)
    last = record("(EngineCore pid=1) ERROR EngineCore encountered a fatal error.") + b"Fatal Python error: Segmentation fault\n"
    made.feed(last, 0)
    kept = made.end(0).decode()
    assert kept.endswith("EngineCore encountered a fatal error.\nFatal Python error: Segmentation fault\n")
    assert len(kept) < (sieve.LAST_LINES + 2) * 1100
    assert made.end(0) == b""


def test_lines_are_bounded_before_the_seal() -> None:
    kept = Sieve().feed(b"a" * 3 * LINE_BYTES + b"\n", 0)
    assert kept.startswith(b"a" * LINE_BYTES + b" ")
    assert f"{2 * LINE_BYTES} bytes left out".encode() in kept
    assert len(kept) < LINE_BYTES + 100


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("Fatal Python error: Segmentation fault", "Fatal Python error: Segmentation fault"),
        (f"Fatal Python error: {SECRET}", "Fatal Python error"),
        ("Current thread 0x00007f1 (most recent call first):", "Thread (most recent call first):"),
        ("Thread 0x00007f1b [EngineCore] (most recent call first):", "Thread (most recent call first):"),
        (f'  File "{__file__}", line 12 in {SECRET}', f'  File "{__file__}", line 12'),
        (f'  File "{__file__}", line 12, in {SECRET}', f'  File "{__file__}", line 12'),
        (f'  File "/{SECRET}.py", line 12 in f', ""),
        ("Traceback (most recent call last):", "Traceback (most recent call last):"),
        (f"ValueError: {SECRET}", "ValueError (text left out)"),
        ("KeyboardInterrupt", "KeyboardInterrupt (text left out)"),
        (f"torch.OutOfMemoryError: {SECRET}", "torch.OutOfMemoryError (text left out)"),
        (f"vllm.{SECRET}Error: x", "vllm.… (text left out)"),
        ("json.a_secret_project:", ""),
        ("re.alice_smith_123456789", ""),
        (f"{SECRET}Error: {SECRET}", ""),
        (f"secret.{SECRET}: {SECRET}", ""),
        (
            "terminate called after throwing an instance of 'std::bad_alloc'",
            "terminate called after throwing an instance of 'std::bad_alloc'",
        ),
        (f"terminate called after throwing an instance of '{SECRET}'", "terminate called"),
        (f"  what():  {SECRET}", ""),
        ("*** SIGSEGV received at time=1 on cpu 0 ***", "*** SIGSEGV ***"),
        ("Segmentation fault (core dumped)", "Segmentation fault"),
        (f"Exception in thread {SECRET}:", "Exception in thread"),
        ("free(): invalid pointer", "free():"),
        ("double free or corruption (!prev)", "double free or corruption"),
        (f"[21:18:08] /project/cpp/regex_converter.cc:1: {SECRET}", ""),
        (f"INFO:     {SECRET}", ""),
        (f"(EngineCore pid=1) ERROR 11-29 12:00:00 [core.py:1] {SECRET}", ""),
        (f"    raise ValueError({SECRET})", ""),
        ("", ""),
    ],
)
def test_of_a_crash_the_known_words_are_kept(line: str, kept: str) -> None:
    assert crash_line(line) == kept
