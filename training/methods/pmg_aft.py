"""PMG-AFT: TeCoA guided by the pre-trained model on the adversarial picture and by the clean picture.

Wang, Zhang, Chen, Qiu 2024, "Pre-trained model guided fine-tuning for zero-shot adversarial robustness" (arXiv
2401.04350). Means over the batch, logits at the scale s and a frozen original without gradient, as a published
re-implementation states the paper has it; the authors' own code sums over the batch and leaves the scale out
(``published_code``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.objectives import Objective
from ironclip.errors import OptionError
from training.methods.base import Batch, Losses, Networks, Plain, divergence, without_gradient


@dataclass(frozen=True)
class PMGAFT(Plain):
    """L = CE(z_t(x'), y) + a KL(P_0(x') || P_t(x')) + b KL(P_t(x) || P_t(x')).

    Attributes:
        general: a, the weight of the pre-trained model's answer.
        clean: b, the weight of the clean picture's answer, through which gradients flow too.
        published_code: bare cosines as logits in loss and attack, and sums over the batch in the divergences.
    """

    general: float = 1.0
    clean: float = 1.0
    published_code: bool = False
    name: ClassVar[str] = "pmg_aft"
    forwards: ClassVar[int] = 2
    frozen_forwards: ClassVar[int] = 1
    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.general < 0 or self.clean < 0:
            raise OptionError("general and clean are weights of at least 0.")

    def _logits(self, networks: Networks, features: Tensor) -> Tensor:
        return networks.texts.logits(features, 1.0 if self.published_code else None)

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """Cross-entropy of the label."""
        return lambda features, items: F.cross_entropy(
            self._logits(networks, features), batch.labels[items], reduction="none"
        )

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        moved = self._logits(networks, networks.student(adversarial))
        clean = self._logits(networks, networks.student(batch.images))
        original = self._logits(networks, without_gradient(networks.original, adversarial))
        label = F.cross_entropy(moved, batch.labels)
        many = (networks.batch_size or len(moved)) if self.published_code else 1
        general = divergence(original, moved).mean() * many
        steady = divergence(clean, moved).mean() * many
        total = label + self.general * general + self.clean * steady
        return Losses(total, {"cross_entropy": label, "general": general, "clean": steady})
