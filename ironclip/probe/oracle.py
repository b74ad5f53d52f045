"""Answers the queries of many probes in batches of one fixed size.

A batch is always padded to the same rows, so a row comes to the same numbers whoever shares it: a probe alone and
among others sees the same losses and gradients, bit for bit. Gradients are those of the picture rounded to 8 bits,
passed straight through the rounding; what counts as fooled is asked of the served decision again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ironclip.attacks import Answer, Problem, Query
from ironclip.attacks.eight_bit import in_8_bits, inside_8_bits
from ironclip.attacks.whitebox import as_found
from ironclip.classifier import Classifier
from ironclip.precision import exact_float32
from ironclip.probe.target import UNSEEN, Target


@dataclass
class Ask:
    """One query about one picture.

    Attributes:
        target: what is asked.
        problem: whose verdict counts.
        original: uint8 [3, R, R], the picture that is attacked.
        query: one row.
        seeds: draws to average over; empty for the draws that are served.
        inside: whether the picture in 8 bits is within the radius: FAB looks beyond it, and that breaks nothing.
        said: where it was fooled, what most of the served decisions that were fooled say, as a position.
        confirmations: decisions of what is served that were asked for.
    """

    target: Target
    problem: Problem
    original: Tensor
    query: Query
    seeds: tuple[int, ...] = ()
    picture: Tensor = field(init=False)
    inside: bool = field(init=False)
    losses: list[Tensor] = field(default_factory=list, init=False)
    outputs: list[Tensor] = field(default_factory=list, init=False)
    gradients: list[Tensor] = field(default_factory=list, init=False)
    served: Tensor | None = field(default=None, init=False)
    said: int | None = field(default=None, init=False)
    confirmations: int = field(default=0, init=False)
    _fooled: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        pictures = in_8_bits(self.query.pixels[:1], self.original[None], self.problem.threat)
        self.picture = pictures[0]
        self.inside = bool(inside_8_bits(pictures, self.original[None], self.problem.threat)[0])

    def confirm(self) -> Iterator[None]:
        """Where all draws together were fooled, ask the served decision, a decision at a time."""
        votes = torch.stack([self.problem.fooled(one, self.query.items) for one in self.outputs])
        fooled = votes.float().mean(0) > 0.5
        if bool(fooled[0]):
            # Drawn from the ranges above those that the attack may draw from.
            seeds: Sequence[int | None] = UNSEEN if self.seeds else (None,)
            answers = []
            for seed in seeds:
                answers.append(self.target.answers(self.picture, seed))
                self.confirmations += 1
                yield
            self.served = torch.stack(answers).mean(0)
            votes = torch.stack([self.problem.fooled(one, self.query.items) & self._says_so(one) for one in answers])
            fooled = (votes.float().mean() > 0.5).reshape(1)
            if bool(fooled[0]) and self.target.names:
                self.said = _by_most(torch.cat(answers)[votes.flatten()])
        self._fooled = fooled

    def answer(self) -> Answer:
        """What all draws said together, and the served decision where they were fooled."""
        if self._fooled is None:
            for _ in self.confirm():
                pass
        assert self._fooled is not None
        gradient = torch.stack(self.gradients).mean(0) if self.gradients else None
        return Answer(torch.stack(self.losses).mean(0), self._fooled, torch.stack(self.outputs).mean(0), gradient)

    def _says_so(self, outputs: Tensor) -> Tensor:
        """Whether the label that is answered is another one (or the target): a tie is no break if it goes well."""
        said = outputs.argmax(1)
        if self.problem.targets is not None:
            return said == self.problem.targets
        if self.problem.labels is not None:
            return said != self.problem.labels
        return torch.ones_like(said, dtype=torch.bool)


def _by_most(outputs: Tensor) -> int:
    """What most of several decisions say, [n, K] -> a position; of those as many say, the likelier one.

    Their mean is no decision: it can name what none of them says, the true label too.
    """
    votes = torch.bincount(outputs.argmax(1), minlength=outputs.shape[1])
    # A mean of probabilities is at most 1: it tells apart those of as many votes.
    return int((votes + outputs.double().softmax(1).mean(0) / 2).argmax())


@dataclass(frozen=True)
class Piece:
    """Pictures that are asked about together, for one draw.

    Attributes:
        asks: what is asked of them.
        seed: of the draw; None for the one that is served.
        gradient: whether gradients are asked for.
        rows: pictures that it is filled up to.
        most: views that go through the tower together.
    """

    asks: tuple[Ask, ...]
    seed: int | None
    gradient: bool
    rows: int
    most: int

    def drawn(self, classifier: Classifier) -> Classifier:
        """A classifier with this piece's draws."""
        return classifier if self.seed is None else classifier.reseeded(self.seed)


@dataclass(frozen=True)
class Rows:
    """Sizes of batches, which are always filled up.

    Attributes:
        gradient, forward: views in one batch of queries with a gradient, and of those without.
        views: of one picture that go through the tower together at most.
    """

    gradient: int
    forward: int
    views: int


