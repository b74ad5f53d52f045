"""The ladder's cells as they are there: rows and rungs by name, and pairs of rows on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ironclip.attacks import ThreatModel
from ironclip.errors import OptionError
from training.claims import paired
from training.examples import WHOLE
from training.gates import worst_case
from training.ladder import RUNGS, SEEING, TRANSFER, LadderConfig, folder_of, results_of
from training.robustness import HELD, WRONG, defence_form

CellResult = Mapping[str, Any]
# Whatever is made by an attack that does not see the defence is called transfer.
TITLES = {
    "transfer-pgd": "transfer: PGD-10",
    "transfer-cw": "transfer: CW-10",
    "transfer-apgd": "transfer: APGD",
    "white-box": "white box (draws known)",
    "fresh": "fresh draws (EOT)",
    "ensemble": "APGD ensemble",
    "autoattack": "AutoAttack",
}


@dataclass(frozen=True)
class Pair:
    """Two rows on the same pictures.

    Attributes:
        ours, theirs: percent that are right, or stand.
        difference: ours - theirs, in points.
        interval: of the difference, 95 %.
        pictures: how many.
    """

    ours: float
    theirs: float
    difference: float
    interval: tuple[float, float]
    pictures: int

    @property
    def word(self) -> str:
        """``more``, ``less``, or ``not told apart`` where the interval includes zero."""
        low, high = self.interval
        return "more" if low > 0 else "less" if high < 0 else "not told apart"

    @property
    def said(self) -> str:
        """The difference in words."""
        low, high = self.interval
        apart = ", not told apart" if self.word == "not told apart" else ""
        return f"{self.difference:+.1f} points, {low:+.1f} to {high:+.1f}{apart}"


@dataclass(frozen=True)
class Ladder:
    """A config and what has been measured of it.

    Attributes:
        config: what was to be measured.
        cells: encoder's folder -> row -> ``RUNG-EPS`` -> its cell.
    """

    config: LadderConfig
    cells: Mapping[str, Mapping[str, Mapping[str, CellResult]]]

    def cell(self, encoder: str, row: str, rung: str, eps: float) -> CellResult | None:
        """One cell; None where it has not been computed."""
        return self.cells.get(folder_of(encoder), {}).get(row, {}).get(f"{rung}-{eps:g}")

    def present(self, encoder: str, row: str, rungs: Sequence[str], eps: float) -> dict[str, CellResult]:
        """Those of ``rungs`` that are there, in their order."""
        found = {rung: self.cell(encoder, row, rung, eps) for rung in rungs}
        return {rung: cell for rung, cell in found.items() if cell is not None}

    @property
    def undefended(self) -> str:
        """The row that the others are held against."""
        return next(iter(self.config.defences))

    @property
    def transfer(self) -> tuple[str, ...]:
        """Rungs whose attack does not see the defence."""
        return tuple(rung for rung in self.config.rungs if rung in TRANSFER)

    @property
    def seeing(self) -> tuple[str, ...]:
        """Rungs whose attack goes through the decision and knows its draws."""
        return tuple(rung for rung in self.config.rungs if rung in SEEING)

    @property
    def pictures(self) -> int:
        """On how many pictures a cell was measured, of those that are there; 0 without any."""
        return max((cell["sample"]["pictures"] for cell in self.every()), default=0)

    def every(self) -> list[CellResult]:
        """All cells."""
        return [cell for rows in self.cells.values() for row in rows.values() for cell in row.values()]

    def clean(self, encoder: str, row: str, eps: float) -> str | None:
        """Outcomes of a cell whose draws are known, for its clean accuracy; None without one."""
        found = self.present(encoder, row, (*self.seeing, *self.transfer), eps)
        return next((str(cell["outcomes"]) for cell in found.values()), None)

    def pair(self, encoder: str, row: str, other: str, rungs: Sequence[str], eps: float) -> Pair | None:
        """What two rows hold against the worst of those of ``rungs`` that both have; None without any."""
        shared = self.shared(encoder, row, other, rungs, eps)
        if not shared:
            return None
        ours, theirs = (worst_case(list(self.present(encoder, name, shared, eps).values())) for name in (row, other))
        return pair_of(ours, theirs)

    def shared(self, encoder: str, row: str, other: str, rungs: Sequence[str], eps: float) -> tuple[str, ...]:
        """Those of ``rungs`` that both rows have."""
        return tuple(
            rung
            for rung in rungs
            if self.cell(encoder, row, rung, eps) is not None and self.cell(encoder, other, rung, eps) is not None
        )


def pair_of(ours: str, theirs: str, *, clean: bool = False) -> Pair:
    """Outcomes held against outcomes picture by picture; as they are before any attack if ``clean``."""
    hits = [[one != WRONG if clean else one == HELD for one in outcomes] for outcomes in (ours, theirs)]
    difference, interval = paired(hits[0], hits[1])
    return Pair(share(hits[0]), share(hits[1]), difference, interval, len(ours))


def share(hits: Sequence[bool]) -> float:
    """Percent that is true."""
    return 100 * sum(hits) / max(1, len(hits))


def read_ladder(folder: Path, config: LadderConfig) -> Ladder:
    """The finished cells of a folder, whichever of the config's are there.

    Raises:
        OptionError: an encoder's cells are of two encoders, dtypes, samples or label sets, so that they cannot be
            compared; or one is of another attack, radius or defence than the config has under its name.
    """
    cells = results_of(folder)
    for spec in config.encoders:
        alike: dict[str, set[str]] = {}
        for row, found in cells.get(folder_of(spec), {}).items():
            for stem, cell in found.items():
                for what in ("digest", "dtype"):
                    alike.setdefault(f"encoder's {what}", set()).add(cell["encoder"][what])
                alike.setdefault("sample", set()).add(cell["sample"]["digest"])
                _check_planned(folder, config, spec, row, stem, cell)
                # Fresh draws' cells do not name it.
                alike.setdefault("label set", set()).update({cell["label_set"]} if "label_set" in cell else set())
        for what, values in alike.items():
            if len(values) > 1:
                raise OptionError(f"{folder / folder_of(spec)}: cells differ in the {what}: delete the older ones")
    return Ladder(config, cells)


def _check_planned(folder: Path, config: LadderConfig, spec: str, row: str, stem: str, cell: CellResult) -> None:
    """Raise OptionError for a cell that was not made as the config and this version would make it."""
    rung, _, eps = stem.rpartition("-")
    if row not in config.defences or rung not in RUNGS:
        return  # nobody reads it
    attack, options = TRANSFER.get(rung, (SEEING.get(rung, "eot-pgd"), {}))
    differs = {
        "attack": (cell["attack"], cell["options"]) != (attack, options),
        "radius": cell["threat"]["label"] != ThreatModel("linf", float(eps) / 255).label,
        "defence": cell["defence_options"] != defence_form(config.defence(row)),
        "way of making examples": rung in TRANSFER and cell.get("examples") != WHOLE,
    }
    if any(differs.values()):
        what = ", ".join(name for name, differ in differs.items() if differ)
        raise OptionError(
            f"{folder / folder_of(spec) / row / stem}.json was made with another {what}: delete it and measure it again"
        )
