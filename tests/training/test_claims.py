"""Claims of the papers asked of cells: paired intervals, and what is left unsaid."""

from __future__ import annotations

from typing import Any

import pytest

from training.claims import Claim, claims_table, judge, paired


def cell(
    outcomes: str, attack: str = "autoattack", level: str = "", digest: str = "d", dtype: str = "bfloat16"
) -> dict[str, Any]:
    return {
        "sample": {"name": "emojione", "digest": digest, "pictures": len(outcomes)},
        "attack": attack,
        "threat": {"label": "linf 2/255"},
        "level": level,
        "options": {},
        "outcomes": outcomes,
        "encoder": {"dtype": dtype},
    }


def test_the_interval_is_newcombes() -> None:
    """His example: 36 both, 12 and 2 one alone, none neither; method 10 gives 0.0569 to 0.3404."""
    difference, (low, high) = paired([True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2)
    assert difference == pytest.approx(20)
    assert (low, high) == (pytest.approx(5.69, abs=0.01), pytest.approx(34.04, abs=0.01))


def test_a_claim_holds_only_where_the_interval_says_so() -> None:
    claim = Claim("TeCoA", "is robust", "tecoa", "demo")
    far = {"tecoa": [cell("o" * 60 + "x" * 20 + "-" * 20)], "demo": [cell("o" * 10 + "x" * 60 + "-" * 30)]}
    verdict = judge(claim, far, "emojione", "linf 2/255", "bfloat16")
    assert verdict is not None
    assert (verdict.ours, verdict.theirs, verdict.difference) == (60, 10, 50)
    assert verdict.word == "held"
    near = {"tecoa": [cell("o" * 52 + "x" * 48)], "demo": [cell("x" * 50 + "o" * 50)]}
    verdict = judge(claim, near, "emojione", "linf 2/255", "bfloat16")
    assert verdict is not None
    assert verdict.word == "open"
    verdict = judge(Claim("TeCoA", "is robust", "demo", "tecoa"), far, "emojione", "linf 2/255", "bfloat16")
    assert verdict is not None
    assert verdict.word == "the opposite"
    clean = judge(
        Claim("TeCoA", "keeps clean accuracy", "tecoa", "demo", attack=""), far, "emojione", "linf 2/255", "bfloat16"
    )
    assert clean is not None
    assert (clean.ours, clean.theirs) == (80, 70)


def test_what_was_not_measured_alike_is_not_judged() -> None:
    claim = Claim("TeCoA", "is robust", "tecoa", "demo")
    ours = cell("oo")
    for other in (
        cell("ox", digest="another"),
        cell("ox", level="group"),
        cell("ox", attack="pgd"),
        cell("ox", dtype="float32"),
    ):
        assert judge(claim, {"tecoa": [ours], "demo": [other]}, "emojione", "linf 2/255", "bfloat16") is None
    assert judge(claim, {"tecoa": [ours]}, "emojione", "linf 2/255", "bfloat16") is None
    assert claims_table({"tecoa": [ours]}, "emojione", "linf 2/255", "bfloat16").count("\n") == 2
