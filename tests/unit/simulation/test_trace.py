"""Reading traces: known columns, corrections, and errors with their lines."""

import io
from itertools import pairwise
from pathlib import Path

import pytest

from lmaas.simulation.generate import DAY_S, Day, generate
from lmaas.simulation.reading import AZURE, MAX_LINE, Assignment, Columns, read_trace
from lmaas.simulation.trace import Request, TraceError, write_trace

HEADER = "time,tenant,adapter,prompt_tokens,completion_tokens\n"
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def read(file: Path, text: str | bytes, columns: Columns | None = None, rule: Assignment | None = None) -> list[Request]:
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_trace(file, columns, rule))


def test_times_count_from_the_first_request_and_an_adapter_is_its_tenants(file: Path) -> None:
    assert read(file, HEADER + "100,acme,bot,12,3\n101.5,globex,bot,7,1\n102,acme,,1,1\n") == [
        Request(0.0, "acme", "acme/bot", 12, 3),
        Request(1.5, "globex", "globex/bot", 7, 1),
        Request(2.0, "acme", "", 1, 1),
    ]


def test_columns_may_be_in_any_order_and_others_are_left_alone(file: Path) -> None:
    text = "completion_tokens,region,time,prompt_tokens,adapter,tenant\n3,eu,5,12,bot,acme\n"
    assert read(file, text) == [Request(0.0, "acme", "acme/bot", 12, 3)]


def test_columns_may_be_called_otherwise(file: Path) -> None:
    columns = Columns(time="at", tenant="who", adapter=None, prompt_tokens="in", completion_tokens="out")
    rule = Assignment(adapters=0)
    assert read(file, "at,who,in,out\n1,acme,5,6\n", columns, rule) == [Request(0.0, "acme", "", 5, 6)]


@pytest.mark.parametrize("columns", [AZURE, None])
def test_the_columns_of_the_azure_traces_are_known(file: Path, columns: Columns | None) -> None:
    # The format of AzureLLMInferenceTrace_conv.csv (2023), and of the week of 2024.
    text = AZURE_HEADER + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    first, second = read(file, text, columns)
    assert second.at_s == pytest.approx(4.314579, abs=2e-6)
    assert (first.prompt_tokens, first.completion_tokens, second.completion_tokens) == (374, 44, 109)
    [later] = read(file, AZURE_HEADER + "2024-05-10 00:00:00.009930+00:00,2162,5\n", columns)
    assert later.prompt_tokens == 2162


def test_the_columns_of_burstgpt_are_known(file: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    first, second = read(file, header + "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,87,0,87,API log\n")
    assert (first.at_s, first.prompt_tokens, first.completion_tokens) == (0, 472, 18)
    assert (second.at_s, second.prompt_tokens, second.completion_tokens) == (40, 87, 1)


def test_the_json_lines_of_mooncake_are_known(file: Path) -> None:
    text = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
    first, second = read(file, text + '{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46]}')
    assert second.at_s == pytest.approx(3.053)
    assert (first.prompt_tokens, first.completion_tokens, second.prompt_tokens) == (6955, 52, 6472)


def test_json_lines_may_have_our_names(file: Path) -> None:
    text = '{"time": "2026-01-01T00:00:00Z", "tenant": "acme", "adapter": "bot", "prompt_tokens": 12.0, "completion_tokens": 3}\n'
    assert read(file, "\ufeff" + text) == [Request(0.0, "acme", "acme/bot", 12, 3)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n{"timestamp": 2}\n', "line 2 has no number or text 'input_length'"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}\n', "line 1 has no number or text 'timestamp'"),
        ('{"timestamp": 1, "input_length": [1], "output_length": 1}\n', "line 1 has no number or text 'input_length'"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1}\n[1]\n', "line 2 is no JSON object"),
        ('{"timestamp": 1, "input_length"\n', "line 1 is not JSON"),
        ('{"at": 1}\n', "line 1 has no number or text 'time'. It has: at"),
        ('{"at": "' + "x" * MAX_LINE, "line 1 has more than 1,000,000 characters"),
        ("{" * 100_000, "line 1 is not JSON"),
    ],
)
def test_what_is_wrong_in_json_lines_is_said_with_its_line(file: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError) as raised:
        read(file, text)
    assert says in raised.value.message


