"""Random resized crops and flips as one fixed set of views for a seed, differentiable, on the device.

The draws belong to the seed alone: every picture gets the same boxes. A box that depended on the picture would be a
secret only from an attacker who has not read the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ironclip.noise import uniform

_RATIOS = (3 / 4, 4 / 3)  # of width to height, the usual range (Szegedy et al. 2015)
_TRIES = 10


@dataclass(frozen=True)
class Box:
    """A part of the picture in whole pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


@lru_cache(maxsize=256)
def boxes(count: int, side: int, smallest: float, seed: int) -> tuple[Box, ...]:
    """Boxes by the law of random resized crops: area uniform in [smallest, 1], log of the ratio uniform.

    Args:
        count: how many.
        side: of the square picture, in pixels.
        smallest: least share of the area.
        seed: of the draws.
    """
    with torch.inference_mode(False):
        draws = uniform(torch.arange(count), (_TRIES, 5), seed=seed, step=0).tolist()
    return tuple(_box(tries, side, smallest) for tries in draws)


def _box(tries: list[list[float]], side: int, smallest: float) -> Box:
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for area, ratio, top, left, mirror in tries:
        pixels = side * side * (smallest + (1 - smallest) * area)
        shape = math.exp(low + (high - low) * ratio)
        width, height = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < width <= side and 0 < height <= side:
            return Box(int(top * (side - height + 1)), int(left * (side - width + 1)), height, width, mirror < 0.5)
    return Box(0, 0, side, side, tries[-1][4] < 0.5)


def crops(pixels: Tensor, count: int, *, smallest: float, seed: int) -> Tensor:
    """The picture itself and ``count - 1`` crops of it at full size, bilinear.

    Args:
        pixels: [N, 3, R, R] in [0, 1].
        count: views in all.
        smallest, seed: see `boxes`.

    Returns:
        [N, count, 3, R, R] in [0, 1]; view 0 is the picture, bit for bit.
    """
    if count == 1:
        return pixels[:, None]
    side = pixels.shape[-1]
    views = [pixels]
    for box in boxes(count - 1, side, float(smallest), seed):
        part = pixels[:, :, box.top : box.top + box.height, box.left : box.left + box.width]
        part = part.flip(-1) if box.mirrored else part
        whole = box.height == side and box.width == side
        views.append(part if whole else interpolate(part, size=(side, side), mode="bilinear", align_corners=False))
    return torch.stack(views, dim=1)
