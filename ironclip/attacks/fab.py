"""FAB: the nearest picture across the boundary, by projections onto its linearisation (Croce and Hein 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ironclip.attacks.apgd import Progress, labels_to_leave, look, rank_others
from ironclip.attacks.contract import Answer, Problem, Query, Steps
from ironclip.attacks.objectives import Objective
from ironclip.attacks.pgd import random_start
from ironclip.attacks.threat import Norm
from ironclip.errors import OptionError

_BIAS = 0.1  # alpha_max: the most weight that the original picture gets
_OVERSHOOT = 1.05  # eta
_PASSES = 64  # Newton's; it has arrived after about ten
_BACK = 0.9  # beta: how much of the way back to the picture is kept, once across


def project_on_plane(points: Tensor, normals: Tensor, offsets: Tensor, norm: Norm) -> Tensor:
    """The shortest step onto a hyperplane that stays inside [0, 1] (section 2.2): [b, ...] of the shape of ``points``.

    Each coordinate moves by min(lambda * u, room), with u = 1 for ``linf`` (0 where w is) and |w| for ``l2``, and room
    the way to the cube's face. What is covered towards the plane is a concave, piecewise linear function of lambda, so
    Newton's method from 0 climbs to the one that reaches it and stops there exactly, after a few passes over the
    coordinates (sorting them, as the paper does, takes longer than a small network's backward pass). Where the plane
    does not meet the cube, the step goes as far towards it as the cube allows.

    Args:
        points: [b, ...] in [0, 1].
        normals: w, of the same shape.
        offsets: [b], <w, point> + b: how far the plane is off, signed.
        norm: in which the step is short.
    """
    w, x = normals.flatten(1), points.flatten(1)
    down = (w * offsets[:, None]) > 0  # against the gradient where the offset is positive
    room = torch.where(down, x, 1 - x)
    weight = w.abs()
    # Where the plane does not lean, a step leads nowhere.
    unit = (weight > 0).to(w) if norm == "linf" else weight
    need = offsets.abs()[:, None]
    speed, most = weight * unit, weight * room
    beyond = most.sum(1, keepdim=True) <= need
    step = torch.zeros_like(need)
    for passed in range(_PASSES):
        arrived = (step * unit >= room).to(w)
        # What has arrived at its face, and the rest at the speed that it has here.
        covered = (most * arrived).sum(1, keepdim=True)
        further = (need - covered) / (speed * (1 - arrived)).sum(1, keepdim=True).clamp_min(1e-30)
        # A GPU is asked now and then only: it would have to wait for the answer.
        if (not w.is_cuda or passed % 8 == 7) and not bool(((further > step) & ~beyond).any()):
            break
        step = torch.maximum(step, further)
    step = torch.where(beyond, torch.inf, step)
    length = torch.minimum(torch.where(unit > 0, step * unit, 0.0), room)
    return torch.where(down, -length, length).reshape(points.shape)


def _difference(labels: Tensor, targets: Tensor) -> Objective:
    """The target's logit minus the label's: 0 on the boundary between the two."""

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        pair = torch.stack([targets[items], labels[items]], dim=1)
        both = logits.gather(1, pair)
        return both[:, 0] - both[:, 1]

    return loss


@dataclass(frozen=True)
class FAB:
    """Targeted FAB (FAB-T) as in AutoAttack: the likeliest wrong classes one after the other.

    It looks for the nearest adversarial picture and may ask about pixels beyond the radius; an item is fooled when one
    inside is found.

    Attributes:
        classes: targets tried for each item at most.
        iterations: steps of each target.
        restarts: rounds over all targets; from the second on from a random start.
        seed: of the random starts.
    """

    classes: int = 9
    iterations: int = 100
    restarts: int = 1
    seed: int = 0
    name: ClassVar[str] = "fab-t"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.classes < 1 or self.iterations < 1 or self.restarts < 1:
            raise OptionError("classes, iterations and restarts are at least 1.")

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`. Needs the problem's labels and no targets of its own (ValueError)."""
        labels = labels_to_leave(problem, self.name)
        progress = Progress.begin(problem)
        logits = yield from look(problem, progress)
        ranked = rank_others(logits, labels)
        for restart in range(self.restarts):
            for rank in range(min(self.classes, logits.shape[1] - 1)):
                objective = _difference(labels, ranked[:, rank])
                draw = restart * self.classes + rank
                yield from self._towards(problem, progress, objective, draw, bool(restart))
        return progress.images

    def _towards(self, problem: Problem, progress: Progress, objective: Objective, draw: int, random: bool) -> Steps:
        threat = problem.threat
        items = progress.left
        originals = problem.images[items]
        pixels = random_start(problem, items, seed=self.seed, restart=draw) if random else originals
        left = torch.full_like(items, self.iterations)
        back = torch.zeros_like(items, dtype=torch.bool)  # whose point was just taken back, and is stepped from
        while len(items):
            answer: Answer = yield Query(pixels, items, objective, True, progress.step)
            progress.step += 1
            assert answer.gradient is not None
            reach = threat.distances(originals, pixels)
            inside = answer.fooled & (reach <= threat.eps)
            progress.images[items[inside]] = pixels[inside]
            progress.fooled[items[inside]] = True
            going = ~inside & (left > 0)
            items, originals, pixels, left = items[going], originals[going], pixels[going], left[going]
            gradient, loss = answer.gradient[going], answer.loss[going]
            # Once across, back towards the picture; the next step begins there, on whichever side that is.
            back = answer.fooled[going] & ~back[going]
            moved = self._step(originals, pixels, gradient, loss, threat.norm)
            pixels = torch.where(back[:, None, None, None], originals + _BACK * (pixels - originals), moved)
            left = left - (~back).long()
        return progress.images

    @staticmethod
    def _step(originals: Tensor, pixels: Tensor, gradient: Tensor, loss: Tensor, norm: Norm) -> Tensor:
        """Equations 7 to 9: towards the plane from here and from the picture, weighed by the two distances."""
        if not len(pixels):
            return pixels
        shape = (-1, *[1] * (pixels.ndim - 1))
        here = project_on_plane(pixels, gradient, loss, norm)
        offset = loss + (gradient * (originals - pixels)).flatten(1).sum(1)
        there = project_on_plane(originals, gradient, offset, norm)
        if norm == "linf":
            near, far = here.flatten(1).abs().amax(1), there.flatten(1).abs().amax(1)
        else:
            near, far = here.flatten(1).norm(dim=1), there.flatten(1).norm(dim=1)
        bias = (near / (near + far).clamp_min(1e-12)).clamp_max(_BIAS).view(shape)
        moved = (1 - bias) * (pixels + _OVERSHOOT * here) + bias * (originals + _OVERSHOOT * there)
        return moved.clamp(0, 1)
