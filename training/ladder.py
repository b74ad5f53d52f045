"""`defences`: defences at decision time on a ladder of attacks, from those that do not see them to those that do.

    transfer-pgd, -cw   ten steps on the undefended encoder, step 1/255: the papers' protocol
    transfer-apgd       APGD-CE, 100 steps on the undefended encoder; all of them, as above
    white-box           APGD-CE, then APGD-DLR, through the whole decision, its draws known
    fresh               expectation over draws, judged by draws that nobody has seen (`training.fresh`)
    ensemble            APGD-CE and APGD-T through the whole decision, its draws known
    autoattack          full AutoAttack, the same way

What does not see the defence is called transfer wherever it is shown. A cell is a file that is never made twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ironclip.attacks import ThreatModel
from ironclip.classifier import Classifier
from ironclip.defences import Defence, make_defence
from ironclip.defences.cola import Cola
from ironclip.errors import OptionError
from ironclip.labels import Label, LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import to_float
from training.config import from_mapping, read_config
from training.emoji.pictures import manifest_names, read_manifest
from training.emoji.taxonomy import Name
from training.evaluate import TEMPLATES, emoji_sample
from training.examples import FIRST, WHOLE, examples
from training.fresh import measure_fresh
from training.jsonfile import finished, write_json
from training.provenance import commit
from training.robustness import FOOLED, HELD, WRONG, Cell, Sample, defence_form, key_of, measure, named, wilson

# Rung -> its attack and options. Transfer rungs make examples on the undefended encoder.
TRANSFER: dict[str, tuple[str, dict[str, Any]]] = {
    "transfer-pgd": ("pgd", {"iterations": 10, "step_size": 1 / 255, "keep": "last"}),
    "transfer-cw": ("cw", {"iterations": 10, "step_size": 1 / 255, "keep": "last"}),
    "transfer-apgd": ("apgd-ce", {}),
}
SEEING: dict[str, str] = {
    "white-box": "autoattack-rand",
    "ensemble": "autoattack-ensemble",
    "autoattack": "autoattack",
}
RUNGS = (*TRANSFER, "white-box", "fresh", "ensemble", "autoattack")
Say = Callable[[str], None]


@dataclass(frozen=True)
class LadderConfig:
    """What is measured.

    Attributes:
        encoders: specs.
        defences: row -> `name` and options of a defence; the first is what the others are held against.
        vendor, count: pictures.
        eps: L-inf radii in 1/255.
        rungs: in this order.
        only: rung -> rows that it is measured for; all rows if not named.
        radii: rung -> those of `eps` that it is measured at; all if not named.
        gate: another radius for the white box alone, so large that nothing may stand: what does speaks of the attack.
            0: none.
        data: folder of the built emoji data.
        dtype: that encoders are measured in, in the form that is served.
    """

    encoders: tuple[str, ...]
    defences: dict[str, dict[str, Any]]
    vendor: str = "emojione"
    count: int = 200
    eps: tuple[float, ...] = (2.0,)
    rungs: tuple[str, ...] = RUNGS
    only: dict[str, list[str]] = field(default_factory=dict)
    radii: dict[str, list[float]] = field(default_factory=dict)
    gate: float = 0.0
    data: str = "data/demo"
    dtype: str = "float32"

    def planned(self, row: str, rung: str, eps: float) -> bool:
        """Whether a row is measured on a rung at a radius; a rung of fresh draws has rows that draw alone."""
        return (
            rung in self.rungs
            and row in self.only.get(rung, self.defences)
            and eps in self.radii_of(rung)
            and (rung != "fresh" or self.defence(row).random)
        )

    def radii_of(self, rung: str) -> Sequence[float]:
        """The radii that a rung is measured at."""
        gate = (self.gate,) if self.gate and rung == "white-box" else ()
        return (*self.radii.get(rung, self.eps), *gate)

    def defence(self, row: str) -> Defence:
        """The defence of a row."""
        options = self.defences[row]
        return make_defence(options.get("name"), {key: value for key, value in options.items() if key != "name"})


def load_ladder(name: str) -> LadderConfig:
    """A ladder by name (a file in ``training/configs/defences``) or path.

    Raises:
        OptionError: a rung, row, defence or radius that does not exist.
    """
    config = from_mapping(LadderConfig, read_config(name, "defences"))
    _known((*config.rungs, *config.only, *config.radii), RUNGS, f"{name}: there is no rung")
    for rung, rows in config.only.items():
        if not isinstance(rows, list):
            raise OptionError(f"{name}: only.{rung} is a list of rows, not {rows!r}")
        _known(rows, config.defences, f"{name}: only.{rung}: there is no row")
    for rung, radii in config.radii.items():
        if not isinstance(radii, list) or not set(radii) <= set(config.eps):
            raise OptionError(f"{name}: radii.{rung} is a list of radii of eps, {list(config.eps)}, not {radii!r}")
    for row, defence in config.defences.items():
        if not isinstance(defence, Mapping):
            raise OptionError(f"{name}: defences.{row} is a table with a name, not {defence!r}")
        config.defence(row)
    return config


def _known(asked: Iterable[str], there: Iterable[str], what: str) -> None:
    """Raise OptionError for a name that is not there."""
    names = list(there)
    for name in asked:
        if name not in names:
            raise OptionError(f"{what} {name!r}; there are: {', '.join(names)}")


def folder_of(spec: str) -> str:
    """The name of an encoder's folder of cells: its spec, without what would lead into other folders."""
    return re.sub(r"[^\w.@+=-]+", "-", spec).strip("-.")


