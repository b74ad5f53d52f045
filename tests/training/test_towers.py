"""The image tower that an attack in training sees: the student as it is now, whatever form it runs in."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_residual_encoder, make_tiny_encoder
from training.towers import ImageTower


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["residual", "vit"])
def test_the_frozen_tower_follows_the_student(kind: str, dtype: torch.dtype) -> None:
    encoder = make_residual_encoder() if kind == "residual" else make_tiny_encoder()
    encoder.model.visual.requires_grad_(True)
    tower = ImageTower(encoder, dtype)
    generator = torch.Generator().manual_seed(5)
    pixels = torch.rand(3, 3, encoder.resolution, encoder.resolution, generator=generator)
    before = tower.frozen()(pixels)
    with torch.no_grad():
        # Every weight and every running statistic moves, as training moves them.
        for value in (*tower.visual.parameters(), *tower.visual.buffers()):
            if value.is_floating_point():
                value.mul_(1 + 0.3 * torch.rand(value.shape, generator=generator))
    encoder.model.eval()
    after, expected = tower.frozen()(pixels), tower(pixels)
    near = 1e-4 if dtype == torch.float32 else 0.05
    assert (after - expected).abs().max() < near * expected.abs().max()
    assert (after - before).abs().max() > 0.2 * expected.abs().max()
    leaf = pixels.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(tower.frozen()(leaf).square().sum(), leaf)
    other = pixels.clone().requires_grad_(True)
    (theirs,) = torch.autograd.grad(tower(other).square().sum(), other)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), theirs.flatten(1))
    assert cosine.min() > (0.9999 if dtype == torch.float32 else 0.9)
