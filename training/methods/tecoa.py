"""TeCoA: cross-entropy of adversarial pictures against the class texts.

Mao, Geng, Yang, Wang, Vondrick 2023, "Understanding zero-shot adversarial robustness for large-scale models" (arXiv
2212.07016), eq. 3: the text-guided contrastive loss is this cross-entropy, since each class has one text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.objectives import Objective
from training.methods.base import Batch, Losses, Networks, Plain, class_cross_entropy


@dataclass(frozen=True)
class TeCoA(Plain):
    """L = mean_i CE(s cos(f_t(x'_i), t), y_i)."""

    name: ClassVar[str] = "tecoa"
    forwards: ClassVar[int] = 1
    anchored: ClassVar[bool] = False

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """The loss itself, for each picture."""
        return class_cross_entropy(networks, batch)

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        loss = F.cross_entropy(networks.texts.logits(networks.student(adversarial)), batch.labels)
        return Losses(loss, {"cross_entropy": loss})
