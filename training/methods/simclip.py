"""Sim-CLIP: a Siamese cosine loss with stop-gradient between the features of a clean and of an adversarial picture.

Hossain and Imteaj 2024, "Sim-CLIP: Unsupervised Siamese adversarial fine-tuning for robust and semantically-rich
vision-language models" (arXiv 2407.14971). Two forms exist and are different algorithms:

* ``frozen``, as the published training code has it: the clean branch is the frozen original, so one of the two
  symmetric terms has no gradient. This is FARE's idea with a cosine.
* ``shared``, as the paper writes it: both branches are the tower under training, with stop-gradient on one side of each
  term. Its gradient is half that of the plain cosine for each side, and nothing ties it to CLIP's text space.

Which of them the paper's numbers come from is not documented; that it is the frozen one is inferred, since no other
script was published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from ironclip.attacks.objectives import Objective
from ironclip.errors import OptionError
from training.methods.base import Batch, Losses, Networks, Plain, squared_shift


@dataclass(frozen=True)
class SimCLIP(Plain):
    """L = -1/2 mean_i [cos(f_t(x'), sg R) + cos(R, sg f_t(x'))], R = f_0(x) (``frozen``) or f_t(x) (``shared``).

    Attributes:
        clean_branch: where R comes from.
    """

    clean_branch: Literal["frozen", "shared"] = "frozen"
    name: ClassVar[str] = "simclip"

    def __post_init__(self) -> None:
        if self.clean_branch not in ("frozen", "shared"):
            raise OptionError(f"clean_branch is frozen or shared, not {str(self.clean_branch)[:40]!r}.")

    @property
    def forwards(self) -> int:
        """One of x', and in the shared form one of x."""
        return 1 if self.clean_branch == "frozen" else 2

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """||f_t(x') - f_0(x)||^2: the published code raises the squared distance, not the cosine."""
        return squared_shift(batch)

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        moved = networks.student(adversarial)
        clean = batch.anchor if self.clean_branch == "frozen" else networks.student(batch.images)
        towards_clean = -F.cosine_similarity(moved, clean.detach(), dim=-1).mean()
        towards_moved = -F.cosine_similarity(clean, moved.detach(), dim=-1).mean()
        return Losses((towards_clean + towards_moved) / 2, {"cosine": -towards_clean})
