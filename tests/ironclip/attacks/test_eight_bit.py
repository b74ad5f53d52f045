"""What an attack found, as pictures of 8 bits: inside the radius, and not lost in rounding."""

from __future__ import annotations

import pytest
import torch

from ironclip.attacks import ThreatModel
from ironclip.attacks.eight_bit import in_8_bits


def originals(count: int = 4, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("norm", "eps"), [("linf", 1.5 / 255), ("linf", 2 / 255), ("l2", 0.02), ("l2", 0.1), ("l2", 0.3), ("l2", 3.0)]
)
def test_pictures_stay_inside_the_ball(norm: str, eps: float) -> None:
    threat, pictures = ThreatModel(norm, eps), originals()  # type: ignore[arg-type]
    start = pictures.float() / 255
    moved = threat.project(start, start + torch.randn(start.shape, generator=torch.Generator().manual_seed(1)))
    found = in_8_bits(moved, pictures, threat)
    steps = (found.double() - pictures.double()).flatten(1)
    lengths = steps.abs().amax(1) if norm == "linf" else steps.norm(dim=1)
    assert float(lengths.amax()) <= eps * 255 * (1 + 1e-6)
    # Of a short radius nearly all is spent: one more step would be too many.
    least = 1 if norm == "linf" else 0.9 * eps * 255
    assert float(lengths.amin()) >= least


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_was_not_changed_is_not(norm: str) -> None:
    pictures = originals()
    assert torch.equal(in_8_bits(pictures.float() / 255, pictures, ThreatModel(norm, 0.5)), pictures)  # type: ignore[arg-type]


def test_a_short_perturbation_over_many_pixels_is_not_wiped_out() -> None:
    """Less than half a step everywhere: rounded to the nearest picture nothing would be left of it."""
    pictures = originals(2, 64).clamp(8, 247)
    gradient = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(2))
    threat = ThreatModel("l2", 0.04)
    moved = threat.project(pictures.float() / 255, pictures.float() / 255 + threat.ascent(gradient) * 0.04)
    assert torch.equal((moved * 255).round().to(torch.uint8), pictures)
    found = in_8_bits(moved, pictures, threat)
    gained = ((found.float() - pictures.float()) * gradient).flatten(1).sum(1)
    # As much as the largest gradients give for the steps that the radius pays for.
    most = gradient.flatten(1).abs().sort(dim=1, descending=True).values[:, : int((0.04 * 255) ** 2)].sum(1)
    assert bool((gained > 0.99 * most).all())


@pytest.mark.parametrize("eps", [0.5, 2.0, 8.0, 32.0])
def test_no_picture_that_fooled_is_thrown_away_for_float32s_sake(eps: float) -> None:
    """The length of a perturbation over 150,000 numbers is a few millionths off."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 224, 224, generator=generator)
    threat = ThreatModel("l2", eps)
    ahead = images + 2 * eps * threat.ascent(torch.randn(images.shape, generator=generator))
    candidates = threat.project(images, ahead)
    assert bool(threat.contains(images, candidates).all())
    longer = (eps / (candidates - images).flatten(1).norm(dim=1)).view(-1, 1, 1, 1) * 1.001
    assert not bool(threat.contains(images, images + longer * (candidates - images)).any())
