"""Hyperbolic space in Lorentz coordinates: exponential map, all pairwise distances as one product, averages by group.

A point of the ball {||u||^2 < 1/r} of curvature -r is held by its space part s = 2 u / (1 - r ||u||^2), float32
[..., d]; its time part is t = sqrt(1/r + ||s||^2). The conformal factor at the origin is 2, so a tangent vector v lands
at distance 2 ||v||. (Nickel and Kiela 2018 for the coordinates; Ungar's Einstein midpoint for the average.)

Everything is computed in float32 at least: a low-precision sum of squares is no distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Points stay inside this share of the ball's radius, as the common implementations clamp them.
RIM = 1 - 1e-3
# Least excess over 1 of an arcosh argument, whose derivative is infinite at 1: what float32 leaves of t t' - <s, s'>,
# and what it leaves of a difference of points.
_LEAST, _LEAST_PAIRED = 1e-7, 1e-12
# exp of it is nothing beside 1, and still no denormal number.
_UNDERFLOW = -80.0
# Rows of distances that are worked on at once on a CPU, so that they stay in its cache.
_ROWS = 32


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


def distance_cross_entropy(
    first: Tensor, second: Tensor, temperature: Tensor, targets: Tensor, r: float, mask: Tensor | None = None
) -> Tensor:
    """CE(-temperature * distances(first, second), targets), row by row: [n].

    The forward pass leaves the gradient of each distance behind, so that a backward pass is two matrix products: built
    from `distances` and a softmax it would read and write the [n, m] matrix some forty times.

    Args:
        first, second: points s [n, d] and s' [m, d].
        temperature: positive, [].
        targets: int64 [n].
        r: curvature is -r.
        mask: float [n, m], added to the logits: a large negative number where a point does not compete. Finite, since
            CPUs take exp(-inf) slowly.
    """
    first, second = _wide(first), _wide(second)
    left = torch.cat([first, time_part(first, r)[:, None]], 1)
    right = torch.cat([-second, time_part(second, r)[:, None]], 1)
    losses: Tensor = _DistanceCrossEntropy.apply(left, right, temperature, targets, r, mask)
    return losses


class _DistanceCrossEntropy(torch.autograd.Function):
    """On (s, t) [n, d+1] and (-s', t') [m, d+1], whose products are t t' - <s, s'>."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        temperature: Tensor,
        targets: Tensor,
        r: float,
        mask: Tensor | None,
    ) -> Tensor:
        slopes = left @ right.T  # becomes dCE / d(t t' - <s, s'>)
        losses, by_temperature = left.new_empty(len(left)), left.new_empty(len(left))
        scale, root = temperature.to(left), r**0.5
        together = _ROWS if left.device.type == "cpu" else max(1, len(left))
        for start in range(0, len(left), together):
            part = slice(start, start + together)
            excess = slopes[part].mul_(r).sub_(1)
            # Rare, and slow to compare on a CPU; asking first would make a GPU wait.
            flat = excess < _LEAST if excess.is_cuda or bool(excess.amin() < _LEAST) else None
            excess.clamp_min_(_LEAST)
            root_term = (excess + 2).mul_(excess).sqrt_()
            distance = excess.add_(root_term).log1p_().div_(root)
            logits = distance * -scale
            if mask is not None:
                logits.add_(mask[part])
            target = targets[part, None]
            logits.sub_(logits.amax(1, keepdim=True))
            ours = logits.gather(1, target)
            shares = logits.clamp_min_(_UNDERFLOW).exp_()
            total = shares.sum(1, keepdim=True)
            losses[part] = (total.log() - ours).squeeze(1)
            shares.div_(total).scatter_add_(1, target, shares.new_full(target.shape, -1.0))
            by_temperature[part] = -(shares * distance).sum(1)
            torch.div(shares, root_term, out=slopes[part]).mul_(-scale * root)
            if flat is not None:
                slopes[part].masked_fill_(flat, 0.0)
        ctx.save_for_backward(left, right, slopes, by_temperature)
        ctx.temperature_dtype = temperature.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, slopes, by_temperature = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        to_left = (slopes @ right).mul_(grad[:, None]) if wanted[0] else None
        to_right = slopes.T @ (left * grad[:, None]) if wanted[1] else None
        to_temperature = (grad * by_temperature).sum().to(ctx.temperature_dtype) if wanted[2] else None
        return to_left, to_right, to_temperature, None, None, None


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