def described_labels(names: Sequence[Name]) -> LabelSet:
    """All names of the demo world with their keywords as descriptions: the label set `emoji` that is served."""
    return LabelSet(tuple(Label(name.label, (), tuple(name.tags)) for name in names), TEMPLATES)


def climb(
    config: LadderConfig,
    results: Path,
    made: Path,
    *,
    encoders: Sequence[str] = (),
    rows: Sequence[str] = (),
    rungs: Sequence[str] = (),
    device: str = "auto",
    say: Say = print,
) -> None:
    """Measure what is missing, rung after rung, each for all rows before the next.

    Args:
        config: what.
        results: folder of the cells: ``ENCODER/ROW/RUNG-EPS.json``, ENCODER as `folder_of` has it.
        made: folder of examples, which are not kept with the results.
        encoders, rows, rungs: only these; all if empty.
        device: where.
        say: told a line now and then.

    Raises:
        OptionError: a row, rung or encoder asked for that is not in the config.
    """
    _known(encoders, config.encoders, "There is no encoder")
    _known(rows, config.defences, "There is no row")
    _known(rungs, config.rungs, "There is no rung")
    names = manifest_names(read_manifest(Path(config.data)))
    label_set = described_labels(names)
    for spec in encoders or config.encoders:
        encoder = load_encoder(spec, device=device).served(getattr(torch, config.dtype))
        sample = emoji_sample(encoder, Path(config.data), config.vendor, config.count)
        decisions: dict[str, Classifier] = {}
        for row in config.defences:
            defence = config.defence(row)
            banks = [one.bank for one in decisions.values() if one.bank.descriptions or not defence.reads_descriptions]
            decisions[row] = Classifier(encoder, label_set, banks[0] if banks else None, defence=defence)
        for rung in rungs or config.rungs:
            for eps in config.radii_of(rung):
                for row, classifier in decisions.items():
                    if (rows and row not in rows) or not config.planned(row, rung, eps):
                        continue
                    path = results / folder_of(spec) / row / f"{rung}-{eps:g}.json"
                    say(f"{spec}, {row}, {rung} at {eps:g}/255")
                    undefended = next(iter(decisions.values()))
                    _cell(classifier, undefended, sample, rung, ThreatModel("linf", eps / 255), path, made, say)


