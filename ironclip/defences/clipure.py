"""CLIPure-Cos: purification of the feature towards a text that names nothing (Zhang et al., ICLR 2025).

The likelihood of a feature is taken to be its cosine with "a photo of a ." (the templates without a name), and the
feature climbs it by steps along the unit gradient on the sphere. Each such step turns the feature towards that text, in
the plane of the two, by arctan(step_size), past the text if it stands nearer. So no step leaves that plane, and with
the published settings (ten steps of 30, which turn by 88 degrees) a feature that is at most that far from the text
swings there and back, and after the tenth step stands where it began: the logits are those of no defence at all.

The published code scales the gradients of a whole batch by one norm; here each picture has its own, since a decision
must not depend on who shares its batch. It also leaves the step's own gradient out of the attack's backward pass; here
it is in.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.defences.contract import Encode, HeadRule, check_number
from ironclip.textbank import TextBank


@dataclass(frozen=True)
class ClipureCos:
    """The defence; options as fields, defaults the published ones.

    Attributes:
        steps: of the climb.
        step_size: length of a step on the unit sphere's tangent.
    """

    steps: int = 10
    step_size: float = 30.0

    name: ClassVar[str] = "clipure"
    random: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    optimising: ClassVar[bool] = False
    reads_descriptions: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ("cosine",)
    view_count: ClassVar[int] = 1
    cost: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("steps", self.steps, 1, 1000, whole=True)
        check_number("step_size", self.step_size, 0, 1e6)

    def comparisons(self, labels: int, longest: int) -> int:
        """Not worth counting."""
        return 0

    def options(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def reseeded(self, seed: int) -> ClipureCos:
        """It draws nothing."""
        return self

    def preparation(self) -> ClipureCos:
        """No option plays a part in it."""
        return ClipureCos()

    def prepare(self, bank: TextBank) -> Tensor:
        """The unit feature of the text that names nothing, [dim]."""
        return bank.blank

    def make_views(self, pixels: Tensor, encode: Encode) -> Tensor:
        """[N, 3, R, R] -> [N, 1, 3, R, R], the same memory."""
        return pixels[:, None]

    def logits(self, features: Tensor, bank: TextBank, state: Tensor, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, K] by the head, of the purified feature."""
        return head(self._purified(features[:, 0], state), bank)

    def vector(self, features: Tensor, bank: TextBank | None, state: Tensor, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, dim] at length 1, purified."""
        return self._purified(features[:, 0], state)

    def _purified(self, features: Tensor, blank: Tensor) -> Tensor:
        # The gradient of the cosine on the sphere has a closed form, so nothing here needs autograd to be written down.
        direction = normalize(features, dim=-1)
        for _ in range(self.steps):
            along = torch.linalg.vecdot(direction, blank[None])
            direction = normalize(direction + self.step_size * normalize(blank - along[:, None] * direction, dim=-1))
        return direction
