"""FARE: pull the features of an adversarial picture back to where the original put the clean one.

Schlarmann, Singh, Croce, Hein 2024, "Robust CLIP: Unsupervised adversarial fine-tuning of vision embeddings for robust
large vision-language models" (arXiv 2402.12336), eq. 3. Labels play no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ironclip.attacks.objectives import Objective
from training.methods.base import Batch, Losses, Networks, Plain, squared_shift


@dataclass(frozen=True)
class FARE(Plain):
    """L = mean_i ||f_t(x'_i) - f_0(x_i)||^2, features not normalised, summed over dims."""

    name: ClassVar[str] = "fare"
    forwards: ClassVar[int] = 1

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """The loss itself, for each picture."""
        return squared_shift(batch)

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        shift = (networks.student(adversarial) - batch.anchor).square().sum(1).mean()
        return Losses(shift, {"shift": shift})
