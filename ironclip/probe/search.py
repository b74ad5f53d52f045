"""One probe in progress: radii as lanes, a bracket that narrows, and what is known at any time.

A search tries radii side by side where that costs nothing (a GPU), else one after the other. Lanes that run advance
together, a query each, so that what a probe finds does not depend on what else the machine does. A lane ends when it is
broken, when its attack has ended, or when a lane with a smaller radius broke: that picture lies in its ball too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from ironclip.attacks import Answer, Attack, Run, Square, ThreatModel
from ironclip.attacks.eight_bit import holds_another
from ironclip.errors import OptionError
from ironclip.probe.cost import passes
from ironclip.probe.options import ProbeOptions
from ironclip.probe.oracle import Ask
from ironclip.probe.radii import lanes_for, next_radii
from ironclip.probe.target import Aim, Target, VectorTarget

# Radii of a given list that are attacked at the same time.
LISTED = 8
# How far two evaluations of one picture may lie apart, as in AutoAttack's check: a GPU adds up in any order.
_STEADY = 1e-4
# The attack's draws begin here for each radius in turn, far from those that judge.
_FIRST_DRAW = 1

State = Literal["waiting", "running", "broken", "held", "unknown"]


@dataclass
class Lane:
    """One radius.

    Attributes:
        eps: in the unit of the norm.
        threat: the same for the attack.
        state: how it stands.
        run: its attack, while it runs.
        left: attacks still to come, with the objectives of their problems.
        lowest: the lowest score of the label (or cosine with the clean vector) on a picture of this radius.
        said: what that picture is answered with, as a position among the names, and its score.
        picture: uint8 [3, R, R] that broke it.
        steps, gradients: queries, and those with a gradient (a draw counting as one).
        blind: gradients that were zero everywhere.
        found_by: name of the attack that broke it.
        part: which part of that, where it is AutoAttack.
        decided: its attacks have once run to their end and failed.
    """

    eps: float
    threat: ThreatModel
    left: list[tuple[Attack, str]]
    state: State = "waiting"
    run: Run | None = None
    lowest: float = math.inf
    said: tuple[int, float] | None = None
    picture: Tensor | None = None
    steps: int = 0
    gradients: int = 0
    blind: int = 0
    found_by: str = ""
    part: str = ""
    decided: bool = False


@dataclass(frozen=True)
class Clean:
    """The decision about the picture as it is, by what is served: outputs [K] or a vector [dim]."""

    outputs: Tensor

    def scores(self) -> Tensor:
        """Softmax over the names, float64 [K]."""
        return self.outputs.double().softmax(-1)

    def differs(self, again: Tensor) -> bool:
        """Whether another evaluation says more than sums in another order would: something draws anew each time."""
        return not torch.allclose(again, self.outputs, rtol=_STEADY, atol=_STEADY)


class Probe:
    """Attacks one decision about one picture; advanced by rounds of `asks` and `take`.

    Args:
        target: what is attacked.
        picture: uint8 [3, R, R], as the encoder's preprocessing leaves it.
        options: how.
        label: position of the true label; the clean answer if None.
        target_label: position that must be reached; any other than the label if None.
        lanes: radii that a search tries at the same time; `lanes_for` the encoder's device if None.

    Raises:
        OptionError: an attack that cannot do this.
    """

    def __init__(
        self,
        target: Target,
        picture: Tensor,
        options: ProbeOptions,
        *,
        label: int | None = None,
        target_label: int | None = None,
        lanes: int | None = None,
    ) -> None:
        self.target, self.picture, self.options = target, picture, options
        self._lanes = lanes or lanes_for(target.attacked.encoder.device)
        self.fresh = options.draws == "fresh" and target.attacked.defence.random
        if 0 < len(target.names) < 2:
            raise OptionError(
                "There is only one answer to choose from, so nothing can change: give two labels at least.",
                pointer="/level" if target.level else "/labels",
            )
        if target_label is not None and target_label == label:
            raise OptionError("The target is the true label itself: leave one of them out.", pointer="/target")
        self._attacks = options.attacks(targeted=target_label is not None, vector=target.free)
        self.clean = Clean(target.answers(picture)[0].cpu())
        self.unsteady = self.clean.differs(target.answers(picture)[0].cpu())
        self.said = int(self.clean.outputs.argmax()) if target.names else None
        self.aim = Aim(self.said if label is None else label, target_label)
        self.lanes: dict[float, Lane] = {}
        self.gradients = self.forwards = 0
        self.confirmations = 2  # the clean picture, twice
        self.exhausted = ""
        self.black_box_won = False
        self._plan = self._stages()
        self._draw = _FIRST_DRAW
        self._next_stage()

    @property
    def wrong_as_it_is(self) -> bool:
        """The clean decision is not the label (or is the target already): nothing is left to attack."""
        aim = self.aim
        if not self.target.names:
            return False
        return self.said == aim.target if aim.target is not None else self.said != aim.label

    @property
    def done(self) -> bool:
        """Whether there is nothing more to ask."""
        return not any(lane.state == "running" for lane in self.lanes.values())

    @property
    def robust_to(self) -> float:
        """The largest radius below the smallest broken one whose attack ran to its end and failed; 0 if none."""
        held = [lane.eps for lane in self.lanes.values() if lane.state == "held"]
        return max((eps for eps in held if self.broken_at is None or eps < self.broken_at), default=0.0)

    @property
    def broken_at(self) -> float | None:
        """The smallest radius known to break it; 0 where it is wrong as it is, None where nothing broke it."""
        if self.wrong_as_it_is:
            return 0.0
        return min((lane.eps for lane in self.lanes.values() if lane.state == "broken"), default=None)

    @property
    def passes(self) -> int:
        """Forwards of the tower that it has taken, a backward through a view counting two."""
        return passes(self.target.attacked.defence, self.forwards + self.confirmations, self.gradients)

    def asks(self) -> list[tuple[Lane, Ask]]:
        """The queries of this round, one for each running lane."""
        found = []
        for lane in self.lanes.values():
            if lane.state == "running" and lane.run is not None and lane.run.query is not None:
                seeds: tuple[int, ...] = ()
                if self.fresh:
                    count = self.options.draws_a_step
                    seeds = tuple(range(self._draw, self._draw + count))
                found.append((lane, Ask(self.target, lane.run.problem, self.picture, lane.run.query, seeds)))
        if self.fresh:
            # The lanes of a round share their draws: it costs nothing and keeps them comparable.
            self._draw += self.options.draws_a_step
        return found

    def take(self, answered: list[tuple[Lane, Ask]]) -> None:
        """Take the answers of a round, in the order of `asks`, and get ready for the next."""
        for lane, ask in answered:
            if lane.state == "running":
                self._advance(lane, ask, ask.answer())
        self._retire()
        defence = self.target.attacked.defence
        if self.passes >= self.options.budget * passes(defence, 1, 1) and not self.done:
            self.stop("gradients")
        while self.done and not self.exhausted and self._next_stage():
            pass

    def stop(self, why: str) -> None:
        """End now: what runs stays unknown. ``why`` is `seconds`, `gradients` or `cancelled`."""
        self.exhausted = why
        for lane in self.lanes.values():
            if lane.state in ("waiting", "running"):
                lane.state, lane.run = "held" if lane.decided else "unknown", None

    def _advance(self, lane: Lane, ask: Ask, answer: Answer) -> None:
        run = lane.run
        assert run is not None
        draws = max(1, len(ask.seeds))
        lane.steps += 1
        self.forwards += draws
        self.confirmations += ask.confirmations
        if answer.gradient is not None:
            lane.gradients += draws
            self.gradients += draws
            lane.blind += int(not bool(answer.gradient.any()))
        if ask.inside:
            self._look(lane, ask, answer)
        if bool(answer.fooled[0]) and ask.inside:
            lane.state, lane.picture, lane.run, lane.part = "broken", ask.picture.cpu(), None, ask.query.part
            # AutoAttack's own Square comes after its gradients, on what they left standing.
            self.black_box_won |= lane.part == Square.name
            return
        run.answer(answer)
        if run.done:
            self._begin(lane)

    def _look(self, lane: Lane, ask: Ask, answer: Answer) -> None:
        """Note what the picture of this query is answered with, if it is the worst of its radius so far."""
        outputs = (ask.served if ask.served is not None else answer.outputs)[0].cpu()
        if isinstance(self.target, VectorTarget):
            score = float(outputs @ self.clean.outputs)
            said = None
        else:
            scores = outputs.double().softmax(-1)
            score = float(scores[self.aim.label])
            rest = scores.clone()
            rest[self.aim.label] = -1
            best = ask.said if ask.said is not None else int(rest.argmax())
            said = (best, float(scores[best]))
        if bool(answer.fooled[0]) or score < lane.lowest:
            lane.lowest, lane.said = score, said

    def _begin(self, lane: Lane) -> None:
        """Start the lane's next attack that has anything to ask; without one it held."""
        while lane.left:
            attack, objective = lane.left.pop(0)
            lane.found_by = attack.name
            lane.run = Run(
                attack, self.target.problem(self.picture, lane.threat, self.aim, objective, self.clean.outputs)
            )
            if not lane.run.done:
                lane.state = "running"
                return
        lane.state, lane.run, lane.decided = "held", None, True

    def _retire(self) -> None:
        """A picture of one radius lies in every larger ball: what it does, they do."""
        lanes = sorted(self.lanes.values(), key=lambda lane: lane.eps)
        for smaller, lane in pairwise(lanes):
            if smaller.state == "broken" and lane.state != "broken":
                lane.state, lane.run, lane.picture, lane.found_by = "broken", None, smaller.picture, smaller.found_by
                lane.part = smaller.part
                lane.lowest, lane.said = smaller.lowest, smaller.said
            elif smaller.lowest < lane.lowest and (smaller.state == "broken") == (lane.state == "broken"):
                lane.lowest, lane.said = smaller.lowest, smaller.said

    def _next_stage(self) -> bool:
        """Open the lanes of the next stage; False when there is none."""
        for radii in self._plan:
            for eps, attacks in radii:
                lane = self.lanes.get(eps)
                if lane is None:
                    lane = self.lanes[eps] = Lane(eps, self._threat(eps), [])
                if lane.state != "broken":
                    lane.left = list(attacks)
                    self._begin(lane)
            return True
        return False

    def _threat(self, eps: float) -> ThreatModel:
        """The ball of a radius; of one that holds no other picture of 8 bits the picture alone, asked about once."""
        threat = ThreatModel(self.options.norm, eps * self.options.scale)
        return threat if holds_another(threat) else ThreatModel(self.options.norm, 0.0)

    def _broken_unattacked(self, eps: float) -> Lane:
        """A radius that is broken by the picture as it is."""
        scores, label, said = self.clean.scores(), self.aim.label, self.said
        assert label is not None
        assert said is not None
        named = (said, float(scores[said]))
        return Lane(eps, self._threat(eps), [], "broken", lowest=float(scores[label]), said=named)

    def _stages(self) -> Iterator[list[tuple[float, list[tuple[Attack, str]]]]]:
        """Radii to attack side by side, chosen by what is known when the stage before has ended."""
        given = sorted(set(self.options.eps))
        if self.wrong_as_it_is:
            self.lanes = {eps: self._broken_unattacked(eps) for eps in given}
            return
        search = not given
        for start in range(0, len(given), LISTED):
            if self.broken_at is None:
                yield [(eps, self._attacks) for eps in given[start : start + LISTED]]
            else:
                # They hold the broken picture; the curve says so.
                yield [(eps, []) for eps in given[start : start + LISTED]]
                self._retire()
        if search:
            while radii := self._next_radii():
                yield [(eps, self._attacks) for eps in radii]
        square = self.options.black_box
        eps = self.robust_to
        if square is not None and not self.target.free and self.aim.target is None and self._threat(eps).eps:
            yield [(eps, [(square, "ce")])]
            self.black_box_won |= self.lanes[eps].state == "broken"
            while search and self.lanes[eps].state == "broken" and (radii := self._next_radii()):
                yield [(eps, self._attacks) for eps in radii]

    def _next_radii(self) -> list[float]:
        """Radii inside the bracket that are to be tried next; none when it is narrow enough."""
        low, top, closed = self.robust_to, self.broken_at, self.broken_at is None
        return next_radii(self.options.norm, self._lanes, low, self.options.top if top is None else top, closed=closed)
