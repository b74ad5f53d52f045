"""Defences that draw, attacked where every decision draws anew: expectation over transformation (Athalye et al. 2018).

The attacker knows all but the draws to come. It raises the mean loss over 1, then 5, then 20 draws a step, each stage
on what the stage before left standing. Of all its candidates the one that fools most of some draws for validation is
taken, and judged by draws that neither attack nor choice has seen.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ironclip.attacks import APGD, PGD, Attack, WhiteBox, classification, drive
from ironclip.attacks.eight_bit import in_8_bits
from ironclip.classifier import Classifier
from ironclip.preprocessing import to_float
from training.examples import unmoved
from training.jsonfile import finished, read_json, write_json
from training.provenance import commit
from training.robustness import FOOLED, HELD, WRONG, Cell, Sample, defence_form, key_of, named, wilson

_SCHEMA = 2


@dataclass(frozen=True)
class Stage:
    """One stage of the attack: draws a step, steps, what is raised, and how: `pgd` or `apgd`.

    APGD keeps the pixels of the largest loss it saw, which over few draws is the luckiest; so it is for many.
    """

    draws: int
    iterations: int
    objective: str
    attack: Literal["pgd", "apgd"] = "pgd"


STAGES = (Stage(1, 100, "ce"), Stage(5, 40, "margin", "apgd"), Stage(20, 25, "ce", "apgd"))
# Seeds: the attack draws from 1 on, which are below these.
_VALIDATION, _TEST = range(10_000_000, 10_000_005), range(20_000_000, 20_000_010)
# A picture is given up for lost where most validation draws are fooled.
_LOST = 0.9


def measure_fresh(
    classifier: Classifier,
    sample: Sample,
    cell: Cell,
    path: Path,
    *,
    candidates: Sequence[Tensor] = (),
    kinds: Sequence[str] = (),
    stages: Sequence[Stage] = STAGES,
    batch_size: int = 32,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Attack a random decision; write and return what it came to, resumed batch by batch.

    Args:
        classifier: whose defence draws.
        sample: on what.
        cell: its threat model; the attack's name is written down as it is.
        path: of the result.
        candidates: adversarial pictures made elsewhere, uint8 [N, 3, R, R] each, that are tried too.
        kinds: of candidates there are, for the result.
        stages: of the attack.
        batch_size: pictures attacked together.
        progress: told a line after each batch.

    Returns:
        The result: `clean` and `robust` are means over pictures and test draws; `worst` counts pictures that hold under
        every test draw; `outcomes`, and `majority_interval` of their share, go by most of the test draws.
    """
    known = {
        "schema": _SCHEMA,
        "of": key_of(classifier.reseeded(0), sample, cell),
        "stages": [vars(stage) for stage in stages],
        "candidates": [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in candidates],
    }
    key = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    if (found := finished(path, key)) is not None:
        return found
    partial = path.with_suffix(".partial.json")
    state = read_json(partial)
    if state is None or state["key"] != key:
        state = {"key": key, "clean": [], "robust": [], "seconds": 0.0, "gradients": 0}
    while len(state["robust"]) < len(sample.labels):
        began, start = time.perf_counter(), len(state["robust"])
        rows = slice(start, start + batch_size)
        made = [one[rows] for one in candidates]
        clean, robust, gradients = _attack(classifier, sample, rows, cell, made, stages)
        state["clean"] += clean
        state["robust"] += robust
        state["gradients"] += gradients
        state["seconds"] += time.perf_counter() - began
        write_json(partial, state)
        done = len(state["robust"])
        left = state["seconds"] / done * (len(sample.labels) - done) / 60
        progress(f"fresh draws {cell.threat.label}: {done}/{len(sample.labels)}, {left:.1f} min left")
    result = _result(classifier, sample, cell, stages, state) | {"candidates": list(kinds)}
    write_json(path, result)
    partial.unlink(missing_ok=True)
    return result


