"""Adversarial examples kept for others to answer: the transfer matrix, and the matrix of attacked and scored levels.

Examples are made once for each (encoder, level, attack, radius, sample), rounded to 8 bits as a picture file would hold
them, and kept in a file; then any Classifier answers them. What does not see the answering model is a transfer attack,
and its numbers are called so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ironclip.attacks import Answer, Attack, Query, ThreatModel, WhiteBox, classification, drive, make_attack
from ironclip.attacks.eight_bit import in_8_bits
from ironclip.classifier import Classifier
from ironclip.errors import InputError
from ironclip.hierarchy import BoundTree
from ironclip.preprocessing import to_float
from training.jsonfile import finished, write_json
from training.markdown import table
from training.robustness import Cell, Sample, as_many_as_fit, key_of, level_model, named, together, wilson

Say = Callable[[str], None]
# Of examples that are made by all of an attack's steps; and of those that stay where they first fool their maker.
WHOLE, FIRST = "all steps", "up to the first success"


def examples(
    classifier: Classifier,
    sample: Sample,
    cell: Cell,
    folder: Path,
    *,
    whole: bool = True,
    batch_size: int = 0,
    progress: Say = print,
) -> Tensor:
    """Adversarial pictures of a sample, uint8 [N, 3, R, R]; made batch by batch, kept in ``folder``, and resumed.

    One that is wrong as it is stays as it is. The radius holds in 8 bits too.

    Args:
        classifier: attacked, as a whole.
        sample: on what.
        cell: how, at which level.
        folder: where they are kept, by a digest of all this.
        whole: the attack takes all its steps. Else a picture is left where it first fools the model that is attacked:
            just across its boundary, from where few examples carry over to another model.
        batch_size: pictures attacked together; `robustness.together` if 0.
        progress: told a line after each batch.
    """
    labels = classifier.levels[cell.level].index[sample.labels] if cell.level else sample.labels
    model, attack = level_model(classifier, cell.level), make_attack(cell.attack, cell.options)
    device = classifier.encoder.device
    batch_size = batch_size or together(device)

    def make(rows: slice) -> Tensor:
        images, truth = to_float(sample.pixels[rows]).to(device), labels[rows].to(device)
        keys = torch.arange(rows.start, rows.start + len(images), device=device)
        return attack_all(model, images, truth, attack, cell.threat, keys, whole=whole)

    name = f"{cell.attack} {cell.threat.label} {cell.level}"
    mode = "whole-" if whole else ""
    path = folder / f"examples-{mode}{key_of(classifier, sample, cell)[:24]}.safetensors"
    return kept_examples(
        path, sample.pixels, cell.threat, make, batch_size=batch_size, say=lambda n: progress(f"{name}: {n}")
    )


def kept_examples(
    path: Path,
    pixels: Tensor,
    threat: ThreatModel,
    make: Callable[[slice], Tensor],
    *,
    batch_size: int,
    say: Say,
) -> Tensor:
    """Pictures made batch by batch and kept in ``path``, 8 bits each; what is there is not made again.

    Args:
        path: of the file; its name must tell apart whatever the pictures depend on.
        pixels: uint8 [N, 3, R, R], the originals.
        threat: what may be changed.
        make: rows -> adversarial pictures, float [n, 3, R, R].
        batch_size: pictures made together.
        say: told after each batch how far it is.
    """
    done = load_file(path)["images"] if path.is_file() else pixels[:0]
    while len(done) < len(pixels):
        start = len(done)
        made, batch_size = as_many_as_fit(lambda n: make(slice(start, min(start + n, len(pixels)))), batch_size, say)  # noqa: B023
        done = torch.cat([done, in_8_bits(made.cpu(), pixels[start : start + len(made)], threat)])
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".writing")
        save_file({"images": done}, staged)
        staged.replace(path)
        say(f"{len(done)}/{len(pixels)} examples")
    return done


def attack_all(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    threat: ThreatModel,
    keys: Tensor,
    *,
    whole: bool,
) -> Tensor:
    """A batch after the attack, float [N, 3, R, R]; pictures that are wrong as they are stay as they are.

    ``whole``: the attack is told of no success, so that it takes all its steps, and ends where it would.
    """
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    problem = replace(classification(images, labels, threat, keys=keys), active=right)
    oracle = WhiteBox(model, problem, batch_size=len(images))
    return drive(attack, problem, unmoved(oracle) if whole else oracle, keep_fooled=not whole).images


def unmoved(oracle: Callable[[Query], Answer]) -> Callable[[Query], Answer]:
    """An oracle that calls nothing fooled: no item stops before the end."""

    def ask(query: Query) -> Answer:
        answer = oracle(query)
        return replace(answer, fooled=torch.zeros_like(answer.fooled))

    return ask


def _right(model: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, device: torch.device) -> Tensor:
    """bool [N]: which uint8 pictures the model has right."""
    parts = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(pixels)), 256):
            parts.append(model(to_float(pixels[rows]).to(device)).argmax(1).cpu() == labels[rows])
    return torch.cat(parts)


def share(hits: Tensor) -> dict[str, Any]:
    count = len(hits)
    return {
        "percent": round(100 * int(hits.sum()) / max(1, count), 2),
        "interval": [round(bound, 2) for bound in wilson(int(hits.sum()), count)],
        "pictures": count,
    }


def transfer_matrix(
    classifiers: Mapping[str, Classifier],
    sample: Sample,
    cell: Cell,
    folder: Path,
    *,
    path: Path | None = None,
    progress: Say = print,
) -> dict[str, Any]:
    """Examples made on each encoder, answered by each.

    Args:
        classifiers: by name, over the same labels, with encoders of one preprocessing (their pixels are exchanged).
        sample: on what.
        cell: how; white box where maker and answerer are one, transfer elsewhere.
        folder: of the examples.
        path: of the result, which is not computed again; ``transfer-*.json`` in the folder if None.
        progress: told a line after each batch.

    Returns:
        For each maker and answerer: the answerer's accuracy on the examples (``robust``), and of the pictures that both
        had right, how many the examples fool it on (``fooled``).

    Raises:
        InputError: encoders whose pixels cannot be exchanged.
    """
    prepared = {name: c.encoder.preprocessing.digest for name, c in classifiers.items()}
    if len(set(prepared.values())) > 1:
        raise InputError(f"these encoders prepare pictures differently and cannot answer for each other: {prepared}")
    keys = {name: key_of(classifier, sample, cell) for name, classifier in classifiers.items()}
    key = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    path = path or folder / f"transfer-{sample.name}-{key[:12]}.json"
    if (found := finished(path, key)) is not None:
        return found
    clean = {name: _right(c, sample.pixels, sample.labels, c.encoder.device) for name, c in classifiers.items()}
    rows: dict[str, Any] = {}
    for maker, classifier in classifiers.items():
        made = examples(classifier, sample, cell, folder, progress=progress)
        rows[maker] = {}
        for answerer, other in classifiers.items():
            right = _right(other, made, sample.labels, other.encoder.device)
            both = clean[maker] & clean[answerer]
            rows[maker][answerer] = {
                "robust": share(right & clean[answerer]),
                "fooled": share(~right[both]),
                "sees": "white box" if maker == answerer else "transfer",
            }
    result = {
        "key": key,
        "sample": {"name": sample.name, "digest": sample.digest, "pictures": len(sample.labels)},
        **cell.to_json(),
        "examples": WHOLE,
        "encoders": {name: named(c.encoder) for name, c in classifiers.items()},
        "clean": {name: share(right) for name, right in clean.items()},
        "made_on": rows,
    }
    write_json(path, result)
    return result


def level_matrix(
    classifier: Classifier,
    tree: BoundTree,
    sample: Sample,
    cell: Cell,
    folder: Path,
    *,
    path: Path | None = None,
    progress: Say = print,
) -> dict[str, Any]:
    """Every level of the classifier's tree attacked, every level scored on the same pictures.

    Args:
        classifier: over the leaves, with levels.
        tree: the same tree bound to its labels, for the severity of mistakes.
        sample: on what.
        cell: the attack and its radius; its level is not read.
        folder: of the examples.
        path: of the result, which is not computed again; ``levels-*.json`` in the folder if None.
        progress: told a line after each batch.

    Returns:
        ``clean`` and ``attacked``: level -> scored level -> accuracy of the sample; ``carried``: of the pictures right
        at the scored level before, how many are wrong after; ``severity``: mean height of the lowest common ancestor of
        label and answer over the leaf's mistakes (Bertinetto et al. 2020); ``worst``: right at the scored level
        whichever level was attacked.
    """
    key = key_of(classifier, sample, cell)
    path = path or folder / f"levels-{sample.name}-{key[:12]}.json"
    if (found := finished(path, key)) is not None:
        return found
    names = list(classifier.levels)
    device = classifier.encoder.device
    truths = {name: classifier.levels[name].index[sample.labels] for name in names}
    models = {name: level_model(classifier, name) for name in names}

    def scored(pixels: Tensor) -> dict[str, Tensor]:
        return {name: _right(models[name], pixels, truths[name], device) for name in names}

    def severity(pixels: Tensor) -> float | None:
        with torch.no_grad():
            parts = [classifier(to_float(part).to(device)).argmax(1).cpu() for part in torch.split(pixels, 256)]
        answers = torch.cat(parts)
        wrong = answers != sample.labels
        heights = tree.lca_heights[sample.labels[wrong], answers[wrong]].float()
        return round(float(heights.mean()), 3) if len(heights) else None

    before = scored(sample.pixels)
    attacked, carried, severities = {}, {}, {"": severity(sample.pixels)}
    held = {name: before[name].clone() for name in names}
    for level in names:
        made = examples(
            classifier, sample, Cell(cell.attack, cell.threat, cell.options, level), folder, progress=progress
        )
        after = scored(made)
        attacked[level] = {name: share(after[name]) for name in names}
        carried[level] = {name: share(~after[name][before[name]]) for name in names}
        severities[level] = severity(made)
        held = {name: held[name] & after[name] for name in names}
    result = {
        "key": key,
        "sample": {"name": sample.name, "digest": sample.digest, "pictures": len(sample.labels)},
        **cell.to_json(),
        "examples": WHOLE,
        "encoder": named(classifier.encoder),
        "levels": classifier.level_mode,
        "clean": {name: share(before[name]) for name in names},
        "attacked": attacked,
        "carried": carried,
        "severity": severities,
        "worst": {name: share(held[name]) for name in names},
    }
    write_json(path, result)
    return result


def share_table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str, part: str = "") -> str:
    """A matrix of shares as Markdown: rows made or attacked, columns answered or scored."""
    columns: Sequence[str] = list(next(iter(rows.values())))
    lines = []
    for name, row in rows.items():
        cells = [(row[column][part] if part else row[column])["percent"] for column in columns]
        lines.append([name, *(f"{cell:.1f} %" for cell in cells)])
    return table([title, *columns], lines)
