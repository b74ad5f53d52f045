"""Hyperbolic space in Lorentz coordinates: exponential map, all pairwise distances as one product, averages by group.

A point of the ball {||u||^2 < 1/r} of curvature -r is held by its space part s = 2 u / (1 - r ||u||^2), float32
[..., d]; its time part is t = sqrt(1/r + ||s||^2). The conformal factor at the origin is 2, so a tangent vector v lands
at distance 2 ||v||. (Nickel and Kiela 2018 for the coordinates; Ungar's Einstein midpoint for the average.)

Everything is computed in float32 at least: a low-precision sum of squares is no distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Points stay inside this share of the ball's radius, as the common implementations clamp them.
RIM = 1 - 1e-3
# Least excess over 1 of an arcosh argument, whose derivative is infinite at 1: what float32 leaves of t t' - <s, s'>,
# and what it leaves of a difference of points.
_LEAST, _LEAST_PAIRED = 1e-7, 1e-12


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def time_part(space: Tensor, r: float | Tensor) -> Tensor:
    """t of points s: [..., d] -> [...]."""
    return torch.sqrt(1 / r + space.square().sum(-1))


def largest_tangent(r: float | Tensor) -> Tensor:
    """The length of tangent vectors that land on RIM; longer ones are cut to it."""
    return torch.atanh(torch.tensor(RIM)) / torch.as_tensor(r).sqrt()


def exp0(tangent: Tensor, r: float | Tensor) -> Tensor:
    """Exponential map at the origin: tangent vectors [..., d] -> points s [..., d].

    In the ball it is tanh(sqrt(r) ||v||) v / (sqrt(r) ||v||). Vectors that would pass RIM are cut to it; their gradient
    along their own direction is then zero.
    """
    tangent = _wide(tangent)
    root = torch.as_tensor(r, dtype=tangent.dtype, device=tangent.device).sqrt()
    length = tangent.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    reach = torch.minimum(length, largest_tangent(r).to(tangent))
    space: Tensor = torch.sinh(2 * root * reach) / (root * length) * tangent
    return space


def log0(space: Tensor, r: float | Tensor) -> Tensor:
    """Inverse of `exp0`: points s [..., d] -> tangent vectors [..., d]."""
    space = _wide(space)
    root = torch.as_tensor(r, dtype=space.dtype, device=space.device).sqrt()
    length = space.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    tangent: Tensor = torch.asinh(root * length) / (2 * root * length) * space
    return tangent


def to_ball(space: Tensor, r: float | Tensor) -> Tensor:
    """Points s [..., d] in the ball: u [..., d]."""
    space = _wide(space)
    return space / (1 + torch.sqrt(1 + r * space.square().sum(-1, keepdim=True)))


def from_ball(points: Tensor, r: float | Tensor) -> Tensor:
    """Points u [..., d] of the ball, as s [..., d]; those beyond RIM are drawn back to it."""
    points = _wide(points)
    limit = RIM / torch.as_tensor(r, dtype=points.dtype, device=points.device).sqrt()
    points = points * (limit / points.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
    return 2 * points / (1 - r * points.square().sum(-1, keepdim=True))


def ball_norm(space: Tensor, r: float | Tensor) -> Tensor:
    """||u|| of points s: [..., d] -> [...]; how deep a point lies."""
    norms: Tensor = to_ball(space, r).norm(dim=-1)
    return norms


def _arcosh(excess: Tensor, least: float) -> Tensor:
    """arcosh(1 + excess), accurate for a small excess."""
    excess = excess.clamp_min(least)
    return torch.log1p(excess + torch.sqrt(excess * (excess + 2)))


def distances(first: Tensor, second: Tensor, r: float | Tensor) -> Tensor:
    """All distances between points s [..., n, d] and s' [..., m, d]: [..., n, m], by one matrix product.

    d = arcosh(r (t t' - <s, s'>)) / sqrt(r).
    """
    first, second = _wide(first), _wide(second)
    inner = time_part(first, r)[..., :, None] * time_part(second, r)[..., None, :] - first @ second.mT
    return _arcosh(r * inner - 1, _LEAST) / torch.as_tensor(r, dtype=inner.dtype, device=inner.device).sqrt()


def paired_distances(first: Tensor, second: Tensor, r: float | Tensor) -> Tensor:
    """Distances of points s [..., d] and s' [..., d], row by row: [...].

    By r (||s - s'||^2 - (t - t')^2) / 2, which does not cancel when the points are near each other.
    """
    first, second = _wide(first), _wide(second)
    gap = (first - second).square().sum(-1)
    time = ((first - second) * (first + second)).sum(-1) / (time_part(first, r) + time_part(second, r))
    excess = r * (gap - time.square()) / 2
    return _arcosh(excess, _LEAST_PAIRED) / torch.as_tensor(r, dtype=gap.dtype, device=gap.device).sqrt()


def averages(space: Tensor, groups: Tensor, count: int, r: float | Tensor) -> tuple[Tensor, Tensor]:
    """Einstein midpoints of groups of points, by one scatter-add; a point may be in several groups.

    Args:
        space: points s [n, d].
        groups: int64 [n, m], the groups of each point; -1 for none. With m levels of a tree: its ancestors.
        count: number of groups.
        r: curvature is -r.

    Returns:
        Midpoints s [count, d] (zero for an empty group), and bool [count], which groups have points.
    """
    space = _wide(space)
    both = torch.cat([space, time_part(space, r)[:, None]], dim=1)
    rows, columns = torch.nonzero(groups >= 0, as_tuple=True)
    sums = both.new_zeros(count, both.shape[1]).index_add(0, groups[rows, columns], both[rows])
    total, time = sums[:, :-1], sums[:, -1]
    present = time > 0
    # T^2 - ||S||^2 is at least n^2 / r.
    length = (time.square() - total.square().sum(1)).clamp_min(1e-12)
    scale = torch.where(present, (r * length.where(present, torch.ones_like(length))).rsqrt(), 0.0)
    return total * scale[:, None], present
