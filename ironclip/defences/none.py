"""No defence: one view, the picture itself, decided by the encoder's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ironclip.textbank import TextBank


class NoDefence:
    """The undefended decision."""

    name = "none"
    random = False
    differentiable = True
    optimising = False
    descriptions = False
    heads: tuple[str, ...] = ("cosine", "poincare")

    @property
    def view_count(self) -> int:
        """One view: the picture itself."""
        return 1

    def options(self) -> dict[str, Any]:
        """It has none."""
        return {}

    def prepare(self, bank: TextBank) -> None:
        """Nothing to prepare."""

    def views(self, pixels: Tensor) -> Tensor:
        """[N, 3, R, R] -> [N, 1, 3, R, R], the same memory."""
        return pixels[:, None]

    def logits(
        self, features: Tensor, bank: TextBank, state: None, head: Callable[[Tensor, TextBank], Tensor]
    ) -> Tensor:
        """[N, 1, dim] -> [N, K] by the head."""
        return head(features[:, 0], bank)
