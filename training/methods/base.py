"""What a method is: an objective for the attack, and a loss. It knows no loop, no data set and no argv.

Notation of the method files: f_t the tower under training, f_0 its frozen original, f_P a frozen proxy, t_j unit text
features, s the logit scale, x a picture in [0,1], x' an adversarial one. Sources are named where a formula stands;
"inferred" marks what the papers or their code leave open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.attacks.objectives import Objective
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet

Tower = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Texts:
    """Class texts of a frozen text tower, encoded once.

    Attributes:
        weights: unit float32 [K, dim].
        scale: the logit scale s, a float (100 for OpenAI's CLIP).
    """

    weights: Tensor
    scale: float

    def logits(self, features: Tensor, scale: float | None = None) -> Tensor:
        """s * cos(features, t_j): [B, dim], not normalised -> [B, K]; ``scale`` in place of s if given."""
        return (self.scale if scale is None else scale) * F.normalize(features, dim=-1) @ self.weights.T


@dataclass(frozen=True)
class Batch:
    """What one step is given.

    Attributes:
        images: x, float32 [B, 3, R, R] in [0, 1].
        labels: int64 [B].
        anchor: f_0(x), float32 [B, dim], not normalised, without gradient; empty [B, 0] for a method that is not
            anchored.
    """

    images: Tensor
    labels: Tensor
    anchor: Tensor


@dataclass(frozen=True)
class Networks:
    """What a method may call in its loss.

    Attributes:
        student: f_t, differentiable to its weights.
        texts: class texts for f_t and f_0, which share a text tower.
        original: f_0 under no_grad.
        proxy: f_P under no_grad, with its own class texts; None where the method has none.
        proxy_texts: those.
        extra: what the method trains beside the image tower (`Method.extra`).
        gather: this process's rows [b, ...] -> those of all processes, in order, with their gradients.
        batch_size: pictures of a step, over all processes and parts, for losses that are sums over them; 0: what is
            given at once is all.
    """

    student: Tower
    texts: Texts
    original: Tower
    proxy: Tower | None = None
    proxy_texts: Texts | None = None
    extra: nn.Module | None = None
    gather: Callable[[Tensor], Tensor] = field(default=lambda values: values)
    batch_size: int = 0


@dataclass(frozen=True)
class Losses:
    """A scalar to go down, and its parts for the log."""

    total: Tensor
    parts: dict[str, Tensor]


Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own schedule (warm-up and cosine).

    Attributes:
        name: for the log.
        share: of the run's steps.
        rate: factor on the run's learning rate.
    """

    name: str = "train"
    share: float = 1.0
    rate: float = 1.0


class Method(Protocol):
    """One way to make an encoder robust; its options are its fields.

    Attributes:
        name: its key in METHODS.
        forwards: student forwards of one loss with gradients to the weights, beside the attack's.
        frozen_forwards: forwards of the frozen original in one loss, beside the anchor's.
        anchored: whether it reads `Batch.anchor`.
        proxy: whether it needs a proxy of another architecture.
        phases: the parts of its run, in order; their shares sum to 1.
    """

    @property
    def name(self) -> str:
        """Its key in METHODS."""

    @property
    def forwards(self) -> int:
        """How often `loss` runs the student."""

    @property
    def frozen_forwards(self) -> int:
        """How often `loss` runs the frozen original."""

    @property
    def anchored(self) -> bool:
        """Whether it reads `Batch.anchor`."""

    @property
    def proxy(self) -> bool:
        """Whether `Networks.proxy` must be there."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of its run."""

    def extra(
        self, encoder: Encoder, label_set: LabelSet, sample: Callable[[], tuple[Tensor, Tensor]]
    ) -> nn.Module | None:
        """What is trained beside the image tower, if anything.

        Args:
            encoder: the student at the start.
            label_set: the classes, resolved.
            sample: f_0 of some clean pictures [n, dim] and their labels [n].
        """

    def apply(self, encoder: Encoder, extra: nn.Module) -> None:
        """Write ``extra`` into an encoder, head included: then the Classifier decides as the method trains."""

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """What the attack raises: (student features [b, dim], items) -> [b]."""

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str) -> Losses:
        """The training loss at x' = ``adversarial`` (mean over the batch)."""

    def after_epoch(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """What the weights, and what the method keeps beside them, become at the end of an epoch."""

    def after_phase(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """The same at the end of a phase."""


class Plain:
    """The defaults of a method with one phase, no proxy and nothing to do between epochs."""

    frozen_forwards: ClassVar[int] = 0
    anchored: ClassVar[bool] = True
    proxy: ClassVar[bool] = False
    phases: ClassVar[tuple[Phase, ...]] = (Phase(),)

    def extra(
        self, encoder: Encoder, label_set: LabelSet, sample: Callable[[], tuple[Tensor, Tensor]]
    ) -> nn.Module | None:
        """Nothing."""
        return None

    def apply(self, encoder: Encoder, extra: nn.Module) -> None:
        """Nothing to write."""

    def after_epoch(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """Nothing changes."""
        return weights, kept

    def after_phase(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """Nothing changes."""
        return weights, kept


def squared_shift(batch: Batch) -> Objective:
    """||f_t(x') - f_0(x)||^2, summed over dims: the attack of FARE and, in its code, of Sim-CLIP."""
    return lambda features, items: (features - batch.anchor[items]).square().sum(1)


def class_cross_entropy(networks: Networks, batch: Batch) -> Objective:
    """CE(s cos(f_t(x'), t), y): the attack of TeCoA and PMG-AFT."""
    return lambda features, items: F.cross_entropy(
        networks.texts.logits(features), batch.labels[items], reduction="none"
    )


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of logits [B, K]: [B]. The teacher gets a gradient only if it carries one."""
    ours, theirs = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


@torch.no_grad()
def without_gradient(tower: Tower, pixels: Tensor) -> Tensor:
    """Features of a frozen tower."""
    return tower(pixels).detach()
