"""What became of a load's requests: answered anew, answered from a cache, refused, or failed otherwise.

Each is a row of its own to locust, so that neither rates nor latencies mix a forward with a look-up, or an answer with
a refusal that took a millisecond. Nothing here needs locust.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

ANSWERED = ("fresh", "hits")
KINDS = (*ANSWERED, "refused", "failed")
_REFUSALS = (429, 503)
_SHARES = (0.5, 0.95, 0.99)


class Entry(Protocol):
    """A row of locust's, as far as it is read here; `response_times` counts requests by their milliseconds."""

    name: str
    num_requests: int
    response_times: dict[int, int]


def kind_of(status: int, cache_status: str) -> str:
    """Which of KINDS an answer is, by its status and its `Cache-Status` (RFC 9211); status 0: there was none."""
    if status in (200, 201):
        return "hits" if "hit" in [part.strip() for part in cache_status.split(";")[1:]] else "fresh"
    return "refused" if status in _REFUSALS else "failed"


def row_name(name: str, kind: str) -> str:
    """What locust calls the requests of a name that ended in this way."""
    return f"{name} [{kind}]"


def plain_name(row: str) -> str:
    """The name in that of a row."""
    return row.rpartition(" [")[0] or row


def summarise(entries: Iterable[Entry], seconds: float) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Rows by name, and one of them all.

    A row's `per_second` and percentiles are those of what was answered, `failures` is all else; beside them stands the
    same of each kind that there was.

    Args:
        entries: of locust, one for each name and kind.
        seconds: that the load lasted.
    """
    found: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        kind = entry.name.removeprefix(plain_name(entry.name)).strip(" []") or "failed"
        found.setdefault(plain_name(entry.name), {}).setdefault(kind, []).append(entry)
    everything: dict[str, list[Entry]] = {}
    for kinds in found.values():
        for kind, of_kind in kinds.items():
            everything.setdefault(kind, []).extend(of_kind)
    return {name: _row(kinds, seconds) for name, kinds in found.items()}, _row(everything, seconds)


def _row(kinds: dict[str, list[Entry]], seconds: float) -> dict[str, Any]:
    answered = [entry for kind in ANSWERED for entry in kinds.get(kind, [])]
    others = [entry for kind, of_kind in kinds.items() if kind not in ANSWERED for entry in of_kind]
    failures = sum(entry.num_requests for entry in others)
    figures = _figures(answered, seconds)
    parts = {kind: _figures(kinds[kind], seconds) for kind in KINDS if kind in kinds}
    return {**figures, "requests": figures["requests"] + failures, "failures": failures, **parts}


def _figures(entries: list[Entry], seconds: float) -> dict[str, Any]:
    requests = sum(entry.num_requests for entry in entries)
    times: Counter[int] = Counter()
    for entry in entries:
        times.update(entry.response_times)
    percentiles = {f"p{round(100 * share)}_ms": _percentile(times, share) for share in _SHARES}
    return {"requests": requests, "per_second": round(requests / seconds, 2) if seconds > 0 else 0.0, **percentiles}


def _percentile(times: Counter[int], share: float) -> float:
    """The least time that so many requests do not pass; 0 of none."""
    wanted, passed = share * times.total(), 0
    for time in sorted(times):
        passed += times[time]
        if passed >= wanted:
            return time
    return 0
