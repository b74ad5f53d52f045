"""How an attack talks to what it attacks: it asks about pixels, and is told loss, verdict and gradient.

An attack is a generator: it yields a `Query` and is sent an `Answer`, until it returns the adversarial pixels. So a
loop can drive it (`drive`), and a service can answer one query, do other work, and answer the next (`Run`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ironclip.attacks.objectives import Objective, Verdict, make_objective, reached, wrong
from ironclip.attacks.threat import ThreatModel


@dataclass(frozen=True)
class Query:
    """What an attack wants to know.

    Attributes:
        pixels: float32 [b, 3, R, R] in [0, 1], inside the threat model (FAB alone may look beyond its radius).
        items: int64 [b], which items of the problem these are; an item may occur only once.
        objective: what is to be raised.
        gradient: whether the objective's gradient is wanted.
        step: counts up; a random model draws anew for each.
        part: name of the attack that asks, where it is one of several that are run as one.
    """

    pixels: Tensor
    items: Tensor
    objective: Objective
    gradient: bool
    step: int
    part: str = ""


@dataclass(frozen=True)
class Answer:
    """What it is told.

    Attributes:
        loss: float32 [b], the objective.
        fooled: bool [b].
        outputs: [b, ...], what the model said (for a random model the mean over its draws).
        gradient: float32 [b, 3, R, R] of each item's own loss, if asked for.
    """

    loss: Tensor
    fooled: Tensor
    outputs: Tensor
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """Pictures to be fooled.

    Attributes:
        images: float32 [N, 3, R, R] in [0, 1].
        threat: what may be changed.
        objective: what the attack raises where it has none of its own.
        fooled: when an item is done.
        labels: int64 [N], for attacks that choose objectives themselves (APGD-T, Square, AutoAttack); else None.
        targets: int64 [N], the class to reach, in a targeted problem.
        keys: int64 [N]: random draws belong to these; an item's attack is the same in every batch.
        active: bool [N], which items are to be attacked; all if None.
    """

    images: Tensor
    threat: ThreatModel
    objective: Objective
    fooled: Verdict
    keys: Tensor
    labels: Tensor | None = None
    targets: Tensor | None = None
    active: Tensor | None = None

    @property
    def done(self) -> Tensor:
        """bool [N], a new tensor: items that are not to be attacked."""
        if self.active is not None:
            return ~self.active
        return torch.zeros(len(self), dtype=torch.bool, device=self.images.device)

    def __len__(self) -> int:
        return len(self.images)


def classification(
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    objective: str | Objective = "ce",
    targets: Tensor | None = None,
    keys: Tensor | None = None,
) -> Problem:
    """The usual problem: make a classifier say something else than ``labels``, or say ``targets``.

    Args:
        images: float [N, 3, R, R] in [0, 1].
        labels: int64 [N].
        threat: what may be changed.
        objective: a name of `objectives`, or one's own.
        targets: int64 [N]; with them the attack is targeted.
        keys: see Problem; positions if not given.

    Raises:
        OptionError: no objective of this name.
        ValueError: pixels outside [0, 1], or lengths that differ.
    """
    if len(images) != len(labels) or (targets is not None and len(targets) != len(labels)):
        raise ValueError("images, labels and targets must be of one length")
    if len(images) and not (float(images.amin()) >= 0 and float(images.amax()) <= 1):
        raise ValueError("pixels must lie in [0, 1]; normalisation belongs inside the model")
    images = images.detach().float()
    labels = labels.to(images.device)
    targets = targets.to(images.device) if targets is not None else None
    if isinstance(objective, str):
        objective = make_objective(objective, labels, targets)
    return Problem(
        images=images,
        threat=threat,
        objective=objective,
        fooled=wrong(labels) if targets is None else reached(targets),
        keys=(torch.arange(len(images)) if keys is None else keys).to(images.device),
        labels=labels,
        targets=targets,
    )


# Yields queries, is sent answers, returns adversarial pixels [N, 3, R, R].
Steps = Generator[Query, Answer, Tensor]


class Attack(Protocol):
    """One way to attack; its options are its fields.

    Attributes:
        name: its key in ATTACKS.
        gradients: it asks for gradients (False: black box).
    """

    @property
    def name(self) -> str:
        """Its key in ATTACKS."""

    @property
    def gradients(self) -> bool:
        """Whether it asks for gradients."""

    def steps(self, problem: Problem) -> Steps:
        """Begin. What it returns lies inside the threat model, whose eps is above 0."""


@dataclass(frozen=True)
class Result:
    """What an attack came to.

    Attributes:
        images: float32 [N, 3, R, R], inside the threat model.
        fooled: bool [N]: some query of the attack fooled the model with these very pixels. An item that was fooled by
            no query is False, whatever its last pixels would do if asked about.
        forwards: int64 [N], queries about each item.
        backwards: int64 [N], those with a gradient.
        zero_gradients: int64 [N], answers whose gradient was zero everywhere: a sign of masking.
    """

    images: Tensor
    fooled: Tensor
    forwards: Tensor
    backwards: Tensor
    zero_gradients: Tensor


def _look(problem: Problem) -> Steps:
    """The attack of an empty ball: ask once about the pictures as they are."""
    items = torch.nonzero(~problem.done).flatten()
    if len(items):
        yield Query(problem.images[items], items, problem.objective, False, 0)
    return problem.images


class Run:
    """An attack in progress, advanced one answer at a time.

    Keeps what the attack itself need not: the first pixels that fooled each item, and what it cost.

    Args:
        attack: which.
        problem: on what.
        keep_fooled: give an item that was fooled its first fooling pixels, whatever the attack ends with. Training
            wants the attack's own last pixels instead.
    """

    def __init__(self, attack: Attack, problem: Problem, *, keep_fooled: bool = True) -> None:
        self.problem = problem
        self._keep = keep_fooled
        self._steps = attack.steps(problem) if problem.threat.eps > 0 else _look(problem)
        self._images = problem.images
        count, device = len(problem), problem.images.device
        self._fooled = torch.zeros(count, dtype=torch.bool, device=device)
        self._found = problem.images.clone() if keep_fooled else problem.images
        self._forwards, self._backwards, self._zero = (
            torch.zeros(count, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.query: Query | None = None
        self._advance(None)

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask."""
        return self.query is None

    @property
    def fooled(self) -> Tensor:
        """bool [N], so far."""
        return self._fooled

    def answer(self, answer: Answer) -> None:
        """Take the answer to `query` and go on to the next, or to the end.

        Raises:
            RuntimeError: the run is done.
        """
        query = self.query
        if query is None:
            raise RuntimeError("the attack has ended")
        items = query.items
        self._forwards[items] += 1
        if answer.gradient is not None:
            self._backwards[items] += 1
            self._zero[items] += (answer.gradient.flatten(1) == 0).all(1).long()
        if self._keep:
            # FAB looks beyond the radius: what fools there does not count.
            inside = self.problem.threat.contains(self.problem.images[items], query.pixels)
            new = answer.fooled & ~self._fooled[items] & inside
            self._found[items[new]] = query.pixels[new]
            self._fooled[items[new]] = True
        self._advance(answer)

    def result(self) -> Result:
        """The outcome so far; of an unfinished run, items not fooled yet are unchanged."""
        images = self._images
        if self._keep:
            images = torch.where(self._fooled[:, None, None, None], self._found, images)
        return Result(images, self._fooled, self._forwards, self._backwards, self._zero)

    def _advance(self, answer: Answer | None) -> None:
        try:
            self.query = next(self._steps) if answer is None else self._steps.send(answer)
        except StopIteration as stop:
            self.query = None
            self._images = stop.value


def drive(attack: Attack, problem: Problem, oracle: Callable[[Query], Answer], *, keep_fooled: bool = True) -> Result:
    """Run an attack to its end against ``oracle`` (see `whitebox.WhiteBox`); arguments as `Run`."""
    run = Run(attack, problem, keep_fooled=keep_fooled)
    while run.query is not None:
        run.answer(oracle(run.query))
    return run.result()
