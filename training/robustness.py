"""How often a Classifier is right on attacked pictures: one cell at a time, resumable, with every picture's outcome.

A cell is one attack at one radius on one fixed sample. Its file holds what each picture came to, so that cells can be
joined and held against each other (`training.gates`) afterwards, and a finished cell is never computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ironclip.attacks import (
    VERSION,
    Attack,
    AutoAttack,
    Result,
    ThreatModel,
    WhiteBox,
    classification,
    drive,
    make_attack,
)
from ironclip.classifier import Classifier
from ironclip.defences import Defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.preprocessing import to_float
from training.checkpoint import CheckpointError
from training.data import LabelledImages
from training.jsonfile import read_json, write_json
from training.provenance import commit, device_name

T = TypeVar("T")
SCHEMA = 2
# What a picture came to: wrong as it is, fooled, or held against the attack.
WRONG, FOOLED, HELD = "-", "x", "o"
# What is summed up over the batches of a cell.
COUNTED = ("forwards", "backwards", "fooled_only_at_the_end", "seconds")


@dataclass(frozen=True)
class Sample:
    """Pictures that every cell of a comparison is measured on.

    Attributes:
        name: of the data they come from.
        pixels: uint8 [N, 3, R, R], as the encoder's preprocessing leaves them.
        labels: int64 [N], positions in the label set.
    """

    name: str
    pixels: Tensor
    labels: Tensor

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over pixels and labels."""
        digest = hashlib.sha256(json.dumps([list(self.pixels.shape), self.labels.tolist()]).encode())
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()


def fixed_sample(name: str, images: LabelledImages, count: int, *, seed: int = 0, keep: Tensor | None = None) -> Sample:
    """``count`` pictures drawn without replacement by ``seed``, in the data's order; all where there are fewer.

    Args:
        name: of the data.
        images: where from.
        count: how many.
        seed: the same gives the same pictures, whatever encoder is measured.
        keep: bool [classes], which classes' pictures may be drawn; all if None.
    """
    candidates = torch.arange(len(images)) if keep is None else torch.nonzero(keep[images.labels]).flatten()
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = candidates[order[:count].sort().values]
    pixels = (images.images(chosen.tolist()) * 255).round().to(torch.uint8)
    return Sample(name, pixels, images.labels[chosen])


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        attack: a name in ATTACKS.
        options: of the attack.
        threat: what it may change.
        level: of the classifier's tree that is attacked and scored; the labels themselves if empty.
    """

    attack: str
    threat: ThreatModel
    options: Mapping[str, Any] = field(default_factory=dict)
    level: str = ""

    def to_json(self) -> dict[str, Any]:
        """As written into the cell's file."""
        threat = {"norm": self.threat.norm, "eps": self.threat.eps, "label": self.threat.label}
        return {"attack": self.attack, "options": dict(self.options), "threat": threat, "level": self.level}


