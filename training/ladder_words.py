"""What the ladder says of its defences in plain words, each sentence made from the cells that it speaks of.

A row that has a defence's name alone is the defence; a row with options besides is one of its parts, held against it.
Where an interval includes zero a sentence says so; where cells are missing there is no sentence.
"""

from __future__ import annotations

from training.gates import worst_case
from training.ladder_cells import TITLES, Ladder, Pair, pair_of
from training.robustness import WRONG

NAMES = {"cola": "COLA", "ttc": "TTC", "clipure": "CLIPure"}


def ladder_words(ladder: Ladder, encoder: str, eps: float) -> list[str]:
    """Verdicts on one encoder at one radius (in 1/255), a paragraph of Markdown each."""
    said = [cost_in_words(ladder, encoder, eps)]
    for row in main_rows(ladder):
        if same := identity_in_words(ladder, encoder, row):
            said.append(same)
            continue
        said += [
            transfer_in_words(ladder, encoder, row, eps),
            seen_in_words(ladder, encoder, row, eps),
            fresh_in_words(ladder, encoder, row, eps),
            *(part_in_words(ladder, encoder, part, row, eps) for part in parts_of(ladder, row)),
        ]
    return [one for one in said if one]


def main_rows(ladder: Ladder) -> list[str]:
    """Rows of defences as they come, but for the undefended one."""
    return [row for row, options in ladder.config.defences.items() if set(options) == {"name"}][1:]


def parts_of(ladder: Ladder, row: str) -> list[str]:
    """Rows of the same defence with options."""
    rows = ladder.config.defences
    return [other for other, options in rows.items() if other != row and options["name"] == rows[row]["name"]]


def named(ladder: Ladder, row: str) -> str:
    """A row's title: its defence's name as its paper writes it."""
    name = ladder.config.defences[row]["name"]
    return NAMES.get(name, f"`{row}`")


def listed(rungs: tuple[str, ...]) -> str:
    """Rungs in words."""
    return ", ".join(TITLES[rung].removeprefix("transfer: ").removesuffix(" (draws known)") for rung in rungs)


def cost_in_words(ladder: Ladder, encoder: str, eps: float) -> str:
    """What each defence costs before any attack."""
    base, said = ladder.clean(encoder, ladder.undefended, eps), []
    if base is None:
        return ""
    for row in list(ladder.config.defences)[1:]:
        if (outcomes := ladder.clean(encoder, row, eps)) is not None:
            pair = pair_of(outcomes, base, clean=True)
            said.append(f"`{row}` {pair.ours:.1f} % ({_before(outcomes, base, pair)})")
    first = pair_of(base, base, clean=True).ours
    return f"**Before any attack**: `{ladder.undefended}` {first:.1f} %; {'; '.join(said)}." if said else ""


def transfer_in_words(ladder: Ladder, encoder: str, row: str, eps: float) -> str:
    """What a defence holds against attacks that do not see it."""
    parts = []
    for rung in ladder.transfer:
        if pair := ladder.pair(encoder, row, ladder.undefended, [rung], eps):
            parts.append(f"{listed((rung,))} {pair.ours:.1f} %, where `{ladder.undefended}` has {_than(pair)}")
    if not parts:
        return ""
    return (
        f"**{named(ladder, row)} under transfer**, examples made on the undefended encoder: "
        f"{'; '.join(parts)}. These attacks do not see the defence."
    )


def seen_in_words(ladder: Ladder, encoder: str, row: str, eps: float) -> str:
    """What is left of it when the attack goes through it."""
    pair = ladder.pair(encoder, row, ladder.undefended, ladder.seeing, eps)
    if pair is None:
        return ""
    rungs = ladder.shared(encoder, row, ladder.undefended, ladder.seeing, eps)
    return (
        f"**{named(ladder, row)} when the attack sees it**, its draws known ({listed(rungs)}"
        f"{', the worst for each picture' if len(rungs) > 1 else ''}): {pair.ours:.1f} %, where "
        f"`{ladder.undefended}` has {_than(pair)} under the same."
    )


