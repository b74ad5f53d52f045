"""HPT-GPD: distil what a CLIP of another architecture says of the student's adversarial pictures.

Fu, Huang, Zhang 2026 (arXiv 2601.12865). The idea: adversarial examples made on one architecture fool another one less
("proxy robustness"), so the proxy's answer on them can teach the student, and no robust teacher is needed. Alone this
costs generalisation; so a first phase, anchored to the student's own clean answers, makes weights that the second one,
the distillation, is pulled back to after each epoch.

A reconstruction. The abstract names the two phases and their different learning rates; the published scripts hold one
loss that runs (the second phase's) and commented remains of the rest. Inferred: which loss belongs to the first phase,
both learning rates, the epochs, that the moving average of the first phase is what the second starts from and is pulled
to. Sums over the batch of the scripts are means here; with ``batch_sum`` they are sums, and the learning rate means
what it means there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.attacks.objectives import Objective
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.labels import LabelSet
from training.methods.base import (
    Batch,
    Losses,
    Networks,
    Phase,
    Weights,
    class_cross_entropy,
    divergence,
    without_gradient,
)

WARM_UP, DISTIL = "anchored", "distil"


def between(first: Weights, second: Weights, share: float) -> Weights:
    """(1 - share) first + share second, floating-point tensors only; the rest is the first's."""
    return {
        key: value.lerp(second[key].to(value), share) if value.is_floating_point() else value
        for key, value in first.items()
    }


@dataclass(frozen=True)
class HPTGPD:
    """Phase A: L = KL(P_0(x) || P_t(x')). Phase B: L = KL(P_P(x') || P_t(x')) + lambda KL(P_0(x) || P_t(x')).

    Attributes:
        anchored_share: of the run's steps that belong to phase A (inferred).
        anchored_rate: phase A's learning rate as a share of phase B's (0.1: 5e-5 against 5e-4 in the scripts).
        anchor: lambda.
        label: weight of a cross-entropy with the label in phase A (an option of the scripts; off).
        average: decay of phase A's moving average, taken once an epoch.
        pull: m, how far each epoch of phase B is drawn back to phase A's average.
        batch_sum: sums over the batch, as the scripts have them.
    """

    anchored_share: float = 0.5
    anchored_rate: float = 0.1
    anchor: float = 0.001
    label: float = 0.0
    average: float = 0.9
    pull: float = 0.5
    batch_sum: bool = False
    name: ClassVar[str] = "hpt_gpd"
    forwards: ClassVar[int] = 1
    frozen_forwards: ClassVar[int] = 0
    anchored: ClassVar[bool] = True
    proxy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in ("anchored_share", "average", "pull"):
            if not 0 <= getattr(self, field) <= 1:
                raise OptionError(f"{field} lies between 0 and 1.")
        if self.anchored_rate <= 0 or self.anchor < 0 or self.label < 0:
            raise OptionError("anchored_rate is above 0, anchor and label are at least 0.")

    def extra(self, encoder: Encoder, label_set: LabelSet, sample: object) -> None:
        """Nothing is trained beside the image tower."""

    def apply(self, encoder: Encoder, extra: nn.Module) -> None:
        """Nothing to write."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """A and B; one of them alone where the share says so."""
        both = (
            Phase(WARM_UP, self.anchored_share, self.anchored_rate),
            Phase(DISTIL, 1 - self.anchored_share, 1.0),
        )
        return tuple(phase for phase in both if phase.share > 0)

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """Cross-entropy of the label, on the student: the proxy makes no examples."""
        return class_cross_entropy(networks, batch)

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = DISTIL) -> Losses:
        """See the class. Raises ValueError in phase B without a proxy."""
        many = (networks.batch_size or len(adversarial)) if self.batch_sum else 1
        moved = networks.texts.logits(networks.student(adversarial))
        anchor = divergence(networks.texts.logits(batch.anchor), moved).mean() * many
        if phase == WARM_UP:
            label = F.cross_entropy(moved, batch.labels)
            return Losses(anchor + self.label * label, {"anchor": anchor, "cross_entropy": label})
        if networks.proxy is None or networks.proxy_texts is None:
            raise ValueError("hpt_gpd distils a proxy: give one of another architecture")
        teacher = networks.proxy_texts.logits(without_gradient(networks.proxy, adversarial))
        distilled = divergence(teacher, moved).mean() * many
        return Losses(distilled + self.anchor * anchor, {"distilled": distilled, "anchor": anchor})

    def after_epoch(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """Phase A averages beside the weights, which go on; phase B draws them back to that average."""
        if phase == WARM_UP:
            copy = {key: value.clone() for key, value in weights.items()}
            return weights, copy if kept is None else between(copy, kept, self.average)
        return (weights if kept is None else between(weights, kept, self.pull)), kept

    def after_phase(self, phase: str, weights: Weights, kept: Weights | None) -> tuple[Weights, Weights | None]:
        """Phase B starts from phase A's average."""
        if phase == WARM_UP and kept is not None:
            return {key: value.clone() for key, value in kept.items()}, kept
        return weights, kept
