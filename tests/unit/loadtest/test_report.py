"""lmaas's tables are the first of the report, with percentiles and errors by code."""

from typing import Any

import pytest

from loadtest.report import HEADINGS, added, error_rows, rows


@pytest.fixture
def stats(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Otherwise the import would change Python's own modules.
    monkeypatch.setenv("LOCUST_SKIP_MONKEY_PATCH", "1")
    from locust.stats import RequestStats

    found = RequestStats()
    for ms in range(1, 101):
        found.log_request("E2E", "steady adapter", ms * 10, 0)
        for kind, value in (("TTFT", ms), ("ITL", 5), ("queue", 2)):
            found.get("steady adapter", kind).log(value, 0)
    found.get("steady adapter", "tok/s").log(50, 100)
    found.log_error("E2E", "steady adapter", Exception("HTTP 500"))
    return found


def test_a_row_has_counts_and_percentiles(stats: Any) -> None:
    [row] = rows(stats)
    shown = dict(zip(HEADINGS[:6], row, strict=False))
    assert shown == {"requests of": "steady adapter", "answered": "99", "failed": "1", "429": "0", "cut": "0", "TTFT p50": "51"}
    assert row[5:17] == ("51", "91", "100", "5", "5", "5", "2", "2", "2", "510", "910", "1000")
    assert HEADINGS[5:17:3] == ("TTFT p50", "ITL p50", "queue p50", "E2E p50")


def test_errors_are_ordered_by_their_number() -> None:
    assert error_rows({("a", "HTTP 429 x"): 1, ("b", "HTTP 500 y"): 3}) == [("b", "HTTP 500 y", "3"), ("a", "HTTP 429 x", "1")]


def test_our_tables_come_first_and_show_text_as_text() -> None:
    page = added('<html><body class="x"><p>Locust</p></body></html>', [("<b>", *["1"] * 18)], [("<i>", "HTTP 500", "2")])
    assert page.index('<section id="lmaas">') < page.index("Locust")
    assert page.startswith('<html><body class="x"><style>')
    assert "<td>&lt;b&gt;</td>" in page
    assert "<td>&lt;i&gt;</td><td>HTTP 500</td><td>2</td>" in page
    assert "No request failed" in added("<body></body>", [])
    with pytest.raises(ValueError, match="no body"):
        added("nothing", [])
