"""Golden features: what an encoder says of one fixed picture and one fixed text, kept beside its weights.

A checksum tells that the file is the one that was written. Golden features tell that what was built from it, on this
machine and with these versions of torch and open_clip, still computes what its maker saw.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ironclip.encoder import Encoder
from ironclip.errors import ArtifactError, GoldenMismatch

# Another machine's float32 differs in the last digits; a cosine below this is another function.
MIN_COSINE = 0.9999
# Cosine does not see length, and a hyperbolic head does: relative difference of the lengths at most.
_MAX_STRETCH = 0.01
_DIGITS = 6
_TEXT = "a photo of a dog."
_VERSION = 1
# Features shorter than this have no direction.
_NOTHING = 1e-6


def golden_picture(side: int) -> Tensor:
    """The fixed picture: gratings of several directions and pitches, float32 [1, 3, side, side] in [0, 1]."""
    place = torch.arange(side, dtype=torch.float64) / side
    x, y = place.view(1, -1), place.view(-1, 1)
    waves = [
        torch.sin(2 * math.pi * (3 * x + 1 * y)) + 0.5 * torch.sin(2 * math.pi * (11 * y - 4 * x)),
        torch.sin(2 * math.pi * (5 * y - 2 * x)) + 0.5 * torch.sin(2 * math.pi * (13 * x + 7 * y)),
        torch.sin(2 * math.pi * (7 * x * y + 2 * x)) + 0.5 * torch.sin(2 * math.pi * (17 * y)),
    ]
    return (0.5 + torch.stack(waves) / 3.2).clamp(0, 1).float().unsqueeze(0)


def golden_features(encoder: Encoder, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The `golden` entry of `ironclip.json`, as float32 towers give it from weights that were stored in `dtype`.

    Raises:
        ArtifactError: the features are not finite.
    """
    stored = encoder if dtype == torch.float32 else _as_stored(encoder, dtype)
    image, text = _features(stored)
    if not (image.isfinite().all() and text.isfinite().all()):
        raise ArtifactError("The encoder's features of a plain picture or text are not finite: it has diverged.")
    return {"version": _VERSION, "image": _rounded(image), "text": _rounded(text)}


def check_golden(encoder: Encoder, golden: object, min_cosine: float = MIN_COSINE) -> dict[str, float]:
    """Compare an encoder with its golden features.

    Args:
        encoder: in any dtype.
        golden: the entry of `ironclip.json`.
        min_cosine: least cosine that passes. At `MIN_COSINE` or above the features' lengths have to agree too.

    Returns:
        The cosines found, by `image` and `text`.

    Raises:
        GoldenMismatch: the encoder computes something else than its maker saw.
        ArtifactError: the entry cannot be read.
    """
    expected = _parse(golden, encoder.dim)
    cosines = {}
    for kind, found in zip(("image", "text"), _features(encoder), strict=True):
        wanted = expected[kind]
        cosines[kind] = cosine = _cosine(found, wanted)
        stretch = abs(float(found.norm()) - float(wanted.norm())) / max(float(wanted.norm()), _NOTHING)
        strict = min_cosine >= MIN_COSINE
        if not cosine >= min_cosine or (strict and not stretch <= _MAX_STRETCH):  # also where one is NaN
            raise GoldenMismatch(
                f"The {kind} features of {encoder.spec!r} in {str(encoder.dtype).removeprefix('torch.')} have cosine "
                f"{cosine:.6f} with the golden ones in its ironclip.json ({min_cosine} is needed), and lengths that "
                f"differ by {100 * stretch:.2g} %: it does not compute what was measured. Copy the folder again, or "
                "save it anew with the versions that are installed here."
            )
    return {kind: round(cosine, 6) for kind, cosine in cosines.items()}


def _as_stored(encoder: Encoder, dtype: torch.dtype) -> Encoder:
    """A float32 copy with the weights as they come back from a file in `dtype`."""
    other = copy.deepcopy(encoder)
    for name, tensor in other.model.state_dict().items():
        if tensor.is_floating_point() and name not in ("logit_scale", "logit_bias"):
            tensor.copy_(tensor.to(dtype).float())
    return other


@torch.inference_mode()
def _features(encoder: Encoder) -> tuple[Tensor, Tensor]:
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        image = encoder.encode_image(golden_picture(encoder.resolution).to(encoder.device))[0]
        text = encoder.encode_text([_TEXT], truncate=True)[0]
    finally:
        for module, mode in modes:
            module.training = mode
    return image.double().cpu(), text.double().cpu()


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = float(one.norm()), float(other.norm())
    if max(lengths) < _NOTHING:
        return 1.0
    return float(one @ other) / max(lengths[0] * lengths[1], _NOTHING**2)


def _rounded(features: Tensor) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in features.tolist()]


def _parse(golden: object, dim: int) -> dict[str, Tensor]:
    found = {}
    for kind in ("image", "text"):
        values = golden.get(kind) if isinstance(golden, Mapping) and golden.get("version") == _VERSION else None
        numbers = isinstance(values, Sequence) and all(isinstance(value, (int, float)) for value in values)
        if not numbers or len(values) != dim:  # type: ignore[arg-type]
            raise ArtifactError(
                f"golden in ironclip.json is of version {_VERSION} and has {dim} numbers for image and for text; save "
                "the artifact anew, or take the entry out to load it unverified."
            )
        found[kind] = torch.tensor(values, dtype=torch.float64)
    return found
