"""`evaluate --suite`: the papers' benchmark sets, their splits, class names and prompts as data.

A set lies below one root folder: as ``root/NAME/<class>/<picture>`` (or the suite's ``folder``), or as torchvision
keeps it. Nothing is downloaded; a set that is not there is left out and named.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import InputError, OptionError
from ironclip.labels import LabelSet
from ironclip.preprocessing import Preprocessing
from training.config import from_mapping, read_config
from training.data import FolderImages, LabelledImages, TorchvisionImages
from training.robustness import fixed_sample, measure_all
from training.sources import distinct


@dataclass(frozen=True)
class SetConfig:
    """One set of a suite.

    Attributes:
        name: also the folder below the root, unless ``folder`` says otherwise.
        folder: where its class folders lie.
        torchvision: name of torchvision's data set, for one that is not there as class folders.
        options: of that.
        classes: ``imagenet`` where the folders are ImageNet classes, by WordNet id or number.
        template: of the prompts.
        prompts: the prompts themselves, a class each, in place of names.
        native: side at which the pictures are attacked; they are enlarged inside the model. 0: the encoder's own.
    """

    name: str
    folder: str = ""
    torchvision: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    classes: str = ""
    template: str = "This is a photo of a {}"
    prompts: tuple[str, ...] = ()
    native: int = 0


class NativeClassifier(Classifier):
    """A Classifier over pictures of another size, enlarged inside, so that a perturbation lives at their own size."""

    def encode(self, pixels: Tensor) -> Tensor:
        """[N, 3, side, side] in [0,1] -> features, see `Classifier.encode`."""
        side = self.encoder.resolution
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
        return super().encode(pixels)


def load_suite(name: str) -> list[SetConfig]:
    """The sets of a suite by name (a file in ``training/configs/suites``) or path; raises OptionError."""
    sets = read_config(name, "suites").get("sets")
    if not isinstance(sets, list) or not sets:
        raise OptionError(f"{name}: a suite is a list of [[sets]]")
    return [from_mapping(SetConfig, entry, "sets") for entry in sets]


def readable(name: str) -> str:
    """A class name as the papers prompt it: lower case, spaces for ``_``, ``-`` and ``/``, no leading number."""
    return re.sub(r"\s+", " ", re.sub(r"[_\-/]", " ", re.sub(r"^\d+\.", "", name))).strip().lower()


def imagenet_names(folders: Sequence[str]) -> list[str]:
    """open_clip's names of ImageNet classes for folders named by WordNet id or by class number; raises InputError."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    ids = {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    numbers = [int(folder) if folder.isdigit() else ids.get(folder, -1) for folder in folders]
    for folder, number in zip(folders, numbers, strict=True):
        if not 0 <= number < len(IMAGENET_CLASSNAMES):
            raise InputError(f"{folder!r} is neither a WordNet id nor a class number of ImageNet")
    return [IMAGENET_CLASSNAMES[number] for number in numbers]


def _named(entry: SetConfig, images: LabelledImages) -> list[str]:
    if entry.classes == "imagenet":
        return imagenet_names(images.classes)
    return [readable(name) for name in images.classes]


def load_set(entry: SetConfig, root: Path, preprocessing: Preprocessing) -> tuple[LabelledImages, list[str]] | None:
    """The pictures of a set, and what its classes are called; None where it is not below ``root``.

    Raises:
        InputError: class folders that cannot be named.
        OptionError: no such torchvision set.
    """
    found = _of_torchvision(entry, root)
    if found is not None:
        # torchvision keeps some sets in folders of these very names, with folders of its own in them.
        images: LabelledImages = TorchvisionImages(found, preprocessing)
        return images, [readable(name) for name in images.classes]
    folder = root / (entry.folder or entry.name)
    if folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
        images = FolderImages(folder, preprocessing)
        return images, _named(entry, images)
    return None


def _of_torchvision(entry: SetConfig, root: Path) -> Any:
    """torchvision's data set, where it finds it below ``root``; None elsewhere. Raises OptionError if it has none."""
    if not entry.torchvision:
        return None
    import torchvision.datasets

    kind = getattr(torchvision.datasets, entry.torchvision, None)
    if kind is None:
        raise OptionError(f"torchvision has no data set {entry.torchvision!r}")
    try:
        found = kind(str(root), download=False, **entry.options)
    except (RuntimeError, FileNotFoundError, OSError):
        return None
    if not hasattr(found, "classes"):
        found.classes = list(getattr(found, "categories", entry.prompts))
    return found


def _label_set(entry: SetConfig, names: Sequence[str]) -> LabelSet:
    if entry.prompts:
        if len(entry.prompts) != len(names):
            raise InputError(f"{entry.name}: {len(entry.prompts)} prompts for {len(names)} classes")
        labels = [{"name": name, "prompts": [text]} for name, text in zip(names, entry.prompts, strict=True)]
        return LabelSet.parse(labels)
    return LabelSet.parse(distinct(names), [entry.template])


def evaluate_suite(
    encoder: Encoder,
    sets: Sequence[SetConfig],
    root: Path,
    folder: Path,
    attacks: Sequence[str],
    radii: Sequence[float],
    *,
    count: int = 1000,
    options: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Clean and robust accuracy on the sets of a suite that are below ``root``.

    Args:
        encoder: what is measured.
        sets: of `load_suite`.
        root: where the data lies.
        folder: of the results, one file a cell; finished ones are kept.
        attacks: names in ATTACKS.
        radii: L-inf, in 1/255, at the size that is attacked.
        count: pictures of each set, the same for every encoder.
        options: of the attacks.

    Returns:
        The cells' results (see `robustness.measure`), and the names of the sets that are not there.
    """
    results, missing = [], []
    for entry in sets:
        preprocessing = encoder.preprocessing
        if entry.native:
            preprocessing = Preprocessing.from_open_clip(
                {**encoder.preprocess_cfg, "size": [entry.native, entry.native], "resize_mode": "squash"}
            )
        found = load_set(entry, root, preprocessing)
        if found is None:
            missing.append(entry.name)
            continue
        images, names = found
        classifier = NativeClassifier(encoder, _label_set(entry, names))
        sample = fixed_sample(entry.name, images, count)
        results += measure_all(classifier, sample, folder, attacks, radii, options=options)
    return results, missing


def averages(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each attack and radius: mean clean / robust accuracy, also without the sets near chance.

    PCAM (two classes) and EuroSAT are near chance for most robust encoders and would move a mean of all.
    """
    near_chance = {"pcam", "eurosat"}
    lines = []
    for attack, threat in dict.fromkeys((r["attack"], r["threat"]["label"]) for r in results):
        everything = [r for r in results if (r["attack"], r["threat"]["label"]) == (attack, threat)]
        fewer = [r for r in everything if r["sample"]["name"] not in near_chance]
        for title, chosen in (("all", everything), ("less pcam, eurosat", fewer)):
            if chosen:
                clean, robust = (sum(r[part] for r in chosen) / len(chosen) for part in ("clean", "robust"))
                lines.append(f"mean of {len(chosen)} sets ({title}), {attack} {threat}: {clean:.1f} / {robust:.1f}")
    return lines
