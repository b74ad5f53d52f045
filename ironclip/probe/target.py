"""What a probe attacks: a served decision, or a served vector, and its differentiable float32 double."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ironclip.attacks import Problem, ThreatModel, classification
from ironclip.attacks.objectives import Objective, Verdict
from ironclip.classifier import Classifier
from ironclip.errors import OptionError
from ironclip.preprocessing import to_float

# Cosines nearer than this are equal: float32 sums in another order.
_EQUAL = 1e-6
# Draws that nobody has seen, by which a break under fresh draws is judged.
UNSEEN = tuple(range(900_000_001, 900_000_006))


@dataclass(frozen=True)
class Target:
    """A decision of a Classifier among its labels, or among the nodes of a level.

    Attributes:
        attacked: in float32, differentiable: what gradients are taken of.
        served: what is served, in its dtype; a break counts only here. The attacked one if not given.
        level: of the tree; the labels if empty.
    """

    attacked: Classifier
    served: Classifier = None  # type: ignore[assignment]
    level: str = ""

    def __post_init__(self) -> None:
        if self.served is None:
            object.__setattr__(self, "served", self.attacked)
        if self.level and self.level not in self.attacked.levels:
            known = ", ".join(self.attacked.levels) or "none; give a tree"
            raise OptionError(f"There is no level {self.level[:60]!r}; there are: {known}.", pointer="/level")

    @property
    def names(self) -> tuple[str, ...]:
        """What is chosen from."""
        return self.attacked.levels[self.level].nodes if self.level else self.attacked.names

    @property
    def free(self) -> bool:
        """Whether attacks must take the problem's own objective."""
        return False

    @property
    def adaptive(self) -> bool:
        """Whether the attack goes through the very defence that is served; if not, what it finds is transfer."""
        return self.attacked.defence == self.served.defence

    def outputs(self, classifier: Classifier, features: Tensor) -> Tensor:
        """Features of the views [n, views, dim] -> logits [n, K]."""
        if not self.level:
            return classifier.decide(features)
        return classifier.level_of(features, self.level)

    def answers(self, picture: Tensor, seed: int | None = None) -> Tensor:
        """What is served for one picture, alone in its batch: uint8 [3, R, R] -> [1, ...]; ``seed`` for other draws."""
        classifier = self.served if seed is None else self.served.reseeded(seed)
        pixels = to_float(picture[None]).to(classifier.encoder.device)
        with torch.inference_mode(False), torch.no_grad():
            return self.outputs(classifier, classifier.encode(pixels)).float()

    def problem(self, picture: Tensor, threat: ThreatModel, aim: Aim, objective: str, clean: Tensor) -> Problem:
        """The attack's problem: one picture, uint8 [3, R, R], which is answered with ``clean``."""
        label, target = (None if i is None else torch.tensor([i]) for i in (aim.label, aim.target))
        assert label is not None
        device = self.attacked.encoder.device
        images = to_float(picture[None]).to(device)
        return classification(images, label, threat, objective=objective, targets=target)


@dataclass(frozen=True)
class Aim:
    """What the attack is to reach: not ``label``, or ``target``; positions among the names. None for a vector."""

    label: int | None = None
    target: int | None = None


@dataclass(frozen=True)
class VectorTarget(Target):
    """The vector that is served for a picture.

    Attributes:
        cosine_below: it counts as broken when its cosine with the clean vector falls below this.
        gallery: float32 [G, dim], unit vectors; if given, broken is when the ``top_k`` nearest of them change instead.
        top_k: of the gallery.
    """

    cosine_below: float = 0.5
    gallery: Tensor | None = field(default=None, compare=False)
    top_k: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """Nothing is chosen from."""
        return ()

    @property
    def free(self) -> bool:
        """Its objective is its own."""
        return True

    def outputs(self, classifier: Classifier, features: Tensor) -> Tensor:
        """Features of the views [n, views, dim] -> unit vectors [n, dim]."""
        return classifier.vectors(features)

    def nearest(self, vectors: Tensor) -> Tensor:
        """The gallery's nearest, as sorted positions: [n, dim] -> int64 [n, top_k]."""
        assert self.gallery is not None
        top = (vectors @ self.gallery.to(vectors).T).topk(self.top_k, dim=1).indices
        positions: Tensor = top.sort(dim=1).values
        return positions

    def problem(self, picture: Tensor, threat: ThreatModel, aim: Aim, objective: str, clean: Tensor) -> Problem:
        """Lower the cosine with the clean vector, or with the clean vector's nearest against the others."""
        clean = clean[None]
        device = self.attacked.encoder.device
        images = to_float(picture[None]).to(device)
        raised, broken = self._by_cosine(clean) if self.gallery is None else self._by_gallery(clean)
        return Problem(images, threat, raised, broken, torch.zeros(1, dtype=torch.int64, device=device))

    def _by_cosine(self, clean: Tensor) -> tuple[Objective, Verdict]:
        def raised(vectors: Tensor, items: Tensor) -> Tensor:
            loss: Tensor = -torch.linalg.vecdot(vectors, clean.to(vectors))
            return loss

        def broken(vectors: Tensor, items: Tensor) -> Tensor:
            below: Tensor = torch.linalg.vecdot(vectors, clean.to(vectors)) < self.cosine_below
            return below

        return raised, broken

    def _by_gallery(self, clean: Tensor) -> tuple[Objective, Verdict]:
        gallery, first = self.gallery, self.nearest(clean)
        assert gallery is not None
        inside = torch.zeros(len(gallery), dtype=torch.bool)
        inside[first[0].cpu()] = True

        def raised(vectors: Tensor, items: Tensor) -> Tensor:
            near, there = vectors @ gallery.to(vectors).T, inside.to(vectors.device)
            last = near.masked_fill(~there, torch.inf).amin(1)
            loss: Tensor = near.masked_fill(there, -torch.inf).amax(1) - last
            return loss

        def broken(vectors: Tensor, items: Tensor) -> Tensor:
            return raised(vectors, items) > _EQUAL  # of equal neighbours either may be the nearest

        return raised, broken
