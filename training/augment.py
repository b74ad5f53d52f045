"""Random views of RGBA art for training, batched in torch: one affine crop, colours, line styles, backgrounds.

Every draw comes from the generator that is passed in, so a step's pictures depend on (seed, step) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """How far the views go.

    Attributes:
        scale: smallest and largest size of the art, 1 = as stored.
        rotate: largest rotation in degrees.
        shift: largest shift as a share of the side.
        stretch: largest log ratio between the two axes.
        colour: strength of the colour jitter, 0 (none) to 1.
        gray, lines, background, noise, blur, erase: share of pictures treated so.
    """

    scale: tuple[float, float] = (0.65, 1.15)
    rotate: float = 15.0
    shift: float = 0.1
    stretch: float = 0.15
    colour: float = 0.6
    gray: float = 0.12
    lines: float = 0.1
    background: float = 0.35
    noise: float = 0.15
    blur: float = 0.2
    erase: float = 0.2


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _some(count: int, share: float, generator: torch.Generator) -> Tensor:
    return torch.nonzero(torch.rand(count, generator=generator) < share).flatten()


def _crop(rgba: Tensor, size: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Affine view: premultiplied float [B, 4, H, W] -> [B, 4, size, size]."""
    count = len(rgba)
    angle = _uniform((count,), -config.rotate, config.rotate, generator) * (math.pi / 180)
    zoom = 1 / _uniform((count,), *config.scale, generator)
    ratio = torch.exp(_uniform((count,), -config.stretch, config.stretch, generator) / 2)
    shift = _uniform((count, 2), -config.shift, config.shift, generator) * 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    wide, high = zoom * ratio, zoom / ratio
    rows = torch.stack([cos * wide, -sin * wide, shift[:, 0], sin * high, cos * high, shift[:, 1]])
    grid = F.affine_grid(rows.T.reshape(count, 2, 3), [count, 4, size, size], align_corners=False)
    return F.grid_sample(rgba, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _jitter(rgb: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Contrast, brightness, saturation and hue as one random 3x3 matrix and offset a picture."""
    count = len(rgb)
    luma = torch.tensor(_LUMA)
    gray = luma.expand(3, 3)
    saturation = _uniform((count, 1, 1), 1 - strength, 1 + strength, generator)
    matrix = saturation * torch.eye(3) + (1 - saturation) * gray
    # Rotation about the gray axis (1,1,1)/sqrt(3) by Rodrigues' formula: a hue shift.
    angle = torch.randn(count, 1, 1, generator=generator) * (0.5 * strength)
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    hue = torch.cos(angle) * torch.eye(3) + torch.sin(angle) * axis + (1 - torch.cos(angle)) / 3
    contrast = _uniform((count, 1, 1), 1 - 0.5 * strength, 1 + 0.5 * strength, generator)
    offset = _uniform((count, 1, 1), -0.3 * strength, 0.3 * strength, generator)
    mixed = torch.baddbmm(0.5 * (1 - contrast) + offset, contrast * (hue @ matrix), rgb.flatten(2))
    return mixed.view_as(rgb).clamp_(0, 1)


def _line_art(rgb: Tensor, alpha: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Edges of colour and of the silhouette as dark lines over lightened fills."""
    both = torch.cat([rgb * alpha + (1 - alpha), alpha], dim=1)
    spread = F.max_pool2d(both, 3, 1, 1) + F.max_pool2d(-both, 3, 1, 1)
    edge = (spread.amax(dim=1, keepdim=True) * _uniform((len(rgb), 1, 1, 1), 1.5, 3.0, generator) - 0.3).clamp(0, 1)
    fade = _uniform((len(rgb), 1, 1, 1), 0.0, 1.0, generator)
    fill = rgb * (1 - fade) + fade
    return fill * (1 - edge), torch.maximum(alpha, edge)


def _backgrounds(count: int, size: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """White for most; else a flat colour, a gradient, or smooth noise: [count, 3, size, size]."""
    background = torch.ones(count, 3, size, size)
    which = _some(count, config.background, generator)
    corners = torch.rand(len(which), 3, 4, 4, generator=generator)
    style = torch.randint(0, 4, (len(which), 1, 1, 1), generator=generator)
    flat = corners[:, :, :1, :1].expand_as(corners)
    gradient = F.interpolate(corners[:, :, :2, :2], (4, 4), mode="bilinear", align_corners=True)
    pale = 1 - 0.2 * flat
    corners = torch.where(style == 0, flat, torch.where(style == 1, gradient, torch.where(style == 2, pale, corners)))
    background[which] = F.interpolate(corners, (size, size), mode="bilinear", align_corners=False)
    return background


def _erase(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """A random square of up to a third of the side in a random colour, on some pictures."""
    size = images.shape[-1]
    for index in _some(len(images), config.erase, generator).tolist():
        side, top, left = torch.randint(0, 1 << 30, (3,), generator=generator).tolist()
        side = size // 8 + side % (size // 5)
        top, left = top % (size - side), left % (size - side)
        images[index, :, top : top + side, left : left + side] = torch.rand(3, 1, 1, generator=generator)
    return images


def augment(rgba: Tensor, size: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Random views of art.

    Args:
        rgba: uint8 [B, H, W, 4], not premultiplied.
        size: side of the views.
        config: how far they go.
        generator: the only source of randomness.

    Returns:
        float RGB in [0,1], [B, 3, size, size].
    """
    pixels = rgba.permute(0, 3, 1, 2).float().div_(255)
    pixels[:, :3] *= pixels[:, 3:]
    view = _crop(pixels, size, config, generator)
    alpha = view[:, 3:]
    rgb = view[:, :3] / alpha.clamp_min(1e-3)
    rgb = _jitter(rgb, config.colour, generator) if config.colour else rgb
    chosen = _some(len(rgb), config.gray, generator)
    rgb[chosen] = (rgb[chosen] * torch.tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
    chosen = _some(len(rgb), config.lines, generator)
    if len(chosen):
        rgb[chosen], alpha[chosen] = _line_art(rgb[chosen], alpha[chosen], generator)
    images = torch.lerp(_backgrounds(len(rgb), size, config, generator), rgb, alpha)
    chosen = _some(len(rgb), config.blur, generator)
    images[chosen] = F.avg_pool2d(images[chosen], 3, 1, 1, count_include_pad=False)
    chosen = _some(len(rgb), config.noise, generator)
    images[chosen] += torch.randn(images[chosen].shape, generator=generator) * 0.06
    return _erase(images, config, generator).clamp_(0, 1)
