"""FGSM and PGD: steps along the gradient, projected back into the ball."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ironclip.attacks.contract import Answer, Problem, Query, Steps
from ironclip.attacks.objectives import carlini_wagner
from ironclip.attacks.threat import ThreatModel, lengths
from ironclip.errors import OptionError
from ironclip.noise import normal, uniform


def random_start(problem: Problem, items: Tensor, *, seed: int, restart: int) -> Tensor:
    """A random point of the threat model for each item: uniform in the ball (``linf``: in the cube), then in [0, 1]."""
    images, keys = problem.images[items], problem.keys[items]
    shape, eps = images.shape[1:], problem.threat.eps
    if problem.threat.norm == "linf":
        delta = (uniform(keys, shape, seed=seed, step=restart) * 2 - 1) * eps
    else:
        direction = normal(keys, shape, seed=seed, step=restart)
        radius = uniform(keys, (), seed=seed, step=restart, stream=1) ** (1 / images[0].numel())
        delta = direction * (eps * radius.view(-1, 1, 1, 1) / lengths(direction, "l2"))
    return problem.threat.project(images, images + delta)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent (Madry et al. 2018), momentum as in MI-FGSM (Dong et al. 2018).

    Attributes:
        iterations: gradient steps of one start.
        step_size: length of a step in pixel units; 0 takes ``2.5 * eps / iterations``, at most eps.
        restarts: starts; a later one is for the items that are not fooled yet.
        momentum: weight of the mean of past gradients, each scaled to mean absolute value one.
        random_start: begin at a random point of the ball, else at the picture (a first start only).
        keep: ``best`` ends with the pixels of the largest loss seen (and asks about the last ones too); ``last`` ends
            with the last pixels, without asking about them: exactly ``iterations`` gradients, for training.
        stop_fooled: an item that is fooled is not attacked any further.
        seed: of the random starts.
        loss: ``own`` for the problem's objective; ``cw`` for Carlini and Wagner's (2017) hinge of the margin, on a
            problem with labels. A targeted problem is attacked by its own objective.
    """

    iterations: int = 10
    step_size: float = 0.0
    restarts: int = 1
    momentum: float = 0.0
    random_start: bool = True
    keep: Literal["best", "last"] = "best"
    stop_fooled: bool = True
    seed: int = 0
    loss: Literal["own", "cw"] = "own"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1:
            raise OptionError("iterations and restarts are at least 1.")
        if self.loss not in ("own", "cw"):
            raise OptionError(f"loss is own or cw, not {str(self.loss)[:40]!r}.")
        if self.step_size < 0 or self.momentum < 0:
            raise OptionError("step_size and momentum are at least 0.")

    @property
    def name(self) -> str:
        """``pgd``, or ``cw`` with that loss."""
        return "pgd" if self.loss == "own" else self.loss

    def _step_size(self, threat: ThreatModel) -> float:
        return self.step_size or min(2.5 * threat.eps / self.iterations, threat.eps)

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`."""
        objective = problem.objective
        if self.loss == "cw" and problem.targets is None:
            if problem.labels is None:
                raise ValueError("cw needs a problem with labels")
            objective = carlini_wagner(problem.labels)
        best = problem.images.clone()
        highest = torch.full((len(problem),), -torch.inf, device=best.device)
        fooled = problem.done
        step = 0
        for restart in range(self.restarts):
            items = torch.nonzero(~fooled).flatten()
            if not len(items):
                break
            images = problem.images[items]
            if self.random_start or restart:
                pixels = random_start(problem, items, seed=self.seed, restart=restart)
            else:
                pixels = images
            velocity = torch.zeros_like(pixels)
            for iteration in range(self.iterations + (self.keep == "best")):
                last = iteration == self.iterations
                answer: Answer = yield Query(pixels, items, objective, not last, step)
                step += 1
                better = answer.loss > highest[items]
                if self.keep == "best":
                    # A fooled item keeps the pixels that fooled it: a larger loss may fool less.
                    better = (better & ~fooled[items]) | (answer.fooled & ~fooled[items])
                    best[items[better]] = pixels[better]
                highest[items] = torch.maximum(highest[items], answer.loss)
                fooled[items] |= answer.fooled
                if last:
                    break
                assert answer.gradient is not None
                direction = answer.gradient
                if self.momentum:
                    scale = direction.abs().flatten(1).mean(1).clamp_min(1e-38).view(-1, 1, 1, 1)
                    velocity = self.momentum * velocity + direction / scale
                    direction = velocity
                moved = pixels + self._step_size(problem.threat) * problem.threat.ascent(direction)
                pixels = problem.threat.project(images, moved)
                if self.stop_fooled and bool(answer.fooled.any()):
                    left = ~answer.fooled
                    items, images, pixels, velocity = items[left], images[left], pixels[left], velocity[left]
                    if not len(items):
                        break
            if self.keep == "last":
                best[items] = pixels
        return best


@dataclass(frozen=True)
class FGSM:
    """One step of the full radius (Goodfellow et al. 2015): PGD with one iteration and no random start."""

    name: ClassVar[str] = "fgsm"
    gradients: ClassVar[bool] = True

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`."""
        once = PGD(iterations=1, random_start=False, restarts=1)
        return (yield from replace(once, step_size=problem.threat.eps).steps(problem))
