"""`domain`: prototypes of the training art in feature space, and a threshold measured, not guessed.

Prototypes are the mean features of each name's training pictures, one for plain art and one for line styles. The
threshold is where `QUANTILE` of augmented training pictures (not used for prototypes as drawn) would be called outside.
Test vendors only measure how often it is wrong; they choose nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.artifact import update_meta
from ironclip.domain import Domain, save_prototypes
from ironclip.encoder import Encoder
from ironclip.errors import InputError
from ironclip.loading import load_encoder
from ironclip.preprocessing import load_image
from training.augment import AugmentConfig, augment
from training.data import SUFFIXES
from training.emoji.pictures import Source, VendorImages, load_vendor, manifest_names, read_manifest, training_vendors

DESCRIPTION = "emoji and icon art"
NEIGHBOURS = 3
QUANTILE = 0.02
CROPS = 40


@torch.no_grad()
def _features(encoder: Encoder, pixels: Tensor, batch_size: int = 256) -> Tensor:
    return torch.cat([encoder.encode_image(part) for part in torch.split(pixels, batch_size)])


def _source_features(encoder: Encoder, source: Source, names: Any) -> Tensor:
    images = VendorImages(source, names, encoder.preprocessing)
    parts = torch.split(torch.arange(len(images)), 256)
    return torch.cat([_features(encoder, images.images(part.tolist())) for part in parts])


def class_prototypes(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mean unit feature of each class that has pictures: [<= classes, dim], unit length."""
    unit = normalize(features, dim=-1)
    sums = torch.zeros(classes, unit.shape[1]).index_add_(0, labels, unit)
    return normalize(sums[torch.bincount(labels, minlength=classes) > 0], dim=-1)


def photo_crops(folder: Path, encoder: Encoder, crops: int = CROPS, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Random square crops (a quarter of the short side up to all of it) of every picture below ``folder``.

    Returns:
        float RGB in [0,1] [files * crops, 3, R, R], and the file names.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"no picture below {folder}")
    generator = torch.Generator().manual_seed(seed)
    pixels = []
    for path in files:
        picture = load_image(path).convert("RGB")
        short = min(picture.size)
        for _ in range(crops):
            share, x, y = torch.rand(3, generator=generator).tolist()
            side = int(short * (0.25 + 0.75 * share))
            left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
            crop: Image.Image = picture.crop((left, top, left + side, top + side))
            pixels.append(encoder.preprocessing(crop)[0])
    return torch.stack(pixels).float() / 255, [path.name for path in files]


def measure_domain(artifact: Path, data: Path, photos: Path) -> dict[str, Any]:
    """Compute prototypes and threshold, measure both error rates, and store all in the artifact's folder.

    Args:
        artifact: the folder to extend.
        data: folder that `build-data` wrote.
        photos: photographs, which should be called outside.

    Returns:
        The ``domain`` entry of ``ironclip.json``.
    """
    encoder = load_encoder(str(artifact))
    manifest = read_manifest(data)
    names = manifest_names(manifest)
    generator = torch.Generator().manual_seed(0)
    features: dict[str, list[Tensor]] = {"plain": [], "redrawn": []}
    labels: dict[str, list[Tensor]] = {"plain": [], "redrawn": []}
    views = []
    for vendor in training_vendors(manifest):
        for source in load_vendor(data, manifest, vendor):
            kind = "plain" if source.style == "plain" else "redrawn"
            features[kind].append(_source_features(encoder, source, names))
            labels[kind].append(source.names)
            if kind == "plain":
                chosen = torch.randperm(len(source.names), generator=generator)[:200]
                views.append(augment(source.images[chosen], encoder.resolution, AugmentConfig(erase=0.0), generator))
    kinds = [kind for kind in features if features[kind]]
    prototypes = torch.cat(
        [class_prototypes(torch.cat(features[kind]), torch.cat(labels[kind]), len(names)) for kind in kinds]
    )
    prototypes = normalize(prototypes.half().float(), dim=-1)
    save_prototypes(artifact, prototypes)
    domain = Domain(DESCRIPTION, prototypes, NEIGHBOURS, 0.0, {})
    threshold = round(domain.score(_features(encoder, torch.cat(views))).quantile(QUANTILE).item(), 4)

    def outside(scores: Tensor) -> float:
        return round(100 * (scores < threshold).float().mean().item(), 2)

    crops, files = photo_crops(photos, encoder)
    tests = [key for key, entry in manifest["vendors"].items() if entry["role"] == "test"]
    entry = Domain(
        DESCRIPTION,
        prototypes,
        NEIGHBOURS,
        threshold,
        {
            "chosen": f"{100 * QUANTILE:g} % of augmented training pictures fall below it",
            "called_outside_percent": {
                **{
                    key: outside(domain.score(_source_features(encoder, load_vendor(data, manifest, key)[0], names)))
                    for key in tests
                },
                "photos": outside(domain.score(_features(encoder, crops))),
            },
            "photos": {"files": files, "crops_each": CROPS},
        },
    ).to_json()
    update_meta(artifact, domain=entry)
    return entry
