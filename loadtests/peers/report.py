"""What a result of `python -m loadtests.peers run` says: medians over rounds, ratios within rounds, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Ours over the best peer's throughput at 32 clients, by dtype, and ours over the floor there.
AIMS = {"float32": 1.0, "bfloat16": 1.3}
FLOOR_AIM = 0.9
# How cells are made beyond the options; those that were made otherwise are not gone on with.
MEANT = {
    "goodput": "answered meanwhile",
    "environments": "one each",
    "floor": "servers stopped, rates of one",
    "asked for": "pictures unseen, also after the overload",
}
OURS = "ironclip"


@dataclass(frozen=True)
class Verdict:
    """A number held against its aim: the median over rounds or turns, the least and the largest."""

    what: str
    aim: float
    median: float
    least: float
    most: float
    over: str = "rounds"

    @property
    def met(self) -> bool:
        """Whether the median reaches the aim."""
        return self.median >= self.aim


class Report:
    """A result file's content.

    Args:
        content: of the file; cells may be missing or failed.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.plan: dict[str, Any] = content["plan"]
        self.cells: dict[str, dict[str, Any]] = content["cells"]

    def rounds(self, dtype: str, name: str) -> dict[str, dict[str, Any]]:
        """Finished cells of one server in one dtype, by round."""
        found = {}
        for key, cell in self.cells.items():
            part, its_dtype, its_name = key.split("/")
            if part.isdigit() and (its_dtype, its_name) == (dtype, name) and "failed" not in cell:
                found[part] = cell
        return found

    def names(self, dtype: str) -> list[str]:
        """Servers with a finished cell in a dtype, ours first, the others by throughput at 32 clients."""
        every = dict.fromkeys(key.split("/")[2] for key in self.cells)
        there = [name for name in every if self.rounds(dtype, name)]
        return sorted(there, key=lambda name: (name != OURS, -self._median(dtype, name, "images_per_second")))

    def failures(self) -> dict[str, str]:
        """Why a server has no number, by server and dtype."""
        found: dict[str, str] = {}
        for key, cell in self.cells.items():
            part, dtype, name = key.split("/")
            if "failed" in cell:
                where = f"{name} ({'absent' if cell.get('absent') else 'faults' if part == 'faults' else dtype})"
                found.setdefault(where, cell["failed"])
            found |= {f"{one} ({dtype}, in turns)": why for one, why in cell.get("out", {}).items()}
        return found

    def values(self, dtype: str, name: str, part: str, group: str, field: str) -> list[float]:
        """One number in every round; a missing one (no answer at all) as 0."""
        return [cell[part][group][field] or 0.0 for cell in self.rounds(dtype, name).values()]

    def _median(self, dtype: str, name: str, field: str, clients: str = "32") -> float:
        return statistics.median(self.values(dtype, name, "closed", clients, field))

    def verdicts(self, dtype: str) -> list[Verdict]:
        """Ours against the best of the others, and against the floor; none without our own cells."""
        ours = self.rounds(dtype, OURS)
        if not ours:
            return []
        shares = self.values(dtype, OURS, "closed", "32", "share_of_floor")
        beside = self._in_turns(dtype) or self._in_rounds(dtype)
        return [*([beside] if beside else []), _verdict("the floor at 32 clients", FLOOR_AIM, shares)]

    def _in_turns(self, dtype: str) -> Verdict | None:
        """Against the peer that ours stands worst beside, where all were there at once; None where they were not."""
        rates = self.cells.get(f"turns/{dtype}/all", {}).get("images_per_second", {})
        if OURS not in rates:
            return None
        found = [
            _verdict(
                f"the best peer ({name}) at 32 clients, all started and asked in turns, the others stopped (SIGSTOP)",
                AIMS[dtype],
                [mine / theirs for mine, theirs in zip(rates[OURS], other, strict=True)],
                "turns",
            )
            for name, other in rates.items()
            if name != OURS
        ]
        return min(found, key=lambda verdict: verdict.median, default=None)

    def _in_rounds(self, dtype: str) -> Verdict | None:
        """Against the best of each round, in which one was asked after the other."""
        ratios = []
        for number, cell in self.rounds(dtype, OURS).items():
            others = [
                other["closed"]["32"]["images_per_second"]
                for name in self.names(dtype)
                if name != OURS and (other := self.rounds(dtype, name).get(number))
            ]
            if others:
                ratios.append(cell["closed"]["32"]["images_per_second"] / max(others))
        return _verdict("the best peer at 32 clients", AIMS[dtype], ratios) if ratios else None

    def speed_rows(self, dtype: str) -> list[list[str]]:
        """A row a server: throughput, latency, goodput, cost; medians over rounds."""
        rows = []
        for name in self.names(dtype):
            cells = list(self.rounds(dtype, name).values())
            row = [f"**{name}**" if name == OURS else name]
            row += [f"{self._median(dtype, name, 'images_per_second', clients):.1f}" for clients in ("1", "8", "32")]
            row.append(f"{self._median(dtype, name, 'share_of_floor'):.0%}")
            row += [
                " / ".join(
                    f"{self._median(dtype, name, field, clients):.0f}" for field in ("p50_ms", "p95_ms", "p99_ms")
                )
                for clients in ("1", "32")
            ]
            row.append(f"{self._median(dtype, name, 'images_per_second', '32 half repeated'):.1f}")
            loads = ("0.5x floor", "0.8x floor", "2x floor")
            row.append(
                " / ".join(
                    f"{statistics.median(self.values(dtype, name, 'open', load, 'goodput_per_second')):.1f}"
                    for load in loads
                )
            )
            row.append(_recovery([cell["recovery_seconds"] for cell in cells]))
            row.append(f"{self._median(dtype, name, 'service_core_ms'):.0f}")
            row += [f"{statistics.median(cell[when]['mib'] for cell in cells):.0f}" for when in ("idle", "loaded")]
            row.append(f"{statistics.median(cell['ready_seconds'] for cell in cells):.1f}")
            rows.append(row)
        return rows

    def fault_rows(self) -> list[list[str]]:
        """A row a server: what a truncated picture and SIGTERM do to it."""
        rows = []
        for key, cell in self.cells.items():
            part, _, name = key.split("/")
            if part != "faults" or "failed" in cell:
                continue
            bad, stop = cell["truncated"], cell["sigterm"]
            gone = "no, killed" if stop["gone_seconds"] is None else f"after {stop['gone_seconds']:.1f} s"
            rows.append(
                [
                    f"**{name}**" if name == OURS else name,
                    {0: "connection broken", -1: "no answer"}.get(bad["status"], str(bad["status"])),
                    f"{bad['beside_answered']} of {bad['beside']}",
                    "yes" if bad["next_answered"] else "no",
                    "yes" if bad["says_ready_after"] else "no",
                    f"{stop['answered']} of {stop['in_flight']}",
                    gone,
                ]
            )
        return rows


SPEED_TITLES = [
    *("server", "images/s, 1 client", "8", "32", "of the floor"),
    *("p50 / p95 / p99 ms, 1 client", "32 clients", "half repeated, 32", "goodput at 0.5 / 0.8 / 2 of the floor"),
    *("well again", "core-ms an image", "MiB idle", "MiB loaded", "s to ready"),
]
FAULT_TITLES = [
    *("server", "a truncated JPEG", "those beside it", "the next", "says it is ready"),
    *("SIGTERM: in flight, answered", "process gone"),
]


def _recovery(seconds: Sequence[float | None]) -> str:
    found = [one for one in seconds if one is not None]
    if len(found) < len(seconds):
        return f"not in 30 s ({len(seconds) - len(found)} of {len(seconds)} rounds)"
    return f"{statistics.median(found):.1f} s"


def _verdict(what: str, aim: float, values: Sequence[float], over: str = "rounds") -> Verdict:
    return Verdict(what, aim, statistics.median(values), min(values), max(values), over)
