"""What a study found, as a table and plots drawn from its JSON files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ironclip.errors import OptionError
from training.claims import claims_table
from training.compare_report import compared
from training.gates import check
from training.markdown import table
from training.study_cells import Column, column_of, device_of, read_cells, usual_dtype

# The README's table: title, vendor, attack, threat, level; an empty attack is clean accuracy.
SHORT = (
    ("EmojiOne clean", "emojione", "", "", ""),
    ("AutoAttack 2/255", "emojione", "autoattack", "linf 2/255", ""),
    ("APGD ensemble 1/255", "emojione", "autoattack-ensemble", "linf 1/255", ""),
    ("APGD ensemble 2/255", "emojione", "autoattack-ensemble", "linf 2/255", ""),
    ("APGD ensemble 4/255", "emojione", "autoattack-ensemble", "linf 4/255", ""),
    ("subgroup, APGD ensemble 2/255", "emojione", "autoattack-ensemble", "linf 2/255", "subgroup"),
    ("group, APGD ensemble 2/255", "emojione", "autoattack-ensemble", "linf 2/255", "group"),
    ("OpenMoji clean", "openmoji", "", "", ""),
    ("OpenMoji APGD ensemble 1/255", "openmoji", "autoattack-ensemble", "linf 1/255", ""),
    ("OpenMoji APGD ensemble 2/255", "openmoji", "autoattack-ensemble", "linf 2/255", ""),
    ("OpenMoji APGD ensemble 4/255", "openmoji", "autoattack-ensemble", "linf 4/255", ""),
)


def columns(cells: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Column]:
    """Every column that some encoder was measured at, vendors together, in a fixed order."""
    every = [cell for row in cells.values() for cell in row]
    found = {(c["sample"]["name"], c["level"], c["attack"], c["threat"]["eps"], column_of(c)) for c in every}
    return [column for *_, column in sorted(found)]


def study_table(results: Path) -> str:
    """A Markdown table: an encoder a row, clean accuracy of each vendor and robust accuracy of each cell.

    Brackets hold 95 % intervals; a dash is a cell that has not been computed. A dtype is named where it is not the one
    that most cells were measured in.
    """
    cells = read_cells(results)
    wanted = columns(cells)
    usual = usual_dtype(cells)
    vendors = list(dict.fromkeys(vendor for vendor, *_, level, _ in wanted if not level))
    titles = [f"{vendor} clean" for vendor in vendors]
    for vendor, attack, options, label, level, dtype in wanted:
        parts = (vendor, level, attack, options, label, dtype if dtype != usual else "")
        titles.append(" ".join(part for part in parts if part))
    lines = []
    for name, row in cells.items():
        shown = []
        for vendor in vendors:
            largest = _largest([c for c in row if c["encoder"]["dtype"] == usual], vendor)
            shown.append("-" if largest is None else _percent(largest["clean"], largest["clean_interval"]))
        for column in wanted:
            cell = next((c for c in row if column_of(c) == column), None)
            shown.append("-" if cell is None else _percent(cell["robust"], cell["robust_interval"]))
        lines.append([name, *shown])
    return table(["encoder", *titles], lines)


def short_table(results: Path) -> str:
    """The study's main columns, clean and full AutoAttack with their 95 % intervals; the most robust row first."""
    cells = read_cells(results)
    usual = usual_dtype(cells)

    def held(name: str) -> float:
        found = [c["robust"] for c in cells[name] if (c["attack"], c["encoder"]["dtype"]) == ("autoattack", usual)]
        return -max(found, default=0.0)

    cells = {name: cells[name] for name in sorted(cells, key=held)}
    lines = []
    for name, row in cells.items():
        mine: list[Mapping[str, Any]] = [cell for cell in row if cell["encoder"]["dtype"] == usual]
        shown = []
        for _, vendor, attack, label, level in SHORT:
            column = (vendor, attack, "", label, level, usual)
            alike = [c for c in mine if column_of(c) == column]
            cell = next(iter(alike), None) if attack else _largest(mine, vendor)
            part = "robust" if attack else "clean"
            if cell is None:
                shown.append("-")
            elif attack in ("", "autoattack"):
                shown.append(_percent(cell[part], cell[f"{part}_interval"]))
            else:
                shown.append(f"{cell[part]:.1f}")
        lines.append([f"`{name}`", *shown])
    return table(["encoder", *(title for title, *_ in SHORT)], lines)


def _largest(cells: Sequence[Mapping[str, Any]], vendor: str) -> Mapping[str, Any] | None:
    """The cell over names with the most of a vendor's pictures, for its clean accuracy."""
    of_vendor = [cell for cell in cells if (cell["sample"]["name"], cell["level"]) == (vendor, "")]
    return max(of_vendor, key=lambda cell: cell["sample"]["pictures"], default=None)


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} ({interval[0]:.0f} to {interval[1]:.0f})"


def doubts(results: Path) -> list[str]:
    """What the sanity gates say of each encoder's cells, vendor by vendor; and where a dtype blunts an attack."""
    lines = []
    for name, row in read_cells(results).items():
        for alike in dict.fromkeys((c["sample"]["digest"], c["encoder"]["dtype"]) for c in row):
            of_sample = [c for c in row if (c["sample"]["digest"], c["encoder"]["dtype"]) == alike]
            lines += [f"{name}, {of_sample[0]['sample']['name']}: {doubt}" for doubt in check(of_sample)]
        wide = {column_of(c)[:-1]: c for c in row if c["encoder"]["dtype"] == "float32"}
        for cell in row:
            other = wide.get(column_of(cell)[:-1], cell)
            if cell["robust"] > other["robust"] + 1:
                column = " ".join(part for part in column_of(cell) if part)
                lines.append(f"{name}: {column} holds {cell['robust']} %, in float32 {other['robust']} %")
    full = [c for row in read_cells(results).values() for c in row if c["attack"] == "autoattack"]
    if any(cell.get("attacks", 1) < 2 for cell in full):
        lines.append(
            "AutoAttack was run when FAB-T took half of its steps; what it left standing has not been attacked by it "
            "again."
        )
    return lines


