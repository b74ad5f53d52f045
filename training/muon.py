"""Muon: momentum whose update of each matrix is made nearly orthogonal (Jordan et al. 2024); AdamW keeps the rest.

Convolutions count as matrices [out, in * height * width]. The update is scaled as in "Muon is Scalable for LLM
Training" (Liu et al. 2025, eq. 4), so that learning rate and weight decay mean what they mean for AdamW.

torch.optim.Muon takes two-dimensional parameters only and whole matrices; here a large one is made orthogonal in blocks
of rows, since the iteration costs the square of the smaller side and attention pooling alone would cost a fifth of a
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Coefficients of the quintic iteration (Jordan et al. 2024): singular values go to about one in five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
BLOCK = 256


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T: float [N, rows, columns] -> float32 of the same shape.

    Singular values end between about 0.7 and 1.2; the products are computed in bfloat16.
    """
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.transpose(1, 2)
    x = x / x.float().norm(dim=(1, 2), keepdim=True).clamp_min(1e-7).bfloat16()
    for _ in range(_ROUNDS):
        square = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if tall else x).float()


def in_blocks(update: Tensor) -> Tensor:
    """`orthogonalise` a parameter's update, seen as a matrix, in blocks of at most BLOCK rows; the shape is kept."""
    matrix = update.flatten(1)
    rows, columns = matrix.shape
    count = math.ceil(rows / BLOCK) if min(rows, columns) > BLOCK else 1
    if rows % count:
        count = 1
    # An orthogonal block of r x c has root mean square 1 / sqrt(max(r, c)); 0.2 is what AdamW's updates have.
    scale = 0.2 * math.sqrt(max(rows // count, columns))
    return orthogonalise(matrix.reshape(count, rows // count, columns)).reshape(update.shape) * scale


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal in blocks, with decoupled weight decay; for parameters of two or more axes.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups.
        lr: as for AdamW.
        momentum: of the running mean of gradients.
        weight_decay: decoupled, as for AdamW.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; ``closure``, if given, is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                mean: Tensor = state["mean"]
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = in_blocks(parameter.grad.lerp(mean, group["momentum"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return loss
