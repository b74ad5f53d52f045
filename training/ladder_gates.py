"""Sanity gates over the ladder: what makes the numbers of a defence doubtful, said in words."""

from __future__ import annotations

from itertools import pairwise

from training.gates import check
from training.ladder_cells import TITLES, CellResult, Ladder
from training.robustness import FOOLED, HELD, WRONG

# Points that chance may make of a gate: of pictures that are the same, and of means over draws.
CHANCE, DRAWN = 0.5, 1.0


def doubts(ladder: Ladder) -> list[str]:
    """What the sanity gates say of each encoder's rows.

    Besides `gates.check`: an attack that sees a defence leaves nothing standing that one fells which does not; knowing
    the draws makes no attack weaker; accuracy that rises with the radius speaks of the attack; and a picture is right
    or wrong before the attack, whichever cell says so. Half a percent is granted to chance, one where draws differ.
    """
    lines = []
    for encoder in ladder.config.encoders:
        for row in ladder.config.defences:
            seeing = ladder.seeing + (ladder.transfer if row == ladder.undefended else ())
            radii = [*ladder.config.eps, *([ladder.config.gate] if ladder.config.gate else [])]
            known = [c for eps in radii for c in ladder.present(encoder, row, seeing, eps).values()]
            fresh = [c for eps in ladder.config.eps for c in ladder.present(encoder, row, ["fresh"], eps).values()]
            said = [*check(known), *check(fresh), *_rising(ladder, encoder, row)]
            for eps in ladder.config.eps:
                at = f" at {eps:g}/255"
                said += [line + at for line in _at_one_radius(ladder, encoder, row, eps)]
            lines += [f"{encoder}, {row}: {line}" for line in said]
    return lines


def _at_one_radius(ladder: Ladder, encoder: str, row: str, eps: float) -> list[str]:
    seeing = ladder.present(encoder, row, ladder.seeing, eps)
    transfer = ladder.present(encoder, row, ladder.transfer, eps)
    lines = []
    for rung, cell in seeing.items():
        for other, blind in transfer.items():
            if (missed := _missed(cell, blind)) > CHANCE:
                lines.append(f"{TITLES[rung]} leaves {missed:.1f} % standing that {TITLES[other]} fells")
    for weaker in ("white-box", "ensemble"):
        for stronger in ("ensemble", "autoattack"):
            pair = seeing.get(weaker), seeing.get(stronger)
            if weaker != stronger and pair[0] and pair[1] and (missed := _missed(pair[1], pair[0])) > CHANCE:
                lines.append(f"{TITLES[stronger]} leaves {missed:.1f} % standing that {TITLES[weaker]} fells")
    if (fresh := ladder.cell(encoder, row, "fresh", eps)) is not None:
        best = min((cell["robust"] for cell in seeing.values()), default=None)
        if best is not None and best > fresh["robust"] + DRAWN:
            lines.append(f"{TITLES['fresh']} hold {fresh['robust']} %, less than where the draws are known: {best} %")
        for other, blind in transfer.items():
            if fresh["robust"] > blind["robust"] + DRAWN:
                lines.append(f"{TITLES['fresh']} hold {fresh['robust']} %, {TITLES[other]} {blind['robust']} %")
    right: list[set[int]] = [
        {i for i, one in enumerate(c["outcomes"]) if one != WRONG} for c in (seeing | transfer).values()
    ]
    if right and (unsure := len(set().union(*right) - right[0].intersection(*right))) > CHANCE / 100 * ladder.pictures:
        lines.append(f"{unsure} pictures are right before the attack in some cells and wrong in others")
    return lines


def gate_in_words(ladder: Ladder) -> str:
    """What stands at the radius where nothing may; empty where that has not been measured."""
    gate, said = ladder.config.gate, []
    for encoder in ladder.config.encoders:
        found = {row: ladder.cell(encoder, row, "white-box", gate) for row in ladder.config.defences if gate}
        there = {row: cell["robust"] for row, cell in found.items() if cell is not None}
        if there:
            most = max(there, key=lambda row: there[row])
            said.append(f"{there[most]:.1f} % of `{encoder}` at most (`{most}`, of {len(there)} rows)")
    if not said:
        return ""
    return (
        f"At {gate:g}/255, where the ball holds pictures of anything, the white box leaves {' and '.join(said)}; more "
        "than 1 % would speak of the attack, not of a defence."
    )


def _missed(cell: CellResult, other: CellResult) -> float:
    """Percent of the pictures that stand in one cell and are fooled in the other."""
    pairs = list(zip(cell["outcomes"], other["outcomes"], strict=True))
    missed = sum(bool(ours == HELD and theirs == FOOLED) for ours, theirs in pairs)
    return 100 * missed / max(1, len(pairs))


def _rising(ladder: Ladder, encoder: str, row: str) -> list[str]:
    """Transfer that fells less at a larger radius: its pictures were made for another decision."""
    lines: list[str] = []
    if row == ladder.undefended:
        return lines
    for rung in ladder.transfer:
        found = [(eps, ladder.cell(encoder, row, rung, eps)) for eps in sorted(ladder.config.eps)]
        there = [(eps, cell["robust"]) for eps, cell in found if cell is not None]
        for (small, before), (large, after) in pairwise(there):
            if after > before + CHANCE:
                lines.append(
                    f"{TITLES[rung]} leaves {after} % at {large:g}/255, more than {before} % at {small:g}/255: a "
                    "number that rises with the radius says little of the defence"
                )
    return lines
