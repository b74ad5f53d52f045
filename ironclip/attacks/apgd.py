"""APGD: PGD that finds its own step size (Croce and Hein 2020), against one objective or one target at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ironclip.attacks.contract import Answer, Problem, Query, Steps
from ironclip.attacks.objectives import LEAST_CLASSES, Objective, dlr, make_objective, margin, targeted_dlr
from ironclip.attacks.pgd import random_start
from ironclip.errors import OptionError

_MOMENTUM = 0.75  # alpha of algorithm 1, the weight of the new step
_ENOUGH = 0.75  # rho of condition 1, the share of steps that must raise the loss


def checkpoints(iterations: int) -> list[int]:
    """The iterations at which the step size is looked at (section 3.2.3): they draw nearer to each other."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({-int(-share * iterations // 1) for share in shares if 0 < share <= 1})


@dataclass
class _State:
    """What algorithm 1 keeps for each item under attack (rows are re-packed as items are done)."""

    items: Tensor
    pixels: Tensor
    previous: Tensor
    size: Tensor
    best: Tensor
    best_gradient: Tensor
    highest: Tensor
    last_loss: Tensor
    raised: Tensor
    highest_before: Tensor
    halved_before: Tensor

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for name, value in list(vars(self).items()):
            setattr(self, name, value[rows])


@dataclass
class Progress:
    """What one problem's attack has found so far, over restarts and targets.

    Attributes:
        images: the best pixels of each item.
        highest: their loss.
        fooled: bool [N].
        step: queries asked.
    """

    images: Tensor
    highest: Tensor
    fooled: Tensor
    step: int = 0

    @classmethod
    def begin(cls, problem: Problem) -> Progress:
        """Nothing found yet."""
        count, device = len(problem), problem.images.device
        return cls(
            problem.images.clone(),
            torch.full((count,), -torch.inf, device=device),
            problem.done,
        )

    @property
    def left(self) -> Tensor:
        """int64: items not fooled yet."""
        return torch.nonzero(~self.fooled).flatten()

    def note(self, items: Tensor, pixels: Tensor, answer: Answer) -> None:
        """Take over pixels that fooled, or that raised the loss of an item not fooled yet."""
        better = ~self.fooled[items] & (answer.fooled | (answer.loss > self.highest[items]))
        self.images[items[better]] = pixels[better]
        self.highest[items[better]] = answer.loss[better]
        self.fooled[items] |= answer.fooled
        self.step += 1


def ascend(
    problem: Problem, progress: Progress, objective: Objective, *, iterations: int, seed: int, restart: int
) -> Steps:
    """Algorithm 1 on all items that are not fooled yet, from one random start; results go into ``progress``.

    Args:
        problem: what is attacked.
        progress: what was found before; changed.
        objective: what is raised.
        iterations: steps; one more gradient is taken at the start.
        seed, restart: of the random start.

    Returns:
        ``progress.images``.
    """
    threat = problem.threat
    items = progress.left
    if not len(items):
        return progress.images
    start = random_start(problem, items, seed=seed, restart=restart)
    answer: Answer = yield Query(start, items, objective, True, progress.step)
    progress.note(items, start, answer)
    assert answer.gradient is not None
    state = _State(
        items=items,
        pixels=start,
        previous=start,
        size=torch.full((len(items), 1, 1, 1), 2 * threat.eps, device=start.device),
        best=start,
        best_gradient=answer.gradient,
        highest=answer.loss,
        last_loss=answer.loss,
        raised=torch.zeros_like(answer.loss),
        highest_before=answer.loss,
        halved_before=torch.ones_like(answer.fooled),
    )
    gradient = answer.gradient
    looks = checkpoints(iterations)
    since = 0
    for iteration in range(iterations):
        going = ~progress.fooled[state.items]
        if not bool(going.all()):
            gradient = gradient[going]
            state.keep(going)
            if not len(state.items):
                break
        images = problem.images[state.items]
        ahead = threat.project(images, state.pixels + state.size * threat.ascent(gradient))
        weight = _MOMENTUM if iteration else 1.0
        pixels = state.pixels + weight * (ahead - state.pixels) + (1 - weight) * (state.pixels - state.previous)
        pixels = threat.project(images, pixels)
        state.previous, state.pixels = state.pixels, pixels
        answer = yield Query(pixels, state.items, objective, True, progress.step)
        progress.note(state.items, pixels, answer)
        assert answer.gradient is not None
        gradient = answer.gradient
        state.raised += (answer.loss > state.last_loss).float()
        state.last_loss = answer.loss
        better = answer.loss > state.highest
        state.highest = torch.where(better, answer.loss, state.highest)
        rows = better[:, None, None, None]
        state.best = torch.where(rows, pixels, state.best)
        state.best_gradient = torch.where(rows, gradient, state.best_gradient)
        since += 1
        if iteration + 1 in looks:
            gradient = _look_at_step_size(state, gradient, since)
            since = 0
    return progress.images


