"""Towers of a 16-bit dtype on a CPU that has no instructions for it.

There PyTorch emulates 16-bit products, in two to three times the time of float32, though the same numbers could be
multiplied as float32: what a bfloat16 kernel does in its registers too (products exact, sums in float32, the result
rounded). So weights are kept as float32 of the same values and every product is made of operands turned up, its result
rounded down again; what lies between products stays in the dtype. A dtype pinned for a fleet of mixed machines, or for
results that are to be compared, so costs what float32 costs where it has no hardware.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# How much faster products must be as float32 for a tower to be turned up: hardware for a dtype wins by more.
_GAIN = 1.25
_ROUNDS = 5


class UpcastLinear(nn.Linear):
    """A linear layer that takes and gives a 16-bit dtype and multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the dtype that came."""
        return linear(x.float(), self.weight, self.bias).to(x.dtype)


class UpcastConv2d(nn.Conv2d):
    """A convolution that takes and gives a 16-bit dtype and multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W'], in the dtype that came."""
        answer: Tensor = self._conv_forward(x.float(), self.weight, self.bias)
        return answer.to(x.dtype)


class UpcastAttention(nn.MultiheadAttention):
    """Attention that takes and gives a 16-bit dtype and multiplies in float32; it gives no weights."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention` in eval mode with ``need_weights=False``.

        Args:
            query, key, value: [N, L, embed_dim] if `batch_first`, else [L, N, embed_dim].
            need_weights: must be false.
            attn_mask: [L, L] or [N * heads, L, L]: added to the scores, or true where nothing is to be looked at.
        """
        assert not need_weights
        dtype = query.dtype
        parts = [query, key, value] if self.batch_first else [x.transpose(0, 1) for x in (query, key, value)]
        if query is key and key is value:
            projected = linear(parts[0].float(), self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = tuple(linear(x.float(), w, b) for x, w, b in zip(parts, weights, biases, strict=True))
        heads = [x.to(dtype).float().reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in projected]
        mask = attn_mask
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        answer = scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
        answer = self.out_proj(answer.transpose(1, 2).flatten(2).to(dtype))
        return (answer if self.batch_first else answer.transpose(0, 1)), None


_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def upcast(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn up the products of a frozen model of ``dtype`` in eval mode, in place; layers of other types stay.

    Parameters keep their names; those of products are float32 from now on, their values unchanged.
    """
    for module in list(model.modules()):
        if type(module) is nn.MultiheadAttention and _plain(module):
            module.__class__ = UpcastAttention
            for parameter in (module.in_proj_weight, module.in_proj_bias):
                if parameter is not None:
                    parameter.data = parameter.data.float()
        elif type(module) in _LINEAR:
            module.__class__ = UpcastLinear
            # open_clip asks its layers what to turn embeddings into, and this is where it looks before the weight.
            module.int8_original_dtype = dtype  # type: ignore[assignment]
            module.float()
        elif type(module) is nn.Conv2d:
            module.__class__ = UpcastConv2d
            module.float()


def _plain(module: nn.MultiheadAttention) -> bool:
    """Whether attention is of the form that `UpcastAttention` computes, as all of open_clip's towers' is."""
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn and not module.dropout


@cache
def pays(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies faster in float32 than in ``dtype``: measured once in a process, some 10 ms."""
    if torch.finfo(dtype).bits > 16:
        return False
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
