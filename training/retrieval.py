"""Image-text retrieval under attacks on the embedding: recall in both directions, and how often a target wins.

The captions are a label set, so the Classifier gives every picture's likeness with every caption, by the encoder's own
head; nothing else decides here either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ironclip.attacks import Problem, WhiteBox, drive, make_attack
from ironclip.attacks.objectives import Objective
from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import InputError, OptionError
from ironclip.labels import LabelSet
from ironclip.preprocessing import Preprocessing, to_float
from training.examples import Say, kept_examples, share
from training.jsonfile import finished, write_json
from training.robustness import Cell, Sample, key_of, named, together

Goal = Literal["away", "caption", "towards"]
GOALS: tuple[Goal, ...] = ("away", "caption", "towards")
RANKS = (1, 5, 10)
# What is raised for each goal.
OBJECTIVES: dict[Goal, str] = {"away": "cosine distance", "caption": "margin", "towards": "logit of the target"}


@dataclass(frozen=True)
class Pairs:
    """Pictures and captions.

    Attributes:
        name: of the data.
        pixels: uint8 [N, 3, R, R].
        captions: M texts, each once.
        truth: bool [N, M], which captions are a picture's own; each picture and each caption has one at least.
    """

    name: str
    pixels: Tensor
    captions: tuple[str, ...]
    truth: Tensor


def read_pairs(folder: Path, preprocessing: Preprocessing, count: int = 0) -> Pairs:
    """Pictures of a folder with ``captions.json`` ({file: [captions]}), the first ``count`` by name; 0 takes all.

    Raises:
        InputError: no such file, a picture that is missing, or one without captions.
    """
    table = folder / "captions.json"
    if not table.is_file():
        raise InputError(f"there is no {table}: it holds {{file: [captions]}} for the pictures beside it")
    content: Mapping[str, Sequence[str]] = json.loads(table.read_text(encoding="utf-8"))
    files = sorted(content)[: count or None]
    captions = {text: None for file in files for text in content[file]}
    position = {text: number for number, text in enumerate(captions)}
    pixels, truth = [], torch.zeros(len(files), len(captions), dtype=torch.bool)
    for row, file in enumerate(files):
        if not (folder / file).is_file() or not content[file]:
            raise InputError(f"{table}: {file!r} is not there, or has no caption")
        with Image.open(folder / file) as picture:
            pixels.append(preprocessing(picture)[0])
        truth[row, [position[text] for text in content[file]]] = True
    return Pairs(folder.name, torch.stack(pixels), tuple(captions), truth)


def caption_classifier(encoder: Encoder, captions: Sequence[str]) -> Classifier:
    """The Classifier whose labels are captions, each its own prompt."""
    return Classifier(encoder, LabelSet.parse([{"name": text, "prompts": [text]} for text in captions]))


def recalls(logits: Tensor, truth: Tensor) -> dict[str, dict[str, Any]]:
    """Recall@1, 5, 10 in both directions.

    Args:
        logits: [N, M], pictures against captions.
        truth: bool [N, M].

    Returns:
        ``image_to_text`` and ``text_to_image``: rank -> share of queries with an own answer among the first so many.
    """
    found = {}
    for name, scores, own in (("image_to_text", logits, truth), ("text_to_image", logits.T, truth.T)):
        order = scores.topk(min(max(RANKS), scores.shape[1]), dim=1).indices
        hits = own.gather(1, order)
        found[name] = {str(rank): share(hits[:, :rank].any(1)) for rank in RANKS}
    return found


def targets_of(truth: Tensor, seed: int) -> Tensor:
    """For each picture a caption that is not its own: int64 [N]. Raises InputError where there is none."""
    wrong = (~truth).float()
    if bool((wrong.sum(1) == 0).any()):
        raise InputError("a targeted attack needs captions that are not a picture's own")
    return torch.multinomial(wrong, 1, generator=torch.Generator().manual_seed(seed)).flatten()


def _objective(classifier: Classifier, goal: Goal, clean: Tensor, truth: Tensor, targets: Tensor) -> Objective:
    """What an attack on the embedding raises: (features, items) -> [b]."""
    if goal == "away":
        return lambda features, items: -F.cosine_similarity(features, clean[items], dim=-1)
    if goal == "towards":
        return lambda features, items: classifier.decide(features).gather(1, targets[items, None])[:, 0]

    def margin(features: Tensor, items: Tensor) -> Tensor:
        logits, own = classifier.decide(features), truth[items]
        nearest, other = logits.masked_fill(~own, -torch.inf).amax(1), logits.masked_fill(own, -torch.inf).amax(1)
        # A picture that every caption is true of has no other.
        return torch.where(own.all(1), -nearest, other - nearest)

    return margin


def retrieval(
    classifier: Classifier,
    pairs: Pairs,
    goal: Goal,
    cell: Cell,
    folder: Path,
    *,
    seed: int = 0,
    path: Path | None = None,
    batch_size: int = 0,
    progress: Say = print,
) -> dict[str, Any]:
    """Recall as it is and with every picture attacked; resumable, batch by batch.

    Args:
        classifier: of `caption_classifier`, over ``pairs.captions``.
        pairs: pictures and captions.
        goal: ``away`` from the picture's own clean embedding (no text is seen), from its own ``caption`` to the nearest
            other one (the strongest of the three), or ``towards`` a wrong caption drawn by ``seed``.
        cell: the attack, one that takes an objective (pgd, apgd), and its radius.
        folder: of the examples.
        seed: of the targets.
        path: of the result, which is not computed again; ``retrieval-*.json`` in the folder if None.
        batch_size: pictures attacked together; `robustness.together` if 0.
        progress: told a line after each batch.

    Returns:
        ``clean`` and ``attacked``, see `recalls`; for ``towards`` also ``target``: rank -> share of pictures whose
        target is among the first so many captions.

    Raises:
        OptionError: no such goal, or an attack that chooses its own objectives.
    """
    if goal not in GOALS:
        raise OptionError(f"There is no goal {str(goal)[:40]!r}; there are: {', '.join(GOALS)}.")
    if cell.attack not in ("pgd", "apgd", "fgsm"):
        raise OptionError(f"{cell.attack} chooses its own objective; an embedding is attacked by pgd, apgd or fgsm.")
    key = _key(classifier, pairs, goal, cell, seed)
    path = path or folder / f"retrieval-{pairs.name}-{key[:12]}.json"
    if (found := finished(path, key)) is not None:
        return found
    attack, device = make_attack(cell.attack, cell.options), classifier.encoder.device
    batch_size = batch_size or together(device)
    encode, truth = classifier.encoder.encode_image, pairs.truth.to(device)
    targets = targets_of(pairs.truth, seed).to(device) if goal == "towards" else truth.new_zeros(len(truth)).long()

    def make(rows: slice) -> Tensor:
        images = to_float(pairs.pixels[rows]).to(device)
        with torch.no_grad():
            clean = encode(images)
        problem = Problem(
            images=images,
            threat=cell.threat,
            objective=_objective(classifier, goal, clean, truth[rows], targets[rows]),
            fooled=lambda outputs, items: torch.zeros(len(items), dtype=torch.bool, device=device),
            keys=torch.arange(rows.start, rows.stop, device=device),
        )
        return drive(attack, problem, WhiteBox(encode, problem, batch_size=len(images))).images

    examples_path = folder / f"examples-{key[:24]}.safetensors"
    name = f"{goal} {cell.attack} {cell.threat.label}"
    made = kept_examples(
        examples_path, pairs.pixels, cell.threat, make, batch_size=batch_size, say=lambda n: progress(f"{name}: {n}")
    )
    clean, attacked = (_logits(classifier, pixels) for pixels in (pairs.pixels, made))
    result: dict[str, Any] = {
        "key": key,
        "data": pairs.name,
        "pictures": len(pairs.pixels),
        "captions": len(pairs.captions),
        "goal": goal,
        "objective": OBJECTIVES[goal],
        **cell.to_json(),
        "encoder": named(classifier.encoder),
        "clean": recalls(clean, pairs.truth),
        "attacked": recalls(attacked, pairs.truth),
    }
    if goal == "towards":
        order = attacked.topk(min(max(RANKS), attacked.shape[1]), dim=1).indices
        hits = order == targets.cpu()[:, None]
        result["target"] = {str(rank): share(hits[:, :rank].any(1)) for rank in RANKS}
    write_json(path, result)
    return result


def _logits(classifier: Classifier, pixels: Tensor) -> Tensor:
    device = classifier.encoder.device
    with torch.no_grad():
        return torch.cat([classifier(to_float(part).to(device)).cpu() for part in torch.split(pixels, 256)])


def _key(classifier: Classifier, pairs: Pairs, goal: Goal, cell: Cell, seed: int) -> str:
    sample = Sample(pairs.name, pairs.pixels, torch.zeros(len(pairs.pixels), dtype=torch.int64))
    truth = hashlib.sha256(pairs.truth.numpy().tobytes()).hexdigest()
    content = [key_of(classifier, sample, replace(cell, level="")), truth, goal, OBJECTIVES[goal], seed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