def test_a_slice_and_a_sample_begin_at_their_first_request(file: Path) -> None:
    file.write_text(HEADER + "".join(f"{second},a,,1,1\n" for second in range(1000)))
    trace = read_trace(file)
    part = trace.part(100, 200)
    assert (len(part), part.span_s, next(iter(part)).at_s) == (100, 99, 0)
    some = trace.sample(0.1, seed=1)
    assert 60 < len(some) < 140
    assert list(some) == list(trace.sample(0.1, seed=1)) != list(trace.sample(0.1, seed=2))
    assert len(trace.sample(1, seed=1)) == 1000
    with pytest.raises(TraceError, match="No request of the trace is left"):
        trace.part(2000, 3000)


def test_a_context_refuses_prompts_and_ends_completions(file: Path) -> None:
    file.write_text(HEADER + "1,a,,100,5\n2,a,,99,5\n3,a,,90,50\n4,a,,90,10\n")
    trace = read_trace(file).within(100)
    assert [(request.prompt_tokens, request.completion_tokens) for request in trace] == [(99, 1), (90, 10), (90, 10)]
    assert trace.remarks == [
        "1 requests are left out: their prompts do not fit a context of 100 tokens.",
        "2 completions end at the context length of 100 tokens.",
    ]
    with pytest.raises(TraceError, match="a longer context"):
        trace.within(10)


def test_who_asked_is_made_up_by_the_seed(file: Path) -> None:
    text = AZURE_HEADER + "".join(f"2023-11-16 18:{minute:02}:{second:02},10,5\n" for minute in range(60) for second in range(0, 60, 2))
    rule = Assignment(tenants=20, adapters=3, seed=1)
    tenants = [request.tenant for request in read(file, text, rule=rule)]
    assert tenants == [request.tenant for request in read(file, text, rule=rule)]
    assert tenants != [request.tenant for request in read(file, text, rule=Assignment(tenants=20, adapters=3, seed=2))]
    # In any ten minutes some tenants are active, and the others are not.
    assert 2 < len(set(tenants)) <= 20
    assert all(len(set(tenants[start : start + 300])) < 15 for start in range(0, 1800, 300))
    assert {request.adapter.rpartition("/")[2] for request in read(file, text, rule=rule)} == {"adapter-1", "adapter-2", "adapter-3"}


def test_requests_out_of_order_are_sorted_and_that_is_said(file: Path) -> None:
    file.write_text(HEADER + "9,a,,1,1\n3,b,,2,1\n4,c,,3,1\n1,d,,4,1\n")
    trace = read_trace(file)
    assert [(request.at_s, request.tenant) for request in trace] == [(0, "d"), (2, "b"), (3, "c"), (8, "a")]
    assert trace.remarks == ["2 requests came before the one above them: sorted by time."]


def test_no_tokens_are_taken_for_one_and_that_is_said(file: Path) -> None:
    file.write_text(HEADER + "1,a,,0,5\n2,a,,5,0\n3,a,,5,5\n")
    trace = read_trace(file)
    assert [(request.prompt_tokens, request.completion_tokens) for request in trace] == [(1, 5), (5, 1), (5, 5)]
    assert trace.remarks == ["2 requests without a prompt or a completion token: taken for one token."]


