"""What the methods' papers promise, asked of a study's cells, picture by picture.

Two encoders are measured on the same pictures, so a claim is a paired difference: of the pictures that one holds and
the other does not, in both directions. It held where the 95 % interval of that difference lies above zero, was turned
around where it lies below, and is open where it spans zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.markdown import table
from training.robustness import HELD, WRONG, wilson

Cells = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Claim:
    """``ours`` does better than ``theirs``.

    Attributes:
        source: the paper.
        text: the claim in plain words.
        ours, theirs: rows of the study.
        attack: of the cell; empty compares clean accuracy.
        level: of the tree that is attacked and scored.
    """

    source: str
    text: str
    ours: str
    theirs: str
    attack: str = "autoattack"
    level: str = ""


CLAIMS = (
    Claim("TeCoA", "adversarial fine-tuning on class texts makes zero-shot CLIP robust", "tecoa", "demo"),
    Claim("FARE", "embeddings alone, without labels, carry robustness to classification", "fare", "demo"),
    Claim("FARE", "keeps more clean accuracy than TeCoA", "fare", "tecoa", ""),
    Claim("Sim-CLIP", "is more robust than FARE", "simclip", "fare"),
    Claim("Sim-CLIP", "keeps more clean accuracy than FARE", "simclip", "fare", ""),
    Claim("PMG-AFT", "is more robust than TeCoA", "pmg_aft", "tecoa"),
    Claim("PMG-AFT", "keeps more clean accuracy than TeCoA", "pmg_aft", "tecoa", ""),
    Claim("AGFT", "is more robust than TeCoA", "agft", "tecoa"),
    Claim("AGFT", "keeps more clean accuracy than TeCoA", "agft", "tecoa", ""),
    Claim("HPT-GPD", "a proxy's answers make the encoder robust", "hpt_gpd", "demo"),
    Claim("HPT-GPD", "keeps more clean accuracy than TeCoA", "hpt_gpd", "tecoa", ""),
    Claim("hierarchical", "is more robust than TeCoA at the names", "hierarchical", "tecoa"),
    Claim(
        "hierarchical",
        "is more robust than TeCoA where subgroups are attacked",
        "hierarchical",
        "tecoa",
        "autoattack-ensemble",
        "subgroup",
    ),
    Claim(
        "hierarchical",
        "is more robust than TeCoA where groups are attacked",
        "hierarchical",
        "tecoa",
        "autoattack-ensemble",
        "group",
    ),
    Claim("hierarchical", "keeps more clean accuracy than TeCoA", "hierarchical", "tecoa", ""),
    Claim(
        "hierarchical",
        "its own head is more robust than the same features' cosines",
        "hierarchical",
        "hierarchical-cosine",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: which.
        ours, theirs: percent of the pictures.
        difference: ours - theirs, in points.
        interval: of the difference, 95 %.
        pictures: how many both were measured on.
    """

    claim: Claim
    ours: float
    theirs: float
    difference: float
    interval: tuple[float, float]
    pictures: int

    @property
    def word(self) -> str:
        """``held``, ``the opposite`` or ``open``."""
        low, high = self.interval
        return "held" if low > 0 else "the opposite" if high < 0 else "open"


def paired(ours: Sequence[bool], theirs: Sequence[bool], z: float = 1.96) -> tuple[float, tuple[float, float]]:
    """Difference of two shares on the same pictures and its 95 % interval, in points (Newcombe 1998, method 10).

    The score interval for paired proportions: unlike Wald's it is right where shares are near 0 or 1.
    """
    count = len(ours)
    both = sum(a and b for a, b in zip(ours, theirs, strict=True))
    first, second = sum(ours), sum(theirs)
    neither = count - first - second + both
    p, q = first / count, second / count
    (l1, u1), (l2, u2) = ([bound / 100 for bound in wilson(n, count, z)] for n in (first, second))
    product = first * (count - first) * second * (count - second)
    phi = 0.0
    if product:
        top = both * neither - (first - both) * (second - both)
        phi = (max(top - count / 2, 0) if top > 0 else top) / math.sqrt(product)
    low = (p - l1) ** 2 - 2 * phi * (p - l1) * (u2 - q) + (u2 - q) ** 2
    high = (u1 - p) ** 2 - 2 * phi * (u1 - p) * (q - l2) + (q - l2) ** 2
    return 100 * (p - q), (100 * (p - q - math.sqrt(max(0.0, low))), 100 * (p - q + math.sqrt(max(0.0, high))))


def judge(claim: Claim, cells: Cells, vendor: str, label: str, dtype: str) -> Verdict | None:
    """A claim on one vendor's pictures at one radius; None where a cell is missing.

    Args:
        claim: which.
        cells: row -> its cells.
        vendor: name of the sample.
        label: of the threat model, such as ``linf 2/255``.
        dtype: that the encoders were measured in.
    """

    def candidates(row: str) -> list[Mapping[str, Any]]:
        wanted = (vendor, label, claim.level)
        alike = [c for c in cells.get(row, ()) if (c["sample"]["name"], c["threat"]["label"], c["level"]) == wanted]
        alike = [cell for cell in alike if cell["encoder"]["dtype"] == dtype and not cell["options"]]
        return [cell for cell in alike if claim.attack in ("", cell["attack"])]

    pairs = [
        (ours, theirs)
        for ours in candidates(claim.ours)
        for theirs in candidates(claim.theirs)
        if ours["sample"]["digest"] == theirs["sample"]["digest"]
    ]
    if not pairs:
        return None
    found = max(pairs, key=lambda pair: pair[0]["sample"]["pictures"])
    hits = [[outcome == HELD if claim.attack else outcome != WRONG for outcome in cell["outcomes"]] for cell in found]
    difference, interval = paired(hits[0], hits[1])
    count = len(hits[0])
    return Verdict(claim, 100 * sum(hits[0]) / count, 100 * sum(hits[1]) / count, difference, interval, count)


def claims_table(cells: Cells, vendor: str, label: str, dtype: str) -> str:
    """The claims that can be asked of ``cells``, as Markdown."""
    verdicts = [verdict for claim in CLAIMS if (verdict := judge(claim, cells, vendor, label, dtype))]
    lines = []
    for verdict in verdicts:
        claim = verdict.claim
        asked = "clean accuracy" if not claim.attack else f"{claim.attack}, {label}"
        low, high = verdict.interval
        shares = [f"{verdict.ours:.1f} %", f"{verdict.theirs:.1f} % ({claim.theirs})"]
        difference = f"{verdict.difference:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append([claim.source, claim.text, asked, *shares, difference, verdict.word])
    return table(["paper", "claim", "asked of", "its", "the other's", "difference", "here"], lines)