def rows_for(device: torch.device) -> Rows:
    """What suits a device: a GPU is hardly slower with many, a CPU loses what it fills up."""
    return Rows(1, 1, 4) if device.type == "cpu" else Rows(32, 32, 32)


def pieces(asks: Sequence[Ask], rows: Rows | None = None) -> Iterator[Piece]:
    """Cut queries into batches (of at least one picture), each of one encoder, defence and draw.

    Args:
        asks: queries of any number of probes.
        rows: `rows_for` the encoder's device if not given.
    """
    groups: dict[tuple[Any, ...], list[Ask]] = {}
    for ask in asks:
        classifier = ask.target.attacked
        key = (id(classifier.encoder), classifier.defence, ask.query.gradient, ask.seeds)
        groups.setdefault(key, []).append(ask)
    for (_, defence, gradient, seeds), members in groups.items():
        fitting = rows or rows_for(members[0].target.attacked.encoder.device)
        size = max(1, (fitting.gradient if gradient else fitting.forward) // defence.cost)
        most = max(size, fitting.views)
        for start in range(0, len(members), size):
            part = tuple(members[start : start + size])
            for seed in seeds or (None,):
                yield Piece(part, seed, gradient, size, most)


def run(piece: Piece) -> None:
    """Ask about one piece at once, see `steps`."""
    for _ in steps(piece):
        pass


def steps(piece: Piece) -> Iterator[None]:
    """Ask about one piece, at most so many views at a time; losses, outputs and gradients go into its asks.

    Views that go through the tower together make one step, forwards and backwards. Where a picture has more of them,
    the decision stands between its parts' forwards and their backwards: no forward is done twice.
    """
    work = _Work(piece)
    for part in work.parts():
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(piece.gradient),
            as_found(work.classifier.encoder),
            exact_float32(),
        ):
            part()
        yield


class _Work:
    """One piece in progress."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.classifier = piece.drawn(piece.asks[0].target.attacked)
        self.pixels, self.views = torch.empty(0), torch.empty(0)
        # Of each part: its views, and their features with the graph between.
        self.passed: list[tuple[Tensor, Tensor]] = []
        self.wanted = torch.empty(0)

    def parts(self) -> Iterator[Callable[[], None]]:
        """What is to be done, one after the other."""
        count = self.piece.rows * self.classifier.defence.view_count
        if count <= self.piece.most:
            yield self._whole
            return
        starts = range(0, count, self.piece.most)
        for start in starts:
            yield partial(self._forward, start)
        yield self._decide
        if self.piece.gradient:
            for number in range(len(starts)):
                yield partial(self._backward, number)

    def _whole(self) -> None:
        self._forward(0)
        self._decide()
        if self.piece.gradient:
            self._backward(0)

    def _forward(self, start: int) -> None:
        if not start:
            self._start()
        views = self.views[start : start + self.piece.most].detach().requires_grad_(self.piece.gradient)
        self.passed.append((views, self.classifier.encoder.encode_image(views)))

    def _start(self) -> None:
        piece, encoder = self.piece, self.classifier.encoder
        side = encoder.resolution
        self.pixels = torch.zeros(piece.rows, 3, side, side, device=encoder.device)
        for row, ask in enumerate(piece.asks):
            self.pixels[row] = ask.picture.to(encoder.device).float() / 255
        self.pixels.requires_grad_(piece.gradient)
        self.views = self.classifier.defence.make_views(self.pixels, encoder.encode_image).flatten(0, 1)

    def _decide(self) -> None:
        piece = self.piece
        features = torch.cat([features.detach() for _, features in self.passed]).requires_grad_(piece.gradient)
        by_picture = features.reshape(piece.rows, -1, features.shape[-1])
        losses = []
        for row, ask in enumerate(piece.asks):
            # Its own label set and level; the draws are the piece's.
            outputs = ask.target.outputs(piece.drawn(ask.target.attacked), by_picture[row : row + 1])
            loss = ask.query.objective(outputs, ask.query.items)
            losses.append(loss.sum())
            ask.losses.append(loss.detach().float())
            ask.outputs.append(outputs.detach().float())
        if piece.gradient:
            (self.wanted,) = torch.autograd.grad(torch.stack(losses).sum(), features)

    def _backward(self, number: int) -> None:
        views, features = self.passed[number]
        wanted = self.wanted[number * self.piece.most :][: len(features)]
        (gradient,) = torch.autograd.grad(features, views, wanted)
        self.passed[number] = (gradient, features.detach())
        if number + 1 < len(self.passed):
            return
        whole = torch.cat([gradient for gradient, _ in self.passed])
        (gradient,) = torch.autograd.grad(self.views, self.pixels, whole)
        for row, ask in enumerate(self.piece.asks):
            ask.gradients.append(gradient[row : row + 1].float())
