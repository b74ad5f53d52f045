"""Sanity gates: what makes the numbers of an evaluation doubtful, said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ironclip.attacks import make_attack
from training.robustness import FOOLED, HELD, WRONG


def worst_case(results: Sequence[Mapping[str, Any]]) -> str:
    """Outcomes of several attacks on one sample joined: held only where all held."""
    columns = zip(*(result["outcomes"] for result in results), strict=True)
    return "".join(WRONG if WRONG in column else FOOLED if FOOLED in column else HELD for column in columns)


def check(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sanity gates over the cells of one encoder, defence and sample: what makes their numbers doubtful, in words.

    * A larger radius, or more iterations, cannot make the same attack worse (half a percent is granted to chance).
    * At 16/255 (L-inf) and beyond, at most 1 % may hold: there the ball holds pictures of anything.
    * AutoAttack leaves nothing standing that a single attack fells, half a percent apart.
    * Attacks with gradients are no weaker than Square, which has none (half a percent): else gradients mislead.
    """
    doubts = [f"{_title(result)}: {reason}" for result in results for reason in result["unreliable"]]
    for result in results:
        linf = result["threat"]["norm"] == "linf"
        if linf and result["threat"]["eps"] >= 16 / 255 and result["robust"] > 1:
            doubts.append(f"{_title(result)}: {result['robust']} % hold, more than 1 %")
        for other in results:
            if _stronger(other, result) and other["robust"] > result["robust"] + 0.5:
                doubts.append(f"{_title(other)} leaves more standing than {_title(result)}")
            if not _alike(result, other, "threat", "level"):
                continue
            single = not other["attack"].startswith("autoattack")
            if result["attack"].startswith("autoattack") and single and result["attack"] != "autoattack-rand":
                pairs = zip(result["outcomes"], other["outcomes"], strict=True)
                missed = sum(ours == HELD and theirs == FOOLED for ours, theirs in pairs)
                if 200 * missed > len(result["outcomes"]):
                    doubts.append(f"{_title(result)} left {missed} pictures standing that {_title(other)} fells")
            blind = other["attack"] == "square" and result["attack"] not in ("square", "fgsm")
            if blind and single and result["robust"] > other["robust"] + 0.5:
                doubts.append(f"{_title(result)} leaves more standing than {_title(other)}, which sees no gradient")
    return doubts


def _alike(first: Mapping[str, Any], second: Mapping[str, Any], *parts: str) -> bool:
    return all(first[part] == second[part] for part in parts)


def _stronger(other: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether ``other`` is the same attack with a larger radius, or with more iterations."""
    if not _alike(result, other, "attack", "level") or result["threat"]["norm"] != other["threat"]["norm"]:
        return False
    ours, theirs = (dict(cell["options"]) for cell in (result, other))
    if ours == theirs:
        return bool(result["threat"]["eps"] < other["threat"]["eps"])
    default = getattr(make_attack(result["attack"]), "iterations", 0)
    fewer, more = (int(options.pop("iterations", default)) for options in (ours, theirs))
    return ours == theirs and fewer < more and result["threat"] == other["threat"]


def _title(result: Mapping[str, Any]) -> str:
    options = "".join(f" {key}={value}" for key, value in result["options"].items())
    level = f" on {result['level']}" if result["level"] else ""
    return f"{result['attack']}{options} at {result['threat']['label']}{level}"
