"""What the ladder found of defences at decision time: tables, doubts, plots and words, from its cells alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training.examples import WHOLE
from training.fresh import STAGES
from training.gates import worst_case
from training.ladder import SEEING, TRANSFER, LadderConfig, folder_of
from training.ladder_cells import TITLES, CellResult, Ladder, read_ladder
from training.ladder_gates import doubts, gate_in_words
from training.ladder_words import changed, ladder_words
from training.markdown import table
from training.robustness import HELD, WRONG, wilson

MISSING = "-"
WORST = "worst, draws known"


def ladder_table(ladder: Ladder, encoder: str, eps: float, rungs: Sequence[str] = ()) -> str:
    """A Markdown table: a defence a row, in percent of the pictures; a dash where a cell is not there.

    Args:
        ladder: the cells.
        encoder: spec.
        eps: radius in 1/255.
        rungs: shown, beside clean accuracy and the worst of all that see the defence and know its draws; all if empty.
    """
    shown = [rung for rung in ladder.config.rungs if not rungs or rung in rungs]
    lines = []
    for row in ladder.config.defences:
        clean = ladder.clean(encoder, row, eps)
        cells = [ladder.cell(encoder, row, rung, eps) for rung in shown]
        held = [MISSING if cell is None else f"{cell['robust']:.1f}" for cell in cells]
        first = MISSING if clean is None else _percent(len(clean) - clean.count(WRONG), len(clean))
        lines.append([f"`{row}`", first, *held, _worst(ladder, encoder, row, eps)])
    return table(["defence", "clean", *(TITLES[rung] for rung in shown), WORST], lines)


def _worst(ladder: Ladder, encoder: str, row: str, eps: float) -> str:
    """What stands under every seeing rung with known draws; the rungs are named where not all of them are there."""
    found = ladder.present(encoder, row, ladder.seeing, eps)
    if not found:
        return MISSING
    outcomes = worst_case(list(found.values()))
    short = "" if len(found) == len(ladder.seeing) else f", {' and '.join(_plain(rung) for rung in found)} alone"
    return _percent(outcomes.count(HELD), len(outcomes)) + short


def _plain(rung: str) -> str:
    return TITLES[rung].removesuffix(" (draws known)")


def _percent(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{100 * hits / max(1, count):.1f} ({low:.0f} to {high:.0f})"


def waiting(ladder: Ladder, encoder: str, eps: float) -> list[str]:
    """Cells that the config asks for and that are not there, in words, a rung each."""
    lines = []
    for rung in ladder.config.rungs:
        rows = [row for row in ladder.config.defences if ladder.config.planned(row, rung, eps)]
        left = [row for row in rows if ladder.cell(encoder, row, rung, eps) is None]
        if left:
            every = "all rows" if left == rows else ", ".join(f"`{row}`" for row in left)
            lines.append(f"{TITLES[rung]}: {every}")
    return lines


def left_out(ladder: Ladder, eps: float) -> list[str]:
    """Rungs that the config measures at other radii alone, in words."""
    lines = []
    for rung in ladder.config.rungs:
        radii = ladder.config.radii_of(rung)
        if eps not in radii:
            lines.append(f"{TITLES[rung]}: at {', '.join(f'{one:g}/255' for one in radii)} alone")
    return lines


def legend(ladder: Ladder) -> str:
    """What the rows are, where their names do not say it."""
    parts = []
    for row, options in ladder.config.defences.items():
        if set(options) != {"name"}:
            parts.append(f"`{row}` is `{options['name']}` with {changed(ladder, row)}")
    first = ladder.undefended
    parts.append(f"transfer examples were made on `{first}`, so there they are white box for `{first}` itself")
    return "; ".join(parts) + "."


def plot_ladder(ladder: Ladder, encoder: str, eps: float, path: Path) -> bool:
    """Draw accuracy rung by rung, a line a defence, clean first; False and no file without cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rungs = ladder.config.rungs
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    drawn = 0
    for row in ladder.config.defences:
        clean = ladder.clean(encoder, row, eps)
        points = [] if clean is None else [(0, 100 - 100 * clean.count(WRONG) / len(clean))]
        found = ladder.present(encoder, row, rungs, eps)
        points += [(1 + rungs.index(rung), cell["robust"]) for rung, cell in found.items()]
        if points:
            # Thinner and thinner: lines that lie on each other are all seen.
            wide, style = max(1.0, 5.0 - 0.8 * drawn), ("-", "--", "-.", ":")[drawn % 4]
            axes.plot(*zip(*points, strict=True), style, linewidth=wide, marker="o", markersize=3 + wide, label=row)
            drawn += 1
    if drawn:
        if blind := [1 + rungs.index(rung) for rung in ladder.transfer]:
            axes.axvspan(min(blind) - 0.5, max(blind) + 0.5, color="0.93", zorder=0)
        titles = [TITLES[rung].replace(": ", ":\n").replace(" (", "\n(") for rung in rungs]
        axes.set_xticks(range(len(rungs) + 1), ["clean", *titles], fontsize=8)
        axes.set_xlim(-0.4, len(rungs) + 0.4)
        axes.set_ylabel(f"accuracy on {ladder.config.vendor} at {eps:g}/255 (%)")
        axes.set_title(f"{encoder}: grey attacks do not see the defence", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return drawn > 0


def plot_path(folder: Path, encoder: str) -> Path:
    """Where an encoder's plot lies."""
    return folder / f"ladder-{folder_of(encoder)}.png"


def arithmetic(ladder: Ladder, again: Ladder) -> list[str]:
    """Which cells were made without arithmetic for their dtype, and what cells came to that were made again.

    Args:
        ladder: the cells.
        again: some of them, made anew elsewhere.
    """
    lines, known = [], _by_place(ladder)
    places = [place for place, cell in known.items() if _products(cell) != cell["encoder"]["dtype"]]
    if places:
        lines.append(
            "On a CPU that has no arithmetic for that dtype, products of the same numbers made in float32 and rounded "
            f"(`ironclip.upcast`): {', '.join(f'`{place}`' for place in places)}."
        )
    pairs = [(new, known[place]) for place, new in _by_place(again).items() if place in known]
    same = [(new, old) for new, old in pairs if new["key"] == old["key"]]
    if same:
        pictures = sum(len(old["outcomes"]) for _, old in same)
        changed = sum(
            one != other for new, old in same for one, other in zip(new["outcomes"], old["outcomes"], strict=True)
        )
        how = sorted({_products(new) for new, _ in same})
        lines.append(
            f"Made again on another machine, products in {', '.join(how)}: {len(same)} cells; of their {pictures} "
            f"outcomes {changed} came out otherwise."
        )
    return lines


def weaker(ladder: Ladder) -> list[str]:
    """Which cells were made by an attack that has become stronger since, and what it finds in what they left."""
    lines, known = [], _by_place(ladder)
    early = [place for place, cell in known.items() if "stages" in cell and WHOLE not in cell.get("candidates", ())]
    if early:
        lines.append(
            "To be made again, with transfer examples of all steps among the first candidates, where until now there "
            f"were those that stop at their first success: {', '.join(f'`{place}`' for place in early)}."
        )
    halved = {p: c for p, c in known.items() if c["attack"] == "autoattack" and c.get("attacks", 1) < 2}
    again = {place: cell["fab_again"] for place, cell in halved.items() if "fab_again" in cell}
    if halved:
        said = "".join(f"; of `{place}` {one['fooled']} of {one['left']} fell" for place, one in again.items())
        left = [f"`{place}`" for place in halved if place not in again]
        lines.append(
            "AutoAttack was run when FAB-T took half of its steps; what it left is attacked by FAB-T once more"
            f"{said}{'; not yet ' + ', '.join(left) if left else ''}."
        )
    return lines


def _by_place(ladder: Ladder) -> dict[str, CellResult]:
    return {
        f"{name} {row} {rung}": cell
        for name, rows in ladder.cells.items()
        for row, cells in rows.items()
        for rung, cell in cells.items()
    }


def _products(cell: CellResult) -> str:
    """What products were made in; older cells do not say it, and had the dtype's own."""
    encoder: dict[str, str] = cell["encoder"]
    return encoder.get("arithmetic", encoder["dtype"])


def measured(ladder: Ladder, again: Ladder, command: str) -> list[str]:
    """How the cells were made, as lines of Markdown; ``again`` has some of them made anew."""
    config, cells = ladder.config, ladder.every()
    devices = sorted({cell["encoder"]["device"] for cell in cells})
    dtypes = sorted({cell["encoder"]["dtype"] for cell in cells})
    commits = sorted({cell["commit"][:12] for cell in cells})
    lines = [f"`{command}`; a cell that is there is not made again."]
    lines.append(
        f"{ladder.pictures or config.count} pictures of {config.vendor}, flags left out, drawn with seed 0; all names "
        "as labels, their keywords as descriptions: the label set `emoji` that is served."
    )
    lines.append(
        f"Encoders in the form that is served, in {', '.join(dtypes) or config.dtype}, gradients too; measured on "
        f"{', '.join(devices) or 'nothing yet'}; commit{'s' * (len(commits) != 1)} {', '.join(commits) or 'none yet'}."
    )
    lines += arithmetic(ladder, again)
    lines += weaker(ladder)
    for rung in ladder.transfer:
        attack, options = TRANSFER[rung]
        said = "".join(f", {key} {_value(value)}" for key, value in options.items())
        lines.append(
            f"{TITLES[rung]}: `{attack}`{said or ', 100 steps'}, on `{ladder.undefended}`, all steps whether they fool "
            "it or not, rounded to 8 bits; answered by each defence with seed 0."
        )
    for rung in ladder.seeing:
        what = f"`{SEEING[rung]}` ({PARTS[rung]}; 100 steps each)"
        lines.append(f"{TITLES[rung]}: {what} through the whole decision with seed 0, which the attack knows.")
    if "fresh" in config.rungs:
        known = next((cell for cell in cells if "stages" in cell), None)
        stages = [vars(stage) for stage in STAGES] if known is None else known["stages"]
        steps = ", then ".join(
            f"{s['iterations']} steps of {s['draws']} draw{'s' * (s['draws'] > 1)} each ({s['objective']})"
            for s in stages
        )
        lines.append(
            f"{TITLES['fresh']}: PGD with momentum on the mean over draws that are new at each step, {steps}, each "
            "stage on what the one before left; APGD's transfer examples are tried too; the candidate that fools most "
            "of 5 further draws is judged by 10 others."
        )
    lines += [line for line in (gate_in_words(ladder), NOT_ASKED) if line]
    return lines


def _value(value: object) -> str:
    return f"{value * 255:g}/255" if isinstance(value, float) else str(value)


PARTS = {
    "white-box": "APGD-CE, then APGD-DLR",
    "ensemble": "APGD-CE, then APGD-T with 9 targets",
    "autoattack": "the ensemble, then FAB-T and 5,000 queries of Square",
}
BRACKETS = (
    "Percent of the pictures that are answered right; in brackets the 95 % interval (Wilson); a dash is a cell that is "
    "not there. Transfer: the attack does not see the defence. The last column counts a picture only where it holds "
    "under every attack through the whole decision that is there, draws known; fresh draws are another decision, and "
    "not in it."
)
NOT_ASKED = (
    "Not asked of any row: more than one start of an attack (APGD's restarts), the margin loss where draws are known, "
    "Square or hard-label attacks where decisions draw anew, AutoAttack for TTC, CLIPure and COLA's parts, random "
    "noise as an attack. Smoother decisions nearby (three times the crops, no transport, no projection) give "
    "candidates to the attack on fresh draws, not starting points. TTC decides by a threshold whether it moves a "
    "picture at all; gradients are those of the picture itself on either side of it, and no attack steers for a side."
)
PAIRED = (
    "Differences are of the same pictures, in points, with their 95 % interval (Newcombe 1998); where it includes zero "
    "the two are not told apart. The intervals speak of the pictures alone, and of twenty such comparisons one misses "
    "by chance."
)


def write_report(config: LadderConfig, cells: Path, folder: Path, command: str = "") -> Path:
    """Write ``README.md`` and the plots into ``folder`` from the cells alone; returns the README.

    Args:
        config: what was to be measured.
        cells: folder of the cells.
        folder: of the report; cells in its ``again`` are those that were made anew elsewhere.
        command: that makes the cells, for the report.
    """
    ladder, again = read_ladder(cells, config), read_ladder(folder / "again", config)
    parts = ["# Defences at decision time", "", BRACKETS, "", legend(ladder), ""]
    for encoder in config.encoders:
        parts += [f"## {encoder}", ""]
        if not ladder.cells.get(folder_of(encoder)):
            parts += ["Nothing has been computed yet.", ""]
            continue
        shown = plot_path(folder, encoder)
        if plot_ladder(ladder, encoder, max(config.eps), shown):
            parts += [f"![{shown.stem}]({shown.name})", ""]
        for eps in config.eps:
            parts += [f"### {encoder} at {eps:g}/255", "", ladder_table(ladder, encoder, eps)]
            if out := left_out(ladder, eps):
                parts += [f"Left out here for their cost: {'; '.join(out)}.", ""]
            if left := waiting(ladder, encoder, eps):
                parts += [f"Not computed yet: {'; '.join(left)}.", ""]
            parts += [f"- {line}" for line in ladder_words(ladder, encoder, eps)]
            parts += [""]
    said = doubts(ladder)
    parts += [PAIRED, "", "## Doubtful", ""]
    parts += [*(f"- {line}" for line in said or ["Nothing: every sanity gate holds on the cells that are there."]), ""]
    parts += ["## How it was measured", "", *(f"- {line}" for line in measured(ladder, again, command)), ""]
    path = folder / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")
    return path
