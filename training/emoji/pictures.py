"""The built demo data set in memory: vendors' RGBA pictures, and who shows which name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ironclip.errors import InputError
from ironclip.preprocessing import Preprocessing, to_float
from training.emoji.build import MANIFEST
from training.emoji.taxonomy import Name


@dataclass(frozen=True)
class Source:
    """One vendor's art in one style.

    Attributes:
        images: uint8 RGBA [n, size, size, 4], RGB not premultiplied.
        names: int64 [n], indices into the names of the manifest.
    """

    vendor: str
    style: str
    images: Tensor
    names: Tensor


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a built data set; raises InputError when there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{path} is missing: run `python -m training build-data demo --out {folder}` first")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest


def manifest_names(manifest: dict[str, Any]) -> list[Name]:
    """The names of a manifest, in its order."""
    return [Name.from_json(fields) for fields in manifest["names"]]


def load_vendor(folder: Path, manifest: dict[str, Any], vendor: str) -> list[Source]:
    """Read one vendor's pictures, one Source for each style."""
    if vendor not in manifest["vendors"]:
        raise InputError(f"{folder} has no vendor {vendor!r}; it has {', '.join(manifest['vendors'])}")
    entry = manifest["vendors"][vendor]
    tensors = load_file(folder / entry["file"])
    names = tensors["names"].long()
    return [Source(vendor, style, tensors[f"images.{style}"], names) for style in entry["styles"]]


def training_vendors(manifest: dict[str, Any], left_out: Sequence[str] = ()) -> list[str]:
    """Vendors that may be trained on, without those left out for choosing settings."""
    unknown = sorted(set(left_out) - set(manifest["vendors"]))
    if unknown:
        raise InputError(f"left_out: no such vendor: {', '.join(unknown)}")
    return [key for key, entry in manifest["vendors"].items() if entry["role"] == "train" and key not in left_out]


def data_provenance(folder: Path, left_out: Sequence[str]) -> dict[str, Any]:
    """What an artifact says of the data that it was trained on: packages, versions, checksums, licences, credits."""
    manifest = read_manifest(folder)
    keep = ("package", "version", "integrity", "licence", "credit", "pictures", "names_covered")
    vendors = training_vendors(manifest, left_out)
    return {
        "names": {key: manifest["taxonomy"][key] for key in ("package", "version", "integrity", "licence", "credit")},
        "pictures": {key: {part: manifest["vendors"][key][part] for part in keep} for key in vendors},
    }


class VendorImages:
    """One vendor's art as `training.data.LabelledImages`, through the encoder's own preprocessing."""

    def __init__(self, source: Source, names: Sequence[Name], preprocessing: Preprocessing) -> None:
        self._source = source
        self._preprocessing = preprocessing
        self.classes: Sequence[str] = [name.label for name in names]
        self.labels = source.names

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Sequence[int]) -> Tensor:
        """float RGB in [0,1], [len(indices), 3, side, side]; transparency on the documented background."""
        arrays = self._source.images[list(indices)].numpy()
        return to_float(torch.stack([self._preprocessing(Image.fromarray(array, "RGBA"))[0] for array in arrays]))
