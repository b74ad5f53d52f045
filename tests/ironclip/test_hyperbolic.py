"""Lorentz coordinates against the ball's own formulas, which share no code with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ironclip.hyperbolic import (
    RIM,
    averages,
    ball_norm,
    distance_cross_entropy,
    distances,
    exp0,
    from_ball,
    log0,
    paired_distances,
    to_ball,
)

CURVATURES = [1.0, 0.37, 0.1]


def ball_points(count: int, r: float, longest: float = 0.99, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(count, 6, generator=generator), dim=-1)
    return points * torch.rand(count, 1, generator=generator) * longest / r**0.5


def moebius_distance(u: Tensor, v: Tensor, r: float) -> Tensor:
    """2/sqrt(r) artanh(sqrt(r) ||-u (+) v||), in float64."""
    u, v = -u.double(), v.double()
    uv, uu, vv = (u * v).sum(-1), (u * u).sum(-1), (v * v).sum(-1)
    top = (1 + 2 * r * uv + r * vv)[..., None] * u + (1 - r * uu)[..., None] * v
    moved = top / (1 + 2 * r * uv + r * r * uu * vv)[..., None]
    return 2 / r**0.5 * torch.atanh(r**0.5 * moved.norm(dim=-1))


@pytest.mark.parametrize("r", CURVATURES)
def test_distances_are_those_of_the_ball(r: float) -> None:
    u, v = ball_points(40, r), ball_points(40, r, seed=1)
    expected = moebius_distance(u[:, None], v[None], r)
    assert torch.allclose(distances(from_ball(u, r), from_ball(v, r), r).double(), expected, rtol=1e-5, atol=1e-5)
    wide = distances(from_ball(u.double(), r), from_ball(v.double(), r), r)
    assert torch.allclose(wide, expected, rtol=1e-9, atol=1e-9)
    near = u + 1e-3 * (v - u)
    rows = paired_distances(from_ball(u, r), from_ball(near, r), r).double()
    assert torch.allclose(rows, moebius_distance(u, near, r), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("r", CURVATURES)
def test_maps_go_there_and_back(r: float) -> None:
    tangent = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 0.4
    space = exp0(tangent, r)
    length = tangent.norm(dim=-1, keepdim=True)
    expected = torch.tanh(r**0.5 * length) * tangent / (r**0.5 * length)
    assert torch.allclose(to_ball(space, r), expected, atol=1e-6)
    assert torch.allclose(log0(space, r), tangent, atol=1e-5)
    assert torch.allclose(from_ball(to_ball(space, r), r), space, rtol=1e-4, atol=1e-5)
    origin = torch.zeros(1, 6)
    assert torch.allclose(distances(space, origin, r)[:, 0], 2 * length[:, 0], atol=1e-4)


def test_far_tangents_stop_at_the_rim_and_stay_finite() -> None:
    tangent = torch.full((2, 6), 50.0, requires_grad=True)
    space = exp0(tangent, 1.0)
    assert torch.allclose(ball_norm(space, 1.0), torch.tensor(RIM), atol=1e-5)
    (gradient,) = torch.autograd.grad(distances(space, -space, 1.0).sum(), tangent)
    assert torch.isfinite(gradient).all()
    zero = torch.zeros(2, 6, requires_grad=True)
    at_origin = exp0(zero, 1.0)
    (gradient,) = torch.autograd.grad(distances(at_origin, at_origin, 1.0).sum(), zero)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("r", CURVATURES)
def test_averages_are_einstein_midpoints(r: float) -> None:
    points = ball_points(9, r).double()
    groups = torch.tensor([[0, 3], [0, 3], [0, -1], [1, 3], [1, 3], [1, 3], [1, -1], [4, 3], [4, -1]])
    found, present = averages(from_ball(points, r), groups, 5, r)
    assert present.tolist() == [True, True, False, True, True]
    assert torch.equal(found[2], torch.zeros(6, dtype=torch.float64))
    klein = 2 * points / (1 + r * points.square().sum(-1, keepdim=True))
    gamma = 1 / torch.sqrt(1 - r * klein.square().sum(-1, keepdim=True))
    for node in (0, 1, 3, 4):
        rows = (groups == node).any(1)
        mean = (gamma[rows] * klein[rows]).sum(0) / gamma[rows].sum()
        expected = mean / (1 + torch.sqrt(1 - r * mean.square().sum()))
        assert torch.allclose(to_ball(found[node], r), expected, atol=1e-9)
    alone, _ = averages(from_ball(points[:1], r), torch.tensor([[0]]), 1, r)
    assert torch.allclose(to_ball(alone[0], r), points[0])


def test_everything_is_differentiable() -> None:
    tangent = (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)) * 0.5).double().requires_grad_()
    others = exp0(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double() * 0.5, 0.7)
    groups = torch.tensor([[0], [0], [1], [1], [1]])

    def through(v: Tensor) -> Tensor:
        middle, _ = averages(exp0(v, 0.7), groups, 2, 0.7)
        return distances(middle, others, 0.7)

    assert torch.autograd.gradcheck(through, (tangent,))


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_cross_entropy_is_that_of_the_distances(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    # More rows than are worked on at once; a point that is its own target, where the distance has no slope.
    first = from_ball(ball_points(70, 0.5).double(), 0.5)
    second = torch.cat([first[:1], from_ball(ball_points(20, 0.5, seed=1).double(), 0.5)])
    targets = torch.randint(21, (70,), generator=generator).index_fill(0, torch.tensor([0]), 0)
    temperature, weights = torch.tensor(30.0, dtype=torch.float64), torch.rand(70, generator=generator).double()
    mask = torch.zeros(70, 21, dtype=torch.float64)
    if masked:
        mask.masked_fill_(torch.rand(70, 21, generator=generator) < 0.4, -1e30).scatter_(1, targets[:, None], 0.0)
    inputs = [value.clone().requires_grad_(True) for value in (first, second, temperature)]
    expected = torch.nn.functional.cross_entropy(
        -inputs[2] * distances(inputs[0], inputs[1], 0.5) + mask, targets, reduction="none"
    )
    found = distance_cross_entropy(*inputs, targets, 0.5, mask if masked else None)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-7, atol=1e-9)