def _look_at_step_size(state: _State, gradient: Tensor, since: int) -> Tensor:
    """Halve the step of items that stall, and send them back to their best pixels (conditions 1 and 2)."""
    few = state.raised < _ENOUGH * since
    stuck = ~state.halved_before & (state.highest <= state.highest_before)
    halve = few | stuck
    rows = halve[:, None, None, None]
    state.size = torch.where(rows, state.size / 2, state.size)
    state.pixels = torch.where(rows, state.best, state.pixels)
    state.halved_before, state.highest_before = halve, state.highest.clone()
    state.raised = torch.zeros_like(state.raised)
    return torch.where(rows, state.best_gradient, gradient)


def look(problem: Problem, progress: Progress) -> Generator[Query, Answer, Tensor]:
    """Ask about the pictures as they are; returns logits [N, K], rows of items that are not attacked left at zero.

    With nobody to ask about, K is 0.
    """
    items = progress.left
    if not len(items):
        return torch.zeros(len(problem), 0, device=problem.images.device)
    answer: Answer = yield Query(problem.images[items], items, problem.objective, False, progress.step)
    progress.note(items, problem.images[items], answer)
    progress.highest.fill_(-torch.inf)  # of another objective than what follows
    logits = answer.outputs.new_zeros(len(problem), answer.outputs.shape[1])
    logits[items] = answer.outputs
    return logits


def labels_to_leave(problem: Problem, name: str) -> Tensor:
    """The labels, for an attack that chooses its own targets; raises ValueError where there are none, or targets."""
    if problem.labels is None or problem.targets is not None:
        raise ValueError(f"{name} chooses its own targets: it needs an untargeted problem with labels")
    return problem.labels


def rank_others(logits: Tensor, labels: Tensor) -> Tensor:
    """Classes by falling logit, each row's own label last: int64 [N, K]."""
    if logits.shape[1] == 0:
        return logits.long()
    return logits.scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)


@dataclass(frozen=True)
class APGD:
    """Auto-PGD against one objective.

    Attributes:
        loss: ``ce``, ``dlr``, or ``own`` for the problem's objective. With fewer than three classes ``dlr`` is not
            defined and the margin takes its place; a targeted problem is attacked by its own objective.
        iterations: steps of one start.
        restarts: starts; a later one is for the items that are not fooled yet.
        seed: of the random starts.
    """

    loss: Literal["ce", "dlr", "own"] = "ce"
    iterations: int = 100
    restarts: int = 1
    seed: int = 0
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1:
            raise OptionError("iterations and restarts are at least 1.")

    @property
    def name(self) -> str:
        """``apgd-ce``, ``apgd-dlr`` or ``apgd``."""
        return "apgd" if self.loss == "own" else f"apgd-{self.loss}"

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`."""
        progress = Progress.begin(problem)
        objective = problem.objective
        if self.loss == "ce" and problem.labels is not None:
            objective = make_objective("ce", problem.labels, problem.targets)
        elif self.loss == "dlr" and problem.labels is not None and problem.targets is None:
            logits = yield from look(problem, progress)
            few = logits.shape[1] < LEAST_CLASSES["dlr"]
            objective = (margin if few else dlr)(problem.labels)
        for restart in range(self.restarts):
            yield from ascend(problem, progress, objective, iterations=self.iterations, seed=self.seed, restart=restart)
        return progress.images


@dataclass(frozen=True)
class APGDT:
    """Auto-PGD towards the likeliest wrong classes, one after the other (targeted DLR; Croce and Hein 2020, sec. 5).

    Attributes:
        classes: targets tried for each item at most: those of the largest logits on the clean picture. With fewer than
            four classes the targeted DLR is not defined, and one pass with the margin takes its place.
        iterations: steps of each target.
        restarts: rounds over all targets.
        seed: of the random starts.
    """

    classes: int = 9
    iterations: int = 100
    restarts: int = 1
    seed: int = 0
    name: ClassVar[str] = "apgd-t"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.classes < 1 or self.iterations < 1 or self.restarts < 1:
            raise OptionError("classes, iterations and restarts are at least 1.")

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`. Needs the problem's labels and no targets of its own (ValueError)."""
        labels = labels_to_leave(problem, self.name)
        progress = Progress.begin(problem)
        logits = yield from look(problem, progress)
        count = logits.shape[1]
        few = count < LEAST_CLASSES["targeted_dlr"]
        ranked = rank_others(logits, labels)
        for restart in range(self.restarts):
            for rank in range(1 if few else min(self.classes, count - 1)):
                objective = margin(labels) if few else targeted_dlr(labels, ranked[:, rank])
                progress.highest.fill_(-torch.inf)  # losses towards different targets do not compare
                draw = restart * self.classes + rank
                yield from ascend(
                    problem, progress, objective, iterations=self.iterations, seed=self.seed, restart=draw
                )
        return progress.images
