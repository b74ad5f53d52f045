"""Exchanging the layers of a tower by others that compute the same in another way.

`nn.MultiheadAttention` reads the weights of its projections itself, so that a layer put in their place would never run:
`TakenApart` is the same attention with projections that can be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


def exchange(model: nn.Module, other: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put ``other(module)`` in place of each module inside a model for which it is not None.

    Neither what was put in is looked into, nor an attention of PyTorch's, which reads weights past its layers.
    """
    for name, module in list(model.named_children()):
        if (made := other(module)) is not None:
            model.register_module(name, made)
        elif not isinstance(module, nn.MultiheadAttention):
            exchange(module, other)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is PyTorch's own linear layer; a subclass of another's may do more than multiply."""
    return type(module) in (nn.Linear, NonDynamicallyQuantizableLinear)


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is an attention of the form that `TakenApart` computes, as those in open_clip's blocks are."""
    return (
        type(module) is nn.MultiheadAttention
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
        and not module.dropout
    )


def with_layers(module: nn.Module, layer: Callable[[nn.Linear], nn.Module]) -> nn.Module | None:
    """What `exchange` puts in place of a linear layer, or of an attention's, where ``layer`` makes them."""
    if is_attention(module):
        return TakenApart(module, layer)
    return layer(module) if is_linear(module) else None


def frozen_float32(values: Tensor) -> nn.Parameter:
    """A float32 parameter of these values that takes no gradients."""
    return nn.Parameter(values.detach().float(), requires_grad=False)


class TakenApart(nn.Module):
    """A frozen `nn.MultiheadAttention` in eval mode, its projections made of given layers.

    Scores and what they weigh are computed in float32; what came and what goes out are of the dtype that came.

    Args:
        attention: whose weights it takes; as `is_attention` has it.
        layer: makes a layer in place of a linear one.
    """

    def __init__(self, attention: nn.MultiheadAttention, layer: Callable[[nn.Linear], nn.Module]) -> None:
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        together = nn.Linear(attention.embed_dim, 3 * attention.embed_dim, device="meta")
        together.weight = attention.in_proj_weight
        together.bias = attention.in_proj_bias
        self.in_proj, self.out_proj = layer(together), layer(attention.out_proj)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = True, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention` with ``need_weights=False``.

        Args:
            query, key, value: [N, L, embed_dim] if `batch_first`, else [L, N, embed_dim].
            need_weights: must be false.
            attn_mask: [L, L] or [N * heads, L, L]: added to the scores, or true where nothing is to be looked at.

        Raises:
            TypeError: weights are asked for.
        """
        if need_weights:
            raise TypeError("this attention gives no weights")
        parts = [query, key, value] if self.batch_first else [x.transpose(0, 1) for x in (query, key, value)]
        if query is key and key is value:
            projected = self.in_proj(parts[0]).chunk(3, dim=-1)
        else:
            projected = [self.in_proj(x).chunk(3, dim=-1)[place] for place, x in enumerate(parts)]
        heads = [x.float().reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in projected]
        mask = attn_mask
        if mask is not None:
            mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
            mask = mask.view(-1, self.num_heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        answer = scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
        answer = self.out_proj(answer.transpose(1, 2).flatten(2).to(query.dtype))
        return (answer if self.batch_first else answer.transpose(0, 1)), None