def fresh_in_words(ladder: Ladder, encoder: str, row: str, eps: float) -> str:
    """What it holds where every decision draws anew and the attacker averages over draws."""
    cell, pair = ladder.cell(encoder, row, "fresh", eps), fresh_pair(ladder, encoder, row, eps)
    if cell is None or pair is None:
        return ""
    draws, base = cell["draws"]["test"], tuple(ladder.present(encoder, ladder.undefended, ladder.seeing, eps))
    return (
        f"**{named(ladder, row)} where every decision draws anew**, and the attack averages over draws: "
        f"{cell['robust']:.1f} % in the mean of {draws} draws that it has not seen ({cell['clean']:.1f} % before any "
        f"attack), {cell['worst']:.1f} % under all of them. By most of the draws {pair.ours:.1f} % stand, where "
        f"`{ladder.undefended}`, which draws nothing, has {_than(pair)} under {listed(base)}. "
        "These are two attacks, and some of the difference may be theirs."
    )


def fresh_pair(ladder: Ladder, encoder: str, row: str, eps: float) -> Pair | None:
    """Fresh draws, by most of them, against the undefended row under the worst of what sees it."""
    cell = ladder.cell(encoder, row, "fresh", eps)
    base = ladder.present(encoder, ladder.undefended, ladder.seeing, eps)
    if cell is None or not base:
        return None
    return pair_of(str(cell["outcomes"]), worst_case(list(base.values())))


def part_in_words(ladder: Ladder, encoder: str, part: str, row: str, eps: float) -> str:
    """What becomes of a defence with a part of it taken away or changed."""
    both = [
        (ladder.cell(encoder, part, rung, eps), ladder.cell(encoder, row, rung, eps))
        for rung in (*ladder.transfer, *ladder.seeing)
    ]
    pairs = [(one["outcomes"], other["outcomes"]) for one, other in both if one is not None and other is not None]
    if not pairs:
        return ""
    differing = sum(a != b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))
    answered = sum(len(ours) for ours, _ in pairs)
    said = []
    for rungs, when in ((ladder.transfer, "under the worst transfer"), (ladder.seeing, "when the attack sees it")):
        if pair := ladder.pair(encoder, part, row, rungs, eps):
            said.append(f"{when} it holds {pair.ours:.1f} %, the whole {_than(pair)}")
    return (
        f"**{named(ladder, row)} with {changed(ladder, part)}** (`{part}`): {differing} of {answered} outcomes differ "
        f"from the whole defence's; {'; '.join(said)}."
    )


def changed(ladder: Ladder, row: str) -> str:
    """The options of a row in words."""
    options = ladder.config.defences[row]
    return ", ".join(f"{key} {value}" for key, value in options.items() if key != "name")


def identity_in_words(ladder: Ladder, encoder: str, row: str) -> str:
    """Said of a defence whose every outcome, at all radii, is that of no defence at all; empty for others."""
    total, known = 0, (*ladder.transfer, *ladder.seeing)
    for eps in ladder.config.eps:
        for rung in ladder.shared(encoder, row, ladder.undefended, known, eps):
            ours, theirs = (ladder.cell(encoder, name, rung, eps) for name in (row, ladder.undefended))
            assert ours is not None
            assert theirs is not None
            if ours["outcomes"] != theirs["outcomes"]:
                return ""
            total += len(ours["outcomes"])
    if not total:
        return ""
    why = ""
    if ladder.config.defences[row] == {"name": "clipure"}:
        why = (
            " With the published settings and a norm of each picture's own, as here, its steps swing the feature there "
            "and back to where it began; the published code shares one norm over a batch."
        )
    return (
        f"**{named(ladder, row)}** comes to what `{ladder.undefended}` comes to, picture by picture, in all {total:,} "
        f"outcomes over every radius: here it changes no decision.{why}"
    )


def _than(pair: Pair) -> str:
    return f"{pair.theirs:.1f} % ({pair.said})"


def _before(ours: str, theirs: str, pair: Pair) -> str:
    alike = all((a == WRONG) == (b == WRONG) for a, b in zip(ours, theirs, strict=True))
    return "the same pictures" if alike else pair.said