def level_model(classifier: Classifier, level: str) -> Callable[[Tensor], Tensor]:
    """Pixels -> logits of one level of the classifier's tree (the labels if empty), differentiable.

    Raises:
        OptionError: the classifier has no such level.
    """
    if not level:
        return classifier
    if level not in classifier.levels:
        raise OptionError(f"There is no level {level!r}; the classifier has: {', '.join(classifier.levels) or 'none'}.")

    def logits(pixels: Tensor) -> Tensor:
        features = classifier.encode(pixels)
        return classifier.level_logits(features, classifier.decide(features))[level]

    return logits


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), in percent; the whole range without pictures."""
    if count == 0:
        return 0.0, 100.0
    share = successes / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 100 / (1 + z * z / count)
    return max(0.0, scale * (middle - spread)), min(100.0, scale * (middle + spread))


def key_of(classifier: Classifier, sample: Sample, cell: Cell) -> str:
    """SHA-256 (hex) of everything that a cell's outcome depends on."""
    defence = classifier.defence
    content = {
        "schema": SCHEMA,
        "encoder": classifier.encoder.digest,
        "dtype": str(classifier.encoder.dtype),
        "form": classifier.encoder.form,
        "head": classifier.encoder.head.to_json(),
        "label_set": classifier.label_set.digest,
        "defence": defence_form(defence),
        "levels": [classifier.level_mode, {name: list(level.nodes) for name, level in classifier.levels.items()}],
        "sample": sample.digest,
        "cell": cell.to_json(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def defence_form(defence: Defence) -> list[Any]:
    """A defence with all its options, as a cell has it."""
    return [defence.name, {key: repr(value) for key, value in sorted(defence.options().items())}]


def attack_batch(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    attack: Attack,
    threat: ThreatModel,
    *,
    keys: Tensor,
    standing: Tensor | None = None,
) -> tuple[Tensor, Tensor, Result]:
    """Attack those pictures of a batch that the model has right as they are.

    Args:
        model: pixels -> logits.
        images: float [N, 3, R, R] in [0, 1].
        labels: int64 [N].
        attack: which.
        threat: what it may change.
        keys: int64 [N], see `Problem`.
        standing: bool [N], attack only these; all if None.

    Returns:
        bool [N], which are right and standing; of those that are, bool [n], which are fooled (the attack saw it, or the
        final pixels are answered wrong in a forward of their own); and the attack's result.
    """
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    if standing is not None:
        right = right & standing
    problem = classification(images[right], labels[right], threat, keys=keys[right])
    result = drive(attack, problem, WhiteBox(model, problem, batch_size=len(images)))
    if not len(result.images):
        return right, result.fooled, result
    with torch.no_grad():
        wrong = model(result.images).argmax(1) != labels[right]
    return right, wrong | result.fooled, result


def measure(
    classifier: Classifier,
    sample: Sample,
    cell: Cell,
    path: Path,
    *,
    after: Mapping[str, Any] | None = None,
    batch_size: int = 0,
    progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Attack every picture of the sample that is right as it is; write and return the cell's result.

    After each batch what has been found is kept beside ``path``; a run that is stopped goes on there. An item counts as
    fooled when the attack saw it fooled, or when its final pixels are answered wrong in a forward of their own.

    Args:
        classifier: what decides, attacked as a whole, in the dtype that it has.
        sample: on what.
        cell: how.
        path: the result's JSON file.
        after: the result of a cell whose attack is the first part of this one's, on the same sample: AutoAttack goes on
            from its ensemble, with what that left standing.
        batch_size: pictures attacked together; `together` if 0, and half as many whenever memory does not suffice. What
            a picture comes to depends on it through rounding alone.
        progress: told a line after each batch.

    Raises:
        CheckpointError: ``path`` holds the result of something else.
        OptionError: no such attack, option or level; or ``after`` is of another kind.
    """
    key = key_of(classifier, sample, cell)
    if (found := read_json(path)) is not None:
        if found.get("key") != key:
            raise CheckpointError(f"{path} is the result of another encoder, sample or attack; use another file")
        return found
    attack = make_attack(cell.attack, cell.options) if after is None else _rest(classifier, sample, cell, after)
    model = level_model(classifier, cell.level)
    labels = classifier.levels[cell.level].index[sample.labels] if cell.level else sample.labels
    before: str = HELD * len(labels) if after is None else after["outcomes"]
    partial_path = path.with_suffix(".partial.json")
    state = read_json(partial_path)
    if state is None or state["key"] != key:
        state = {"key": key, "outcomes": "", "blind": [], "devices": [], **dict.fromkeys(COUNTED, 0)}
    device = classifier.encoder.device
    batch_size = batch_size or together(device)

    def attacked(size: int) -> tuple[slice, Tensor, Tensor, Result]:
        rows = slice(start, start + size)
        images, truth = to_float(sample.pixels[rows]).to(device), labels[rows].to(device)
        keys = torch.arange(start, start + len(images), device=device)
        standing = torch.tensor([outcome == HELD for outcome in before[rows]], device=device)
        return rows, *attack_batch(model, images, truth, attack, cell.threat, keys=keys, standing=standing)

    while len(state["outcomes"]) < len(labels):
        began, start = time.perf_counter(), len(state["outcomes"])
        (rows, right, fooled, result), batch_size = as_many_as_fit(attacked, batch_size, progress)
        lost = iter(fooled.tolist())
        for ok, was in zip(right.tolist(), before[rows], strict=True):
            state["outcomes"] += was if was != HELD else (FOOLED if next(lost) else HELD) if ok else WRONG
        state["fooled_only_at_the_end"] += int((fooled & ~result.fooled).sum())
        state["forwards"] += int(result.forwards.sum())
        state["backwards"] += int(result.backwards.sum())
        # Zero all along: a single zero may be chance, none but zeros hides the model from the attack.
        blind = (result.zero_gradients == result.backwards) & (result.backwards > 0)
        state["blind"] += (start + torch.nonzero(right).flatten()[blind]).tolist()
        state["seconds"] += time.perf_counter() - began
        state["devices"] = sorted({*state.get("devices", []), named(classifier.encoder)["device"]})
        write_json(partial_path, state)
        done = state["outcomes"]
        rate = state["seconds"] / len(done)
        progress(
            f"{cell.attack} {cell.threat.label} {cell.level}: {len(done)}/{len(labels)}, held {done.count(HELD)}, "
            f"{rate * (len(labels) - len(done)) / 60:.1f} min left"
        )
    if after is not None:
        _add(state, after)
    outcome = _result(classifier, sample, cell, state)
    write_json(path, outcome)
    partial_path.unlink(missing_ok=True)
    return outcome


def _rest(classifier: Classifier, sample: Sample, cell: Cell, after: Mapping[str, Any]) -> Attack:
    """What AutoAttack has left to do after its ensemble's cell; raises OptionError for any other cell."""
    first = replace(cell, attack="autoattack-ensemble")
    if cell.attack != "autoattack" or after["key"] != key_of(classifier, sample, first):
        raise OptionError(f"{cell.attack} goes on from no such cell; autoattack does from its own ensemble's")
    return AutoAttack(version="rest", **cell.options)


def _add(state: dict[str, Any], after: Mapping[str, Any]) -> None:
    """Count what the first part has cost into the state of the second."""
    for part in COUNTED:
        state[part] += after[part]
    state["devices"] = sorted({*state["devices"], *after["encoder"].get("device", "cpu").split(", ")})
    # Blind all along: in both parts, or in the first where nothing was left for the second.
    left = {index for index, outcome in enumerate(after["outcomes"]) if outcome == HELD}
    state["blind"] = sorted(index for index in after["blind"] if index not in left or index in state["blind"])


def together(device: torch.device) -> int:
    """How many pictures are attacked at a time at first, where the caller does not say."""
    return 128 if device.type == "cpu" else 512


def as_many_as_fit(work: Callable[[int], T], size: int, say: Callable[[str], None]) -> tuple[T, int]:
    """``work(size)``, with half the size for as long as the device's memory does not suffice; and the size that did.

    Raises:
        torch.OutOfMemoryError: not even one fits.
    """
    while True:
        try:
            return work(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Not inside the handler: the error holds on to what did not fit.
        torch.cuda.empty_cache()
        size //= 2
        say(f"out of memory: {size} pictures at a time from here")


def measure_all(
    classifier: Classifier,
    sample: Sample,
    folder: Path,
    attacks: Sequence[str],
    radii: Sequence[float],
    *,
    level: str = "",
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """`measure` each attack at each L-inf radius (in 1/255), a file in ``folder`` each, named by what it depends on.

    AutoAttack starts with its ensemble as a cell of its own, which is measured first where it is not there yet.
    """

    def one(cell: Cell, after: Mapping[str, Any] | None = None) -> dict[str, Any]:
        path = folder / f"{sample.name}-{cell.attack}-{key_of(classifier, sample, cell)[:16]}.json"
        return measure(classifier, sample, cell, path, after=after)

    results = []
    for attack in attacks:
        for radius in radii:
            cell = Cell(attack, ThreatModel("linf", radius / 255), dict(options or {}), level)
            first = one(replace(cell, attack="autoattack-ensemble")) if attack == "autoattack" else None
            results.append(one(cell, first))
    return results


def named(encoder: Encoder) -> dict[str, Any]:
    """Which encoder, in what form and on what, a result is of."""
    return {
        "name": encoder.provenance.get("name", encoder.spec),
        "digest": encoder.digest,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "arithmetic": str(encoder.arithmetic).removeprefix("torch."),
        "form": encoder.form,
        "head": encoder.head.type,
        "device": device_name(encoder.device),
    }


def _result(classifier: Classifier, sample: Sample, cell: Cell, state: Mapping[str, Any]) -> dict[str, Any]:
    outcomes: str = state["outcomes"]
    count, held = len(outcomes), outcomes.count(HELD)
    right = count - outcomes.count(WRONG)
    share = 100 / max(1, count)
    unreliable = []
    if state["blind"]:
        unreliable.append(f"{len(state['blind'])} pictures had no gradient at all: the attack was blind to them")
    return {
        "schema": SCHEMA,
        "key": state["key"],
        "encoder": {**named(classifier.encoder), "device": ", ".join(state["devices"])},
        "commit": commit(),
        "defence": classifier.defence.name,
        "defence_options": defence_form(classifier.defence),
        "label_set": classifier.label_set.digest,
        "sample": {"name": sample.name, "digest": sample.digest, "pictures": count},
        **cell.to_json(),
        "attacks": VERSION,
        "mode": classifier.level_mode if cell.level else "",
        "clean": round(share * right, 2),
        "clean_interval": [round(bound, 2) for bound in wilson(right, count)],
        "robust": round(share * held, 2),
        "robust_interval": [round(bound, 2) for bound in wilson(held, count)],
        "unreliable": unreliable,
        **{part: state[part] for part in COUNTED},
        "seconds": round(state["seconds"], 1),
        "blind": state["blind"],
        "outcomes": outcomes,
    }
