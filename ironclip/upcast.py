"""Towers of a 16-bit dtype on a CPU that has no instructions for it.

There PyTorch emulates 16-bit products, in two to three times the time of float32, though the same numbers could be
multiplied as float32: what a bfloat16 kernel does in its registers too (products exact, sums in float32, the result
rounded). So weights are kept as float32 of the same values and every product is made of operands turned up, its result
rounded down again; what lies between products stays in the dtype. A dtype pinned for a fleet of mixed machines, or for
results that are to be compared, so costs what float32 costs where it has no hardware.
"""

from __future__ import annotations

import threading
import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from ironclip.layers import exchange, frozen_float32, with_layers

# How much faster products must be as float32 for a tower to be turned up: hardware for a dtype wins by more.
_GAIN = 1.25
# The best of fewer is not to be trusted beside other work.
_ROUNDS = 30
_LOCK = threading.Lock()


class UpcastLinear(nn.Linear):
    """A linear layer that takes and gives a 16-bit dtype and multiplies in float32.

    Args:
        layer: whose numbers it takes.
    """

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # open_clip asks its layers what to turn embeddings into, and this is where it looks before the weight.
        self.int8_original_dtype = layer.weight.dtype
        self.weight = frozen_float32(layer.weight)
        self.register_parameter("bias", None if layer.bias is None else frozen_float32(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype that came."""
        return linear(x.float(), self.weight, self.bias).to(x.dtype)


class UpcastConv2d(nn.Module):
    """A convolution that takes and gives a 16-bit dtype and multiplies in float32.

    Args:
        layer: whose numbers it takes; it becomes part of this one.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.wide = layer.float()

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W'], in the dtype that came."""
        answer: Tensor = self.wide(x.float())
        return answer.to(x.dtype)


def upcast(model: nn.Module) -> None:
    """Turn up the products of a frozen 16-bit model in eval mode, in place; layers of other types stay as they are."""

    def other(module: nn.Module) -> nn.Module | None:
        return UpcastConv2d(module) if type(module) is nn.Conv2d else with_layers(module, UpcastLinear)

    exchange(model, other)


def pays(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies faster in float32 than in ``dtype``: measured once in a process, some 50 ms."""
    with _LOCK:
        return torch.finfo(dtype).bits <= 16 and _measured(dtype)


@cache
def _measured(dtype: torch.dtype) -> bool:
    x, weight = torch.randn(256, 512, dtype=dtype), torch.randn(512, 512, dtype=dtype)
    picture = torch.randn(2, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    wide_weight, wide_kernel = weight.float(), kernel.float()

    def native() -> None:
        linear(x, weight)
        conv2d(picture, kernel, padding=1)

    def turned_up() -> None:
        linear(x.float(), wide_weight).to(dtype)
        conv2d(picture.float(), wide_kernel, padding=1).to(dtype)

    with torch.inference_mode():
        best = {native: float("inf"), turned_up: float("inf")}
        for _ in range(_ROUNDS):
            for work in best:
                began = time.perf_counter()
                work()
                best[work] = min(best[work], time.perf_counter() - began)
    return best[native] > _GAIN * best[turned_up]
