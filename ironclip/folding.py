"""Convolutional image towers in a form that only answers: the same features in eval mode, in less time.

In eval mode a batch norm is a fixed scale and shift of each channel, so the convolution before it can hold both (Jacob
et al. 2018, section 3.2): half of a small tower's time goes into reading and writing what these norms change, and an
attack pays it in both directions. And of CLIP's attention pool only the first token's answer is read, so only the first
token asks.
"""

from __future__ import annotations

import copy

import torch
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from torch import Tensor, nn

Pairs = list[tuple[str, str]]


def foldable(visual: nn.Module) -> Pairs:
    """Names of (convolution, batch norm) that run one straight after the other; open_clip's own ResNets have such."""
    pairs = []
    for prefix, module in visual.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, (ModifiedResNet, Bottleneck)):
            pairs += [(f"{dot}conv{n}", f"{dot}bn{n}") for n in (1, 2, 3)]
        if isinstance(module, Bottleneck) and module.downsample is not None:
            pairs.append((f"{dot}downsample.0", f"{dot}downsample.1"))
    return [pair for pair in pairs if _folds(visual, *pair)]


def _folds(visual: nn.Module, convolution: str, norm: str) -> bool:
    first, second = visual.get_submodule(convolution), visual.get_submodule(norm)
    return isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d) and second.track_running_stats


@torch.no_grad()
def folded_weights(visual: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """What the convolutions of ``pairs`` weigh with their norms inside, by the names that `folded` gives them."""
    weights = {}
    for convolution, norm in pairs:
        conv: nn.Conv2d = visual.get_submodule(convolution)  # type: ignore[assignment]
        bn: nn.BatchNorm2d = visual.get_submodule(norm)  # type: ignore[assignment]
        mean, variance = bn.running_mean, bn.running_var
        assert mean is not None  # such norms are not foldable
        assert variance is not None
        scale = (variance + bn.eps).rsqrt() * (1.0 if bn.weight is None else bn.weight)
        start = -mean if conv.bias is None else conv.bias - mean
        weights[f"{convolution}.weight"] = conv.weight * scale.view(-1, 1, 1, 1)
        weights[f"{convolution}.bias"] = start * scale + (0.0 if bn.bias is None else bn.bias)
    return weights


def folded(visual: nn.Module) -> nn.Module:
    """A frozen copy of an image tower in eval mode, norms folded and pool cut short; equal up to rounding.

    What is not folded away keeps its name.
    """
    pairs = foldable(visual)
    other = copy.deepcopy(visual).requires_grad_(False).eval()
    weights = folded_weights(visual, pairs)
    for convolution, norm in pairs:
        conv: nn.Conv2d = other.get_submodule(convolution)  # type: ignore[assignment]
        conv.weight = nn.Parameter(weights[f"{convolution}.weight"], requires_grad=False)
        conv.bias = nn.Parameter(weights[f"{convolution}.bias"], requires_grad=False)
        other.set_submodule(norm, nn.Identity())
    if isinstance(other, ModifiedResNet) and isinstance(other.attnpool, AttentionPool2d):
        other.attnpool = FirstTokenPool(other.attnpool)
    return other


class FirstTokenPool(nn.Module):
    """What open_clip's attention pool answers, with one query a picture in place of one a position.

    With so few positions plain products are also several times faster than a fused attention kernel.

    Args:
        pool: whose weights it takes.
    """

    def __init__(self, pool: AttentionPool2d) -> None:
        super().__init__()
        self.positional_embedding = pool.positional_embedding
        self.k_proj, self.q_proj, self.v_proj, self.c_proj = pool.k_proj, pool.q_proj, pool.v_proj, pool.c_proj
        self.num_heads = pool.num_heads

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, dim]."""
        tokens = x.flatten(2).mT
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + self.positional_embedding.to(x.dtype)
        batch, count, width = tokens.shape
        part = width // self.num_heads
        query = self.q_proj(tokens[:, 0]).view(batch, self.num_heads, 1, part)
        keys = self.k_proj(tokens).view(batch, count, self.num_heads, part).transpose(1, 2)
        values = self.v_proj(tokens).view(batch, count, self.num_heads, part).transpose(1, 2)
        shares = (query * part**-0.5 * keys).sum(-1).softmax(-1)  # [B, heads, count]
        answer: Tensor = self.c_proj((shares[..., None] * values).sum(2).reshape(batch, width))
        return answer


def convolutional(visual: nn.Module) -> bool:
    """Whether a tower is made of convolutions, whose kernels are fastest with channels last; a ViT has only one."""
    return sum(isinstance(module, nn.Conv2d) for module in visual.modules()) > 1
