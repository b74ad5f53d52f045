"""TTC: test-time counterattacks (Xing et al., CVPR 2025): perturb the picture so that its feature moves, then decide.

A picture whose feature hardly moves under noise is taken for attacked ("falsely stable"), and is moved away from where
it stands by a few steps that lengthen the shift of its feature. That is a loop of gradients behind a threshold, so
the gradient goes around it (the purified pixels' gradient is the picture's: BPDA); attackers average over `seed`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.defences.contract import Encode, HeadRule, check_number
from ironclip.noise import uniform
from ironclip.textbank import TextBank


@dataclass(frozen=True)
class TestTimeCounterattack:
    """The defence; options as fields, defaults the paper's.

    Attributes:
        radius: of the counterattack and its noise, in 1/255.
        steps: of the counterattack.
        step_size: in 1/255.
        threshold: a picture whose feature moves by less than this share of its length under noise is counterattacked.
        beta: the perturbations after each step are averaged with weights exp(beta t), t = 0 the noise.
        seed: of the noise, which is one pattern for all pictures.
    """

    radius: float = 4.0
    steps: int = 2
    step_size: float = 1.0
    threshold: float = 0.2
    beta: float = 2.0
    seed: int = 0

    __test__: ClassVar[bool] = False  # pytest: not a test, whatever it is called
    name: ClassVar[str] = "ttc"
    random: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False
    optimising: ClassVar[bool] = True
    reads_descriptions: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("cosine", "poincare")
    view_count: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_number("radius", self.radius, 0, 64)
        check_number("steps", self.steps, 1, 50, whole=True)
        check_number("step_size", self.step_size, 0, 64)
        check_number("threshold", self.threshold, 0, 10)
        check_number("beta", self.beta, -10, 10)
        check_number("seed", self.seed, 0, (1 << 53) - 1, whole=True)

    @property
    def cost(self) -> int:
        """One forward of the picture, a forward and backward a step, one forward of what is left."""
        return 2 + 3 * self.steps

    def comparisons(self, labels: int, longest: int) -> int:
        """Not worth counting."""
        return 0

    def options(self) -> dict[str, Any]:
        """All options."""
        return asdict(self)

    def reseeded(self, seed: int) -> TestTimeCounterattack:
        """The same with other noise."""
        return replace(self, seed=seed)

    def preparation(self) -> TestTimeCounterattack:
        """It prepares nothing."""
        return TestTimeCounterattack()

    def prepare(self, bank: TextBank) -> None:
        """Nothing to prepare."""

    def make_views(self, pixels: Tensor, encode: Encode) -> Tensor:
        """[N, 3, R, R] -> [N, 1, 3, R, R], the counterattacked picture."""
        with torch.enable_grad():
            moved = pixels.detach() + self._perturbation(pixels.detach(), encode)
        # Forwards the purified picture, backwards the picture itself.
        return (pixels + (moved - pixels).detach())[:, None]

    def _perturbation(self, pixels: Tensor, encode: Encode) -> Tensor:
        radius = self.radius / 255
        with torch.no_grad():
            start = encode(pixels)
        key = torch.zeros(1, dtype=torch.int64, device=pixels.device)
        noise = (uniform(key, pixels.shape[1:], seed=self.seed, step=0) * 2 - 1) * radius
        delta = (pixels + noise).clamp(0, 1) - pixels
        total, weights = delta.clone(), 1.0
        stable = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
        for step in range(1, self.steps + 1):
            delta.requires_grad_(True)
            shift = encode(pixels + delta) - start
            if step == 1:
                stable = shift.detach().norm(dim=-1) < self.threshold * start.norm(dim=-1)
            (gradient,) = torch.autograd.grad(shift.square().sum(), delta)
            ahead = (delta.detach() + self.step_size / 255 * gradient.sign()).clamp(-radius, radius)
            delta = (pixels + ahead).clamp(0, 1) - pixels
            weight = math.exp(self.beta * step)
            total, weights = total + weight * delta, weights + weight
        noise = (pixels + noise).clamp(0, 1) - pixels
        return torch.where(stable[:, None, None, None], total / weights, noise)

    def logits(self, features: Tensor, bank: TextBank, state: None, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, K] by the head."""
        return head(features[:, 0], bank)

    def vector(self, features: Tensor, bank: TextBank | None, state: None, head: HeadRule) -> Tensor:
        """[N, 1, dim] -> [N, dim] at length 1."""
        return normalize(features[:, 0], dim=-1)