def _cell(
    classifier: Classifier,
    undefended: Classifier,
    sample: Sample,
    rung: str,
    threat: ThreatModel,
    path: Path,
    made: Path,
    say: Say,
) -> None:
    if rung in TRANSFER:
        attack, options = TRANSFER[rung]
        measure_transfer(classifier, undefended, sample, Cell(attack, threat, options), path, made, say=say)
    elif rung == "fresh":
        source = Cell("apgd-ce", threat)
        sources = [undefended, classifier, *surrogates(classifier)]
        size = max(8, 128 // classifier.defence.view_count)
        candidates = [
            examples(one, sample, source, made, whole=whole, batch_size=size, progress=say)
            for whole in (False, True)
            for one in sources
        ]
        cell = Cell("eot-pgd", threat)
        measure_fresh(classifier, sample, cell, path, candidates=candidates, kinds=(FIRST, WHOLE), progress=say)
    else:
        cell = Cell(SEEING[rung], threat)
        first = None
        # Views and texts of each picture are held for the backward pass.
        size = max(8, 128 // classifier.defence.view_count)
        if rung == "autoattack":
            before, beside = Cell(SEEING["ensemble"], threat), path.with_name(path.name.replace(rung, "ensemble"))
            first = measure(classifier, sample, before, beside, batch_size=size, progress=say)
        measure(classifier, sample, cell, path, after=first, batch_size=size, progress=say)


def surrogates(classifier: Classifier) -> list[Classifier]:
    """Smoother decisions near a defended one, whose adversarial pictures the attack on fresh draws tries too.

    For crops: the mean over three times as many, drawn otherwise, without transport, projection or weights.
    """
    defence = classifier.defence
    if not isinstance(defence, Cola) or defence.views == 1:
        return []
    smooth = replace(
        defence, views=3 * defence.views, coupling="product", projection="none", weights="uniform", seed=77
    )
    return [Classifier(classifier.encoder, classifier.label_set, classifier.bank, defence=smooth)]


def measure_transfer(
    classifier: Classifier,
    undefended: Classifier,
    sample: Sample,
    cell: Cell,
    path: Path,
    made: Path,
    *,
    say: Say = print,
) -> dict[str, Any]:
    """How a defended decision answers examples made on the undefended one; written to ``path``."""
    key = f"whole {key_of(undefended, sample, cell)} {key_of(classifier, sample, cell)}"
    if (found := finished(path, key)) is not None:
        return found
    adversarial = examples(undefended, sample, cell, made, progress=say)
    right, held = (answered(classifier, pixels, sample.labels) for pixels in (sample.pixels, adversarial))
    outcomes = "".join(WRONG if not ok else HELD if stands else FOOLED for ok, stands in zip(right, held, strict=True))
    count = len(outcomes)
    result = {
        "key": key,
        "commit": commit(),
        "encoder": named(classifier.encoder),
        "defence": classifier.defence.name,
        "defence_options": defence_form(classifier.defence),
        "label_set": classifier.label_set.digest,
        "sample": {"name": sample.name, "digest": sample.digest, "pictures": count},
        **cell.to_json(),
        "adaptive": False,
        "examples": WHOLE,
        "clean": round(100 * sum(right) / count, 2),
        "robust": round(100 * outcomes.count(HELD) / count, 2),
        "robust_interval": [round(bound, 2) for bound in wilson(outcomes.count(HELD), count)],
        "unreliable": [],
        "outcomes": outcomes,
    }
    write_json(path, result)
    return result


@torch.no_grad()
def answered(classifier: Classifier, pixels: torch.Tensor, labels: torch.Tensor) -> list[bool]:
    """Which uint8 pictures are answered right."""
    hits: list[bool] = []
    for rows in torch.split(torch.arange(len(pixels)), 64):
        logits = classifier(to_float(pixels[rows]).to(classifier.encoder.device))
        hits += (logits.argmax(1).cpu() == labels[rows]).tolist()
    return hits


def results_of(folder: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Encoder -> row -> ``RUNG-EPS`` -> its finished cell."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/*/*.json")):
        if not path.name.endswith(".partial.json"):
            cell = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(path.parts[-3], {}).setdefault(path.parts[-2], {})[path.stem] = cell
    return found
