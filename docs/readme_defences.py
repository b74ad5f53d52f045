"""What the README says of defences at decision time, made from ``docs/defences/cells`` alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from training.gates import worst_case
from training.ladder import load_ladder
from training.ladder_cells import Ladder, Pair, pair_of, read_ladder
from training.ladder_report import ladder_table
from training.ladder_words import fresh_pair, listed
from training.robustness import HELD, wilson

DEFENCES = Path(__file__).parent / "defences"
EPS = 2.0
ROW = "cola"
SAID = {
    "more": "more than without",
    "less": "less than without",
    "not told apart": "not told apart from no defence",
}
Pairs = Mapping[str, Pair | None]


@cache
def _ladder() -> Ladder:
    return read_ladder(DEFENCES / "cells", load_ladder("demo"))


def _encoders() -> list[str]:
    """Those that have been measured without a defence: there is nothing to hold others against before."""
    ladder = _ladder()
    return [spec for spec in ladder.config.encoders if ladder.clean(spec, ladder.undefended, EPS) is not None]


def defences_table() -> str:
    """A short table for each encoder that has cells, and how they were made; the report has plots and COLA's parts."""
    ladder, parts = _ladder(), []
    for encoder in _encoders():
        parts += [f"`{encoder}` at {EPS:g}/255:\n", _whole(ladder_table(ladder, encoder, EPS))]
    devices, dtypes = (
        ", ".join(sorted({cell["encoder"][part] for cell in ladder.every()})) for part in ("device", "dtype")
    )
    left = [f"`{spec}`" for spec in ladder.config.encoders if spec not in _encoders()]
    absent = f" Not measured yet: {', '.join(left)}." if left else ""
    parts.append(
        f"{ladder.pictures} pictures of {ladder.config.vendor}, drawn with seed 0; {dtypes}, in the form that is "
        f"served; measured on {devices}. Transfer examples were made on `{ladder.undefended}`, so there they are white "
        f"box for `{ladder.undefended}` itself.{absent}\n"
    )
    return "\n".join(parts)


def _whole(table: str) -> str:
    """The table without rows of a defence's parts: what has other options than its name's is in the report alone."""
    parts = tuple(f"| `{row}` |" for row, options in _ladder().config.defences.items() if set(options) != {"name"})
    return "\n".join(line for line in table.split("\n") if not line.startswith(parts))


def cola_verdict() -> str:
    """What COLA is good for and what not, as far as the cells say it; empty without an attack that sees it."""
    ladder = _ladder()
    base = ladder.undefended
    blind = {spec: ladder.pair(spec, ROW, base, ladder.transfer, EPS) for spec in _encoders()}
    seen = {spec: ladder.pair(spec, ROW, base, ladder.seeing, EPS) for spec in _encoders()}
    anew = {spec: fresh_pair(ladder, spec, ROW, EPS) for spec in _encoders()}
    kept = {spec: _clean(spec) for spec in _encoders()}
    if not any(seen.values()):
        return ""
    worst = f"the worst of {listed(ladder.transfer)}"
    parts = [
        _sentence(f"Against examples made for the undefended encoder, by attacks that do not see it ({worst})", blind),
        _sentence("When the attack goes through it and knows its draws", seen),
        _sentence("Where every decision draws anew and the attack averages over draws (by most draws)", anew),
        _sentence("Before any attack", kept),
        f"It costs {ladder.config.defence(ROW).cost} forwards a picture.",
        _advice(blind, seen, anew),
    ]
    return "**What COLA is good for and what not.** " + " ".join(part for part in parts if part) + "\n"


def _clean(encoder: str) -> Pair | None:
    ladder = _ladder()
    ours, theirs = (ladder.clean(encoder, row, EPS) for row in (ROW, ladder.undefended))
    return None if ours is None or theirs is None else pair_of(ours, theirs, clean=True)


def _sentence(when: str, pairs: Pairs) -> str:
    parts = []
    for encoder, pair in pairs.items():
        if pair is not None:
            low, high = pair.interval
            points = f"{pair.difference:+.1f} points, {low:+.1f} to {high:+.1f}"
            parts.append(f"{pair.ours:.1f} % on `{encoder}`, {SAID[pair.word]} ({pair.theirs:.1f} %; {points})")
    return f"{when} it has {'; '.join(parts)}." if parts else ""


def _advice(blind: Pairs, seen: Pairs, anew: Pairs) -> str:
    ladder = _ladder()

    def more(pairs: Pairs) -> list[str]:
        return [f"`{spec}`" for spec, pair in pairs.items() if pair is not None and pair.word == "more"]

    parts = []
    if more(blind):
        known = "" if more(seen) else ", and no protection, as far as these pictures show, against who knows its draws"
        parts.append(
            f"So it is good against pictures made for somebody else's CLIP (on {', '.join(more(blind))}){known}."
        )
    if more(seen):
        parts.append(f"Some of it is left when the attack knows its draws, on {', '.join(more(seen))}.")
    if more(anew):
        parts.append(
            f"Some of it is left against our attack where nobody knows its draws, on {', '.join(more(anew))}; but a "
            "service's seed is 0 unless settings or a request name another, and stands in every answer."
        )
    for encoder in _encoders()[1:]:
        found = ladder.present(encoder, ladder.undefended, ladder.seeing, EPS)
        if found:
            outcomes = worst_case(list(found.values()))
            low, high = wilson(outcomes.count(HELD), len(outcomes))
            parts.append(
                f"`{encoder}` with no defence at all holds {100 * outcomes.count(HELD) / len(outcomes):.1f} % "
                f"({low:.0f} to {high:.0f}) when attacked itself ({listed(tuple(found))})."
            )
    return " ".join(parts)
