"""`domain`: the encoder's training domain in feature space, and a threshold measured, not guessed.

Class means and covariance come from all training pictures; the threshold is where `QUANTILE` of them would be called
outside. Test vendors and photographs only measure how often that is wrong; they choose nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ironclip.artifact import update_meta
from ironclip.domain import fit_domain
from ironclip.encoder import Encoder
from ironclip.errors import InputError
from ironclip.loading import load_encoder
from ironclip.preprocessing import load_image
from training.data import SUFFIXES
from training.emoji.pictures import Source, VendorImages, load_vendor, manifest_names, read_manifest, training_vendors

DESCRIPTION = "emoji and icon art"
QUANTILE = 0.02
CROPS = 20
PER_SOURCE = 500


@torch.no_grad()
def _features(encoder: Encoder, pixels: Tensor, batch_size: int = 256) -> Tensor:
    return torch.cat([encoder.encode_image(part) for part in torch.split(pixels, batch_size)])


def _part(source: Source, generator: torch.Generator) -> Source:
    """At most PER_SOURCE random pictures of a source: enough for means and covariance, and quick."""
    chosen = torch.randperm(len(source.names), generator=generator)[:PER_SOURCE]
    return replace(source, images=source.images[chosen], names=source.names[chosen])


def _source_features(encoder: Encoder, source: Source, names: Any) -> Tensor:
    images = VendorImages(source, names, encoder.preprocessing)
    parts = torch.split(torch.arange(len(images)), 256)
    return torch.cat([_features(encoder, images.images(part.tolist())) for part in parts])


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
        picture.thumbnail((1024, 1024))
        short = min(picture.size)
        for _ in range(crops):
            share, x, y = torch.rand(3, generator=generator).tolist()
            side = int(short * (0.25 + 0.75 * share))
            left, top = int(x * (picture.width - side)), int(y * (picture.height - side))
            crop: Image.Image = picture.crop((left, top, left + side, top + side))
            pixels.append(encoder.preprocessing(crop)[0])
    return torch.stack(pixels).float() / 255, [path.name for path in files]


def measure_domain(artifact: Path, data: Path, photos: Path) -> dict[str, Any]:
    """Fit the domain, choose its threshold, measure both error rates, and store all in the artifact's folder.

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
    everything, plain, labels = [], [], []
    for vendor in training_vendors(manifest):
        for whole in load_vendor(data, manifest, vendor):
            source = _part(whole, generator)
            features = _source_features(encoder, source, names)
            everything.append(features)
            labels.append(source.names)
            if source.style == "plain":
                plain.append(features)
    fitted = fit_domain(torch.cat(everything), torch.cat(labels), DESCRIPTION)
    threshold = round(fitted.score(torch.cat(plain)).quantile(QUANTILE).item(), 4)

    def outside(features: Tensor) -> float:
        return round(100 * (fitted.score(features) < threshold).float().mean().item(), 2)

    crops, files = photo_crops(photos, encoder)
    tests = [key for key, entry in manifest["vendors"].items() if entry["role"] == "test"]
    rates = {key: outside(_source_features(encoder, load_vendor(data, manifest, key)[0], names)) for key in tests}
    measured = {
        "chosen": f"{100 * QUANTILE:g} % of the training pictures (as drawn, not redrawn) fall below the threshold",
        "called_outside_percent": {**rates, "photos": outside(_features(encoder, crops))},
        "photos": {"files": files, "crops_each": CROPS},
    }
    domain = replace(fitted, threshold=threshold, measured=measured)
    domain.save(artifact)
    update_meta(artifact, domain=domain.to_json())
    return domain.to_json()
