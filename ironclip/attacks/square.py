"""Square attack (Andriushchenko et al. 2020): random search over square windows, no gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks.contract import Answer, Problem, Query, Steps
from ironclip.attacks.objectives import make_objective
from ironclip.attacks.threat import lengths
from ironclip.errors import OptionError
from ironclip.noise import integers, signs

# Section 4.1: the share of pixels in a window is halved at these queries out of 10,000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square:
    """Score-based black box: keeps a random change of a window where it raises the margin.

    Attributes:
        queries: for each item at most.
        share: of the pixels that the first windows cover (p in the paper).
        restarts: rounds of ``queries``; a later one is for the items that are not fooled yet.
        seed: of all draws.
    """

    queries: int = 5000
    share: float = 0.8
    restarts: int = 1
    seed: int = 0
    name: ClassVar[str] = "square"
    gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.queries < 1 or self.restarts < 1 or not 0 < self.share <= 1:
            raise OptionError("queries and restarts are at least 1, share is above 0 and at most 1.")

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`."""
        objective = problem.objective
        if problem.labels is not None:
            objective = make_objective("margin", problem.labels, problem.targets)
        best = problem.images.clone()
        fooled = problem.done
        step = 0
        for restart in range(self.restarts):
            items = torch.nonzero(~fooled).flatten()
            highest = torch.full((len(problem),), -torch.inf, device=best.device)
            for number in range(self.queries):
                if not len(items):
                    return best
                draw = restart * self.queries + number
                pixels = self._propose(problem, items, best[items], number, draw)
                answer: Answer = yield Query(pixels, items, objective, False, step)
                step += 1
                better = (answer.loss > highest[items]) | answer.fooled
                best[items[better]] = pixels[better]
                highest[items[better]] = answer.loss[better]
                fooled[items] |= answer.fooled
                items = items[~answer.fooled]
        return best

    def window(self, number: int, side: int) -> int:
        """Side of the windows of query ``number``, in pixels: the square root of the share that is due."""
        due = int(number / self.queries * 10_000)
        share = self.share * 0.5 ** sum(due > halving for halving in _HALVINGS)
        return max(1, min(side - 1, round(math.sqrt(share) * side)))

    def _propose(self, problem: Problem, items: Tensor, best: Tensor, number: int, draw: int) -> Tensor:
        images, keys = problem.images[items], problem.keys[items]
        if problem.threat.norm == "linf":
            if number == 0:
                # Vertical stripes to begin with (section 4.3).
                stripes = signs(keys, (images.shape[1], 1, images.shape[3]), seed=self.seed, step=draw)
                return problem.threat.project(images, images + problem.threat.eps * stripes)
            side = self.window(number, images.shape[2])
            inside = _window(keys, images.shape, side, self.seed, draw, 0)[2]
            change = signs(keys, (images.shape[1], 1, 1), seed=self.seed, step=draw, stream=2)
            moved = images + problem.threat.eps * change
            return problem.threat.project(images, torch.where(inside, moved, best))
        if number == 0:
            delta = _tiles(keys, images.shape, self.seed, draw)
            delta = delta * (problem.threat.eps / lengths(delta, "l2"))
        else:
            side = max(3, self.window(number, images.shape[2]) // 2 * 2 + 1)
            side = min(side, (images.shape[2] - 1) // 2 * 2 + 1)
            delta = _move_mass(best - images, problem.threat.eps, side, keys, self.seed, draw)
        return problem.threat.project(images, images + delta)


def _window(
    keys: Tensor, shape: torch.Size, side: int, seed: int, step: int, stream: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A random window for each item: rows and columns relative to its corner, and where it is: bool [b, 1, H, W]."""
    height, width = shape[-2:]
    top = integers(keys, (), height - side + 1, seed=seed, step=step, stream=stream)
    left = integers(keys, (), width - side + 1, seed=seed, step=step, stream=stream + 1)
    rows = torch.arange(height, device=keys.device) - top[:, None]
    columns = torch.arange(width, device=keys.device) - left[:, None]
    inside = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return rows, columns, inside[:, None]


def _bump(height: int, width: int, device: torch.device) -> Tensor:
    """The paper's eta of a rectangle (section 4.4): largest in the middle, falling towards the rim; [height, width]."""
    middle = height // 2
    rows = (torch.arange(height, device=device) - height // 2).abs()
    columns = (torch.arange(width, device=device) - width // 2).abs()
    # Rings are counted from the rim along the longer way, so that a half square has its own middle.
    reach = middle - torch.maximum(rows[:, None], (columns * height // max(1, width))[None, :])
    terms = 1.0 / (middle + 1 - torch.arange(middle + 1, device=device).float()) ** 2
    sums: Tensor = terms.cumsum(0)
    return sums[reach.clamp(0, middle)]


def _pattern(side: int, device: torch.device) -> Tensor:
    """Eta of a square: one half up, the other down, length one; [side, side]."""
    half = side // 2
    pattern = torch.cat([_bump(side, half, device), -_bump(side, side - half, device)], dim=1)
    unit: Tensor = pattern / pattern.norm()
    return unit


def _turned(pattern: Tensor, turn: Tensor) -> Tensor:
    """The pattern for each item, transposed where ``turn``: [b, side, side]."""
    return torch.where(turn[:, None, None], pattern.T, pattern)


def _tiles(keys: Tensor, shape: torch.Size, seed: int, step: int) -> Tensor:
    """The first perturbation: tiles of the pattern, each channel of each with its own sign; [b, C, H, W]."""
    channels, height, width = shape[1:]
    side = max(2, height // 5)
    down, across = -(-height // side), -(-width // side)
    turn = signs(keys, (), seed=seed, step=step) > 0
    tile = _turned(_pattern(side, keys.device), turn)
    up = signs(keys, (channels, down, across), seed=seed, step=step, stream=1)
    whole = torch.einsum("bcij,brs->bcirjs", up, tile).reshape(len(keys), channels, down * side, across * side)
    return whole[:, :, :height, :width]


def _move_mass(delta: Tensor, eps: float, side: int, keys: Tensor, seed: int, step: int) -> Tensor:
    """Algorithm 3: empty one window and put its length, and what the ball leaves free, into another."""
    rows, columns, first = _window(keys, delta.shape, side, seed, step, 0)
    second = _window(keys, delta.shape, side, seed, step, 2)[2]
    channels = delta.shape[1]
    turn = signs(keys, (), seed=seed, step=step, stream=4) > 0
    pattern = _turned(_pattern(side, delta.device), turn)
    inner = (rows.clamp(0, side - 1)[:, :, None] * side + columns.clamp(0, side - 1)[:, None, :]).flatten(1)
    placed = pattern.flatten(1).gather(1, inner).reshape(len(keys), 1, *delta.shape[2:]) * first
    spare = (eps**2 - delta.square().sum((1, 2, 3))).clamp_min(0) / channels
    available = ((delta * (first | second)).square().sum((2, 3)) + spare[:, None]).sqrt()
    sign = signs(keys, (channels, 1, 1), seed=seed, step=step, stream=5)
    old = delta * first
    fresh = placed * sign + old / old.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    fresh = fresh / fresh.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
    return torch.where(first, fresh * available[:, :, None, None], torch.where(second, 0.0, delta))