def tuning_table(results: Path) -> str:
    """The trials of each method, the chosen one marked; ``EDGE`` where nothing tried after it did worse."""
    lines = []
    for path in sorted(results.glob("tuning-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for trial in found["trials"]:
            mark = CHOSEN if trial["setting"] == found.get("chosen") else ""
            edge = EDGE if mark and trial is found["trials"][-1] and len(found["trials"]) > 1 else ""
            mark = ", collapsed at full length" if trial.get("collapsed") else mark
            settings = " ".join(trial["setting"])
            shown = [f"{trial['clean']:.1f} %", f"{trial['robust']:.1f} % ({found['measured']['attack']})"]
            if (final := found.get("final")) and final.get("trial") == trial["key"]:
                shown[1] += f", {final['robust']:.1f} % ({final['attack']})"
            lines.append([found["method"], f"{settings}{mark}{edge}", *shown])
    return table(["method", "setting", "clean", "robust"], lines)


CHOSEN = " (chosen)"
EDGE = ", the last one tried: what lies beyond is not known"


def plot_study(results: Path, attack: str = "autoattack-ensemble") -> list[Path]:
    """``curves-VENDOR.png``: robust accuracy against the radius, a line an encoder; returns what was drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells, drawn = read_cells(results), []
    usual = usual_dtype(cells)
    vendors = sorted({c["sample"]["name"] for row in cells.values() for c in row if c["attack"] == attack})
    for vendor in vendors:
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for name, row in cells.items():
            alike = [c for c in row if (c["attack"], c["level"], c["encoder"]["dtype"]) == (attack, "", usual)]
            chosen = [c for c in alike if c["sample"]["name"] == vendor]
            points = sorted((255 * c["threat"]["eps"], c["robust"]) for c in chosen)
            if points:
                start = [(0.0, chosen[0]["clean"])]
                axes.plot(*zip(*(start + points), strict=True), marker="o", label=name)
        axes.set_xlabel("L-inf radius in 1/255")
        axes.set_ylabel(f"accuracy on {vendor} under {attack} (%)")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        path = results / f"curves-{vendor}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        drawn.append(path)
    return drawn


def again_table(results: Path) -> str:
    """Cells that were measured a second time on another device (``results/again``): how many pictures differ."""
    first = {cell["key"]: (name, cell) for name, row in read_cells(results).items() for cell in row}
    rows = []
    for path in sorted((results / "again").glob("*/*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["key"] not in first:
            raise OptionError(f"{path} is of no cell that is there: delete it")
        name, other = first[cell["key"]]
        differing = sum(a != b for a, b in zip(cell["outcomes"], other["outcomes"], strict=True))
        what = " ".join(part for part in column_of(cell) if part)
        shares = [f"{found['robust']:.1f} % ({device_of(found)})" for found in (other, cell)]
        rows.append([name, what, *shares, f"{differing} of {len(cell['outcomes'])}"])
    return table(["encoder", "cell", "measured", "again", "pictures that differ"], rows) if rows else ""


def report(results: Path) -> Path:
    """Write ``README.md`` and the plots into the results' folder."""
    plots = plot_study(results)
    cells = read_cells(results)
    devices = sorted({device_of(cell) for row in cells.values() for cell in row})
    parts = [
        "# What the study found",
        "",
        f"{BRACKETS} Cells measured on: {', '.join(devices)}.\n",
        study_table(results),
    ]
    parts += [f"![{path.stem}]({path.name})\n" for path in plots]
    for vendor, label in dict.fromkeys((c[0], c[3]) for c in columns(cells) if c[1] == "autoattack"):
        parts += [
            f"## Claims, asked of {vendor} at {label}",
            "",
            PAIRED,
            "",
            claims_table(cells, vendor, label, usual_dtype(cells)),
        ]
    parts += compared(results)
    if again := again_table(results):
        parts += ["## The same on another device", "", again]
    said = doubts(results)
    parts += ["## Doubtful", "", *(f"- {line}" for line in said or ["Nothing: every sanity gate holds."]), ""]
    parts += ["## How settings were chosen", "", TUNED, "", tuning_table(results)]
    path = results / "README.md"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


BRACKETS = (
    "Percent of the pictures, in brackets the 95 % interval; a dash is a cell that has not been computed. "
    "`autoattack-ensemble` is APGD-CE and APGD-T, `autoattack` has FAB-T and Square besides. Levels above the names "
    "are scored by the names' probabilities."
)
TUNED = (
    "Percent of pictures of a training vendor that is left out of these shorter trials (the base has seen it). "
    "Settings of a method are compared under one attack, the chosen ones of all methods under another where two stand."
)
PAIRED = (
    "Each claim compares two encoders on the same pictures; the difference is in points, with its 95 % interval (for "
    "paired shares, Newcombe 1998). It held where that lies above zero, is the opposite below, and open where it spans "
    "zero. Each method was trained once, with one seed; the intervals speak of the pictures alone, and one in twenty "
    "misses by chance."
)
