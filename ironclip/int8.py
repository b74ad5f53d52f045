"""Image towers whose products are made of 8-bit integers, on a CPU.

Weights are rounded once, to seven bits, with a scale for each output; what comes in is rounded as it comes, with a
scale for each token (per-token dynamic quantization; Yao et al. 2022, ZeroQuant, section 4.1). No picture's answer
depends on what else is in its batch, and nothing is calibrated on pictures. Layers that are not linear, and the text
tower, stay float32.

Rounding has no gradient. Backwards it is passed over (the straight-through estimator; Bengio et al. 2013): an attack
goes forwards through what is served and backwards through the weights it is served with, so that rounding is not
mistaken for a defence (Athalye et al. 2018, section 4.1.1, backward pass differentiable approximation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ironclip.errors import OptionError
from ironclip.layers import exchange, frozen_float32, with_layers

# CPUs without VNNI add two products in 16 bits, saturating: with weights to 64 (255 * 64 * 2 < 2^15) they never do, and
# every CPU comes to the same.
_MOST = 64
# Rows for each thread that are computed together: what lies between the products then stays in a core's cache. Fewer
# would have the threads wake each other more often than they work.
_ROWS = 400
_LEAST = 1e-12


class Int8Linear(nn.Linear):
    """A linear layer that multiplies 8-bit integers and gives float32.

    Args:
        layer: whose numbers it takes.

    Attributes:
        weight: int8 [out_features, in_features], from -64 to 64.
        scale: float32 [out_features]; ``weight * scale`` is what was rounded.
    """

    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(_LEAST) / _MOST
        self.weight = nn.Parameter((weight / scale[:, None]).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_parameter("bias", None if layer.bias is None else frozen_float32(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., in_features] -> float32 [..., out_features]."""
        rows = x.reshape(-1, x.shape[-1])
        answer: Tensor = _Product.apply(rows, self.weight, self.scale, self.bias)
        return answer.view(*x.shape[:-1], self.out_features)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return product(rows, weight, scale, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return (gradient * scale) @ weight.float(), None, None, None


def product(rows: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ (weight * scale).T + bias``, rows rounded to 8 bits each with a scale of its own: float32 [N, out].

    Args:
        rows: float32 [N, in].
        weight: int8 [out, in], from -64 to 64.
        scale: float32 [out].
        bias: float32 [out], or none.
    """
    answer = rows.new_empty(len(rows), len(weight))
    each, size = scale / 127, _ROWS * torch.get_num_threads()
    for some, given in zip(torch.split(answer, size), torch.split(rows, size), strict=True):
        # Two sweeps, both vectorised; a norm or the extremes at once are not, and take five times as long.
        most = torch.maximum(given.amax(1, keepdim=True), given.amin(1, keepdim=True).neg_()).clamp_min_(_LEAST)
        rounded = given.mul(127 / most).round_().to(torch.int8)
        some.copy_(torch._int_mm(rounded, weight.t())).mul_(most)
        if bias is None:
            some.mul_(each)
        else:
            torch.addcmul(bias, some, each, out=some)
    return answer


def quantize(visual: nn.Module) -> None:
    """Exchange the linear layers of a frozen float32 image tower in eval mode, in place.

    Raises:
        OptionError: it has none: nothing would become faster.
    """
    exchange(visual, lambda module: with_layers(module, Int8Linear))
    if not any(isinstance(module, Int8Linear) for module in visual.modules()):
        raise OptionError("int8 is for linear layers, and this image tower has none: set the dtype to float32 or auto.")
