"""No defence: one view, the picture itself, decided by the encoder's head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from ironclip.defences.contract import Encode, HeadRule
from ironclip.textbank import TextBank


@dataclass(frozen=True)
class NoDefence:
    """The undefended decision."""

    name: ClassVar[str] = "none"
    random: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    optimising: ClassVar[bool] = False
    reads_descriptions: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("cosine", "poincare")
    view_count: ClassVar[int] = 1
    cost: ClassVar[int] = 1

    def comparisons(self, labels: int, longest: int) -> int:
        """Not worth counting."""
        return 0

    def options(self) -> dict[str, Any]:
        """It has none."""
        return {}

    def reseeded(self, seed: int) -> NoDefence:
        """It draws nothing."""
        return self

    def preparation(self) -> NoDefence:
        """It prepares nothing."""
        return self

    def prepare(self, bank: TextBank) -> None:
        """Nothing to prepare."""

    def make_views(self, pixels: Tensor, encode: Encode) -> Tensor:
        """[N, 3, R, R] -> [N, 1, 3, R, R], the same memory."""
        return pixels[:, None]

    def logits(self, features: Tensor, bank: TextBank, state: None, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, K] by the head."""
        return head(features[:, 0], bank)

    def vector(self, features: Tensor, bank: TextBank | None, state: None, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, dim] at length 1."""
        return normalize(features[:, 0], dim=-1)
