"""AGFT: the original's softened answer on the clean picture as the target of the adversarial one.

AGFT (CVPR 2026): soft cross-entropy between softmax(g S cos(f_0(x), t)) and softmax(S cos(f_t(x'), t)), S = 180,
g = 0.4; the attack raises the same loss. Known to us from its code and a digest, not from the paper's text. As dear as
TeCoA and one forward that can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.objectives import Objective
from ironclip.errors import OptionError
from training.methods.base import Batch, Losses, Networks, Plain


@dataclass(frozen=True)
class AGFT(Plain):
    """L = -mean_i sum_j softmax_j(g S cos(f_0(x), t)) log softmax_j(S cos(f_t(x'), t)).

    Attributes:
        scale: S. 0 takes the encoder's own logit scale times 1.8, which is 180 for OpenAI's CLIP (inferred for others).
        softening: g, below 1: how much flatter the target is.
    """

    scale: float = 0.0
    softening: float = 0.4
    name: ClassVar[str] = "agft"
    forwards: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.scale < 0 or self.softening <= 0:
            raise OptionError("scale is at least 0, softening above 0.")

    def _scale(self, networks: Networks) -> float:
        return self.scale or 1.8 * networks.texts.scale

    def target(self, networks: Networks, batch: Batch) -> Tensor:
        """The softened answer of f_0 on x: [B, K], without gradient."""
        scale = self._scale(networks) * self.softening
        return torch.softmax(networks.texts.logits(batch.anchor, scale), dim=-1).detach()

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """The loss itself, for each picture."""
        target, scale = self.target(networks, batch), self._scale(networks)
        return lambda features, items: F.cross_entropy(
            networks.texts.logits(features, scale), target[items], reduction="none"
        )

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        logits = networks.texts.logits(networks.student(adversarial), self._scale(networks))
        loss = F.cross_entropy(logits, self.target(networks, batch))
        return Losses(loss, {"soft_cross_entropy": loss})