def shares(classifier: Classifier, pixels: Tensor, labels: Tensor, seeds: Sequence[int]) -> Tensor:
    """Share of the draws by ``seeds`` under which each uint8 picture is answered right: float [N]."""
    images = to_float(pixels).to(classifier.encoder.device)
    with torch.no_grad():
        hits = [classifier.reseeded(seed)(images).argmax(1).cpu() == labels for seed in seeds]
    return torch.stack(hits).float().mean(0)


def _attack(
    classifier: Classifier, sample: Sample, rows: slice, cell: Cell, made: Sequence[Tensor], stages: Sequence[Stage]
) -> tuple[list[float], list[float], int]:
    pixels, labels = sample.pixels[rows], sample.labels[rows]
    clean = shares(classifier, pixels, labels, _TEST)
    best, lowest, gradients = pixels.clone(), shares(classifier, pixels, labels, _VALIDATION), 0

    def take(ours: Tensor, candidate: Tensor) -> None:
        held = shares(classifier, candidate, labels[ours], _VALIDATION)
        better = held < lowest[ours]
        best[ours[better]], lowest[ours[better]] = candidate[better], held[better]

    for candidate in made:
        take(torch.arange(len(pixels)), candidate)
    for number, stage in enumerate(stages):
        left = torch.nonzero(lowest > 1 - _LOST).flatten()
        if not len(left):
            break
        found, spent = _stage(classifier, pixels[left], labels[left], cell, stage, number, rows.start + left)
        take(left, found)
        gradients += spent
    robust = torch.minimum(shares(classifier, best, labels, _TEST), clean)
    return clean.tolist(), robust.tolist(), gradients


def _stage(
    classifier: Classifier, pixels: Tensor, labels: Tensor, cell: Cell, stage: Stage, number: int, keys: Tensor
) -> tuple[Tensor, int]:
    device = classifier.encoder.device
    images, truth = to_float(pixels).to(device), labels.to(device)
    problem = classification(images, truth, cell.threat, objective=stage.objective, keys=keys)

    def draws(step: int) -> list[Classifier]:
        first = 1 + number * 100_000 + step * stage.draws
        return [classifier.reseeded(first + draw) for draw in range(stage.draws)]

    attack: Attack = APGD("own", stage.iterations, seed=number)
    if stage.attack == "pgd":
        attack = PGD(iterations=stage.iterations, momentum=0.75, stop_fooled=False, keep="last", seed=number)
    oracle = WhiteBox(classifier, problem, batch_size=len(images), draws=draws)
    # Where decisions draw, one that is fooled once may not be fooled again.
    result = drive(attack, problem, unmoved(oracle), keep_fooled=False)
    return in_8_bits(result.images.cpu(), pixels, cell.threat), int(result.backwards.sum()) * stage.draws


def _result(
    classifier: Classifier, sample: Sample, cell: Cell, stages: Sequence[Stage], state: Mapping[str, Any]
) -> dict[str, Any]:
    clean, robust = torch.tensor(state["clean"]), torch.tensor(state["robust"])
    outcomes = "".join(
        WRONG if right <= 0.5 else HELD if held > 0.5 else FOOLED for right, held in zip(clean, robust, strict=True)
    )
    count, held = len(outcomes), outcomes.count(HELD)
    return {
        "key": state["key"],
        "commit": commit(),
        "encoder": named(classifier.encoder),
        "defence_options": defence_form(classifier.defence),
        "sample": {"name": sample.name, "digest": sample.digest, "pictures": count},
        **cell.to_json(),
        "stages": [vars(stage) for stage in stages],
        "draws": {"validation": len(_VALIDATION), "test": len(_TEST)},
        "clean": round(100 * float(clean.mean()), 2),
        "robust": round(100 * float(robust.mean()), 2),
        "majority_interval": [round(bound, 2) for bound in wilson(held, count)],
        "worst": round(100 * float((robust == 1).float().mean()), 2),
        "gradients": state["gradients"],
        "seconds": round(state["seconds"], 1),
        "unreliable": [],
        "outcomes": outcomes,
    }