def test_spreadsheets_write_byte_order_marks_empty_lines_and_whole_numbers_with_a_point(file: Path) -> None:
    assert read(file, "\ufeff" + HEADER.replace("\n", "\r\n") + '\r\n"1","acme","","12.0",3\r\n\r\n') == [Request(0.0, "acme", "", 12, 3)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no header line"),
        ("\n", "no header line"),
        (HEADER, "there is no request in it"),
        ("time,tenant\n1,a\n", "The header has no column 'adapter', 'prompt_tokens', 'completion_tokens'. It has: time, tenant."),
        ("time,tenant,adapter,time,prompt_tokens,completion_tokens\n", "the column 'time' twice"),
        (HEADER + "1,a,,1,1\n2,a,,1\n", "line 3 has 4 fields, but the header has 5"),
        (HEADER + "1,a,,1,1\nnoon,a,,1,1\n", "line 3: 'noon' is not a time"),
        (HEADER + "nan,a,,1,1\n", "line 2: 'nan' is not a time"),
        (HEADER + "inf,a,,1,1\n", "line 2: 'inf' is not a time"),
        (HEADER + "1,a,,1,1\n2026-01-01 00:00:00,a,,1,1\n", "line 3: '2026-01-01 00:00:00' is a date, unlike the times above it"),
        (HEADER + "1,a,,-5,1\n", "line 2: prompt_tokens is -5, which is not between 0 and 10000000"),
        (HEADER + "1,a,,5,1e9\n", "line 2: completion_tokens is 1e9, which is not between"),
        (HEADER + "1,a,,many,1\n", "line 2: prompt_tokens is 'many', which is not a whole number"),
        (HEADER + "1,a,,1.5,1\n", "line 2: prompt_tokens is '1.5', which is not a whole number"),
        (HEADER + "1,a,,nan,1\n", "line 2: prompt_tokens is 'nan', which is not a whole number"),
        (HEADER + "1,a,,inf,1\n", "line 2: prompt_tokens is 'inf', which is not a whole number"),
        (HEADER + "1,a,,,1\n", "line 2: prompt_tokens is '', which is not a whole number"),
        (HEADER + "1, ,,1,1\n", "line 2 names no tenant"),
        (HEADER + '1,"a,,1,1\n2,a,,1,1\n', "is not CSV"),
        (HEADER.encode() + b"1,a\x00,,1,1\n2,\xff\xfe,,1,1\n", "not UTF-8"),
        (b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(file: Path, text: str | bytes, says: str) -> None:
    with pytest.raises(TraceError) as raised:
        read(file, text)
    assert says in raised.value.message
    assert str(file) in raised.value.message


def test_a_missing_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)


def test_a_field_without_an_end_is_no_reason_to_read_everything(file: Path) -> None:
    with pytest.raises(TraceError, match="line 2 is not CSV: field larger than"):
        read(file, HEADER + '1,"' + "x" * 200_000)


def test_what_is_written_is_read_again(file: Path) -> None:
    made = generate(Day(seed=3, bursts=20, adapters=2))
    text = io.StringIO()
    write_trace(made, text)
    again = read(file, text.getvalue())
    assert [(one.tenant, one.adapter, one.prompt_tokens, one.completion_tokens) for one in again] == [
        (one.tenant, one.adapter, one.prompt_tokens, one.completion_tokens) for one in made
    ]
    assert all(abs(one.at_s - other.at_s) < 0.0011 for one, other in zip(again, made, strict=True))


def test_a_day_is_the_same_for_a_seed_and_has_all_that_it_is_said_to_have() -> None:
    day = generate(Day(seed=5))
    assert list(day) == list(generate(Day(seed=5)))
    assert list(day) != list(generate(Day(seed=6)))
    assert 0.9 * DAY_S < day.span_s <= DAY_S
    assert 45 <= len(day.tenants) <= 50
    counts = dict.fromkeys(day.tenants, 0)
    by_hour = [0] * 25
    for request in day:
        counts[request.tenant] += 1
        by_hour[int(request.at_s // 3600)] += 1
        assert min(request.prompt_tokens, request.completion_tokens) >= 1
        assert max(request.prompt_tokens, request.completion_tokens) <= 1000
    # Zipf: the first has a fifth of all, half of the tenants have a tenth; and it is quiet at night.
    assert 0.15 < counts["tenant-01"] / len(day) < 0.32
    assert sum(sorted(counts.values())[:25]) / len(day) < 0.2
    assert sum(by_hour[9:15]) > 4 * (sum(by_hour[:3]) + sum(by_hour[21:]))
    # Fifteen hundred bursts of three minutes with a request every six seconds, more or less.
    assert 35_000 < len(day) < 58_000


def test_bursts_are_bursts() -> None:
    times = [request.at_s for request in generate(Day(seed=1)) if request.tenant == "tenant-10"]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert sum(gap < 30 for gap in gaps) > 0.8 * len(gaps)
    assert max(gaps) > 1800
