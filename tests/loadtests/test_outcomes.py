"""What a load's summary says: hits, fresh answers and refusals apart, on counts that are known."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from loadtests.locust_run import show
from loadtests.outcomes import kind_of, plain_name, row_name, summarise


@dataclass
class Row:
    name: str
    num_requests: int
    response_times: dict[int, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("status", "cache_status", "expected"),
    [
        (200, "ironclip; hit", "hits"),
        (200, "ironclip; fwd=miss", "fresh"),
        (200, "ironclip; fwd=miss; detail=3-of-4", "fresh"),
        (201, "", "fresh"),
        (429, "", "refused"),
        (503, "ironclip; hit", "refused"),
        (422, "", "failed"),
        (0, "", "failed"),
    ],
)
def test_an_answer_is_of_one_kind(status: int, cache_status: str, expected: str) -> None:
    assert kind_of(status, cache_status) == expected


def test_a_rows_name_has_the_requests_in_it() -> None:
    assert plain_name(row_name("classify by label set", "hits")) == "classify by label set"
    assert plain_name("a name of old") == "a name of old"


def test_neither_hits_nor_refusals_are_among_the_fresh() -> None:
    entries = [
        Row(row_name("classify", "fresh"), 100, {100: 90, 400: 10}),
        Row(row_name("classify", "hits"), 300, {2: 300}),
        Row(row_name("classify", "refused"), 600, {1: 600}),
        Row(row_name("embed", "fresh"), 50, {80: 50}),
        Row(row_name("embed", "failed"), 2, {30_000: 2}),
    ]
    rows, total = summarise(entries, seconds=10.0)
    classify = rows["classify"]
    assert classify["fresh"] == {"requests": 100, "per_second": 10.0, "p50_ms": 100, "p95_ms": 400, "p99_ms": 400}
    assert classify["hits"] == {"requests": 300, "per_second": 30.0, "p50_ms": 2, "p95_ms": 2, "p99_ms": 2}
    assert (classify["refused"]["requests"], classify["refused"]["per_second"]) == (600, 60.0)
    # What was answered, and how soon: 600 refusals in a millisecond are no rate and no latency of a service.
    assert (classify["requests"], classify["failures"], classify["per_second"]) == (1000, 600, 40.0)
    assert (classify["p50_ms"], classify["p95_ms"], classify["p99_ms"]) == (2, 100, 400)
    assert (rows["embed"]["failures"], rows["embed"]["failed"]["requests"]) == (2, 2)
    assert "hits" not in rows["embed"]
    assert (total["requests"], total["failures"], total["per_second"]) == (1052, 602, 45.0)
    assert (total["fresh"]["requests"], total["hits"]["requests"], total["refused"]["requests"]) == (150, 300, 600)


def test_what_nobody_answered_has_no_rate() -> None:
    rows, total = summarise([Row(row_name("probe", "refused"), 3, {1: 3})], seconds=0.0)
    assert (rows["probe"]["per_second"], rows["probe"]["p50_ms"], total["requests"]) == (0.0, 0, 3)
    assert summarise([], 10.0)[1]["requests"] == 0


def test_what_is_printed_has_them_apart(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [
        Row(row_name("classify", "fresh"), 10, {100: 10}),
        Row(row_name("classify", "hits"), 30, {2: 30}),
        Row(row_name("classify", "refused"), 5, {1: 5}),
    ]
    rows, total = summarise(entries, 10.0)
    failures = [
        {"name": "classify", "reason": "429 overloaded", "times": 5},
        {"name": "classify", "reason": "422", "times": 1},
    ]
    pictures = {"made": 1, "asked": 1, "came_again": False}
    assert show({"requests": rows, "total": total, "failures": failures, "fresh_pictures": pictures}) == 1
    said = capsys.readouterr().out
    assert "classify: 45 requests, 40 of them answered, 4.0 a second" in said
    assert "  fresh: 10, 1.0 a second, p50 100, p95 100, p99 100 ms" in said
    assert "  hits: 30, 3.0 a second, p50 2, p95 2, p99 2 ms" in said
    assert "  refused: 5, 0.5 a second" in said
