"""FAB's projection against a solver of linear programs, and its distances against a model whose boundary is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor

from ironclip.attacks import FAB, Norm, ThreatModel, WhiteBox, classification, drive
from ironclip.attacks.fab import project_on_plane


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_is_the_shortest_step_inside_the_cube(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(0)
    points, normals = torch.rand(8, 12, generator=generator), torch.randn(8, 12, generator=generator)
    # So far off that faces are in the way, and not so far that the cube ends first.
    offsets = torch.where(torch.arange(8) % 2 == 0, 0.6, -0.6)
    room = torch.where(normals * offsets[:, None] > 0, points, 1 - points)
    offsets = offsets * (normals.abs() * room).sum(1)
    steps = project_on_plane(points, normals, offsets, norm)
    assert (points + steps).min() >= -1e-6
    assert (points + steps).max() <= 1 + 1e-6
    bound = 0
    for point, normal, offset, step in zip(points.double(), normals.double(), offsets.double(), steps, strict=True):
        w, limits = normal.numpy(), [(-float(p), 1 - float(p)) for p in point]
        bound += int(((point + step < 1e-5) | (point + step > 1 - 1e-5)).sum())
        if norm == "linf":
            eye, ones = np.eye(12), np.ones((12, 1))
            found = linprog(
                np.r_[np.zeros(12), 1],
                A_ub=np.block([[eye, -ones], [-eye, -ones]]),
                b_ub=np.zeros(24),
                A_eq=[np.r_[w, 0]],
                b_eq=[-float(offset)],
                bounds=[*limits, (0, None)],
            )
            shortest = found.fun
        else:
            found = minimize(
                lambda z: (z**2).sum(),
                np.zeros(12),
                jac=lambda z: 2 * z,
                bounds=limits,
                constraints={"type": "eq", "fun": lambda z, w=w, offset=offset: (w * z).sum() + float(offset)},
            )
            shortest = found.fun**0.5
        assert found.success
        length = step.abs().max() if norm == "linf" else step.norm()
        assert float(length) == pytest.approx(float(shortest), rel=1e-4, abs=1e-6)
        assert float((normal * step).sum() + offset) == pytest.approx(0, abs=1e-5)
    assert bound > 5


def test_a_plane_beyond_the_cube_is_approached_as_far_as_it_goes() -> None:
    step = project_on_plane(torch.tensor([[0.25, 0.5]]), torch.tensor([[1.0, -1.0]]), torch.tensor([-9.0]), "linf")
    assert torch.allclose(step, torch.tensor([[0.75, -0.5]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_it_finds_the_boundary_of_a_linear_model(norm: Norm) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, 3 * 64, generator=generator)
    images = 0.4 + 0.2 * torch.rand(6, 3, 8, 8, generator=generator)

    def model(pixels: Tensor) -> Tensor:
        return (pixels.flatten(1) - 0.5) @ weights.T

    logits = model(images)
    labels = logits.argmax(1)
    nearest = torch.full((6,), torch.inf)
    for other in range(3):
        w = weights[other] - weights[labels]
        gap = logits.gather(1, labels[:, None])[:, 0] - logits[:, other]
        length = w.abs().sum(1) if norm == "linf" else w.norm(dim=1)
        nearest = torch.where(labels == other, nearest, torch.minimum(nearest, gap / length))
    for factor, fooled in ((1.03, True), (0.97, False)):
        for row in range(6):
            problem = classification(
                images[row : row + 1], labels[row : row + 1], ThreatModel(norm, float(nearest[row]) * factor)
            )
            result = drive(FAB(classes=2, iterations=40), problem, WhiteBox(model, problem))
            assert bool(result.fooled[0]) is fooled


def test_a_coordinate_that_changes_nothing_is_left_alone() -> None:
    weights = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])
    step = project_on_plane(torch.full((2, 3), 0.5), weights, torch.tensor([-0.3, -0.4]), "linf")
    assert torch.allclose(step, torch.tensor([[0.1, 0.0, -0.1], [0.0, 0.0, 0.0]]))


def test_every_iteration_is_a_step() -> None:
    """To go back across the boundary and look from there is none: it is asked for beside the steps."""
    images = torch.full((1, 3, 8, 8), 0.5)
    weights = torch.linspace(-1, 1, 192)

    def model(pixels: Tensor) -> Tensor:
        score = 3 - (pixels - 0.5).flatten(1) @ weights
        return torch.stack([score, torch.zeros_like(score)], 1)

    problem = classification(images, torch.tensor([0]), ThreatModel("linf", 0.01))  # the boundary is at 0.03
    result = drive(FAB(classes=1, iterations=10), problem, WhiteBox(model, problem))
    assert not bool(result.fooled[0])
    assert 11 < int(result.backwards[0]) <= 21
