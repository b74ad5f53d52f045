"""Building an open_clip model for training, and running its image tower in a cheaper dtype."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ironclip.encoder import Encoder
from training.muon import Muon

NO_DECAY = ("bias", "embedding", "logit_scale", "bn", "ln_", "norm")


def build_encoder(model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], seed: int) -> Encoder:
    """An Encoder around a new open_clip CLIP with random weights drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**model_cfg)
    tokenizer = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])
    return Encoder(model, tokenizer, model_cfg=model_cfg, preprocess_cfg=preprocess_cfg)


def build_optimisers(
    model: nn.Module, kind: Literal["adamw", "muon"], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Optimisers that together hold every parameter: matrices decay; biases, norms, embeddings and temperature do not.

    Args:
        model: whose parameters.
        kind: ``muon`` for the matrices (convolutions are such), or ``adamw`` for them too.
        weight_decay: of the matrices.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
        (rest if plain else matrices).append(parameter)
    if kind == "muon":
        return [Muon(matrices, lr=0.0, weight_decay=weight_decay), _adamw([{"params": rest, "weight_decay": 0.0}])]
    return [_adamw([{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}])]


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # Fused: one pass over memory a step; the token table alone has four million weights.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


class TextTower:
    """The text tower of an Encoder over strings, fast for many short ones.

    Token ids are kept for every text seen (templates times words are a closed set), and texts are encoded in a few
    parts of like length, since a part is as long as its longest text.
    """

    def __init__(self, encoder: Encoder, parts: int = 4) -> None:
        self._encoder = encoder
        self._parts = parts
        self._tokens: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Features of ``texts``, cut off at the context's end: float32 [N, dim], not normalised."""
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        if new:
            self._tokens.update(zip(new, self._encoder.tokenize(new, truncate=True), strict=True))
        tokens = torch.stack([self._tokens[text] for text in texts])
        order = torch.argsort((tokens != 0).sum(1), stable=True)
        parts = [self._encoder.encode_tokens(tokens[part]) for part in order.chunk(self._parts)]
        return torch.cat(parts)[torch.argsort(order)]


class ImageTower:
    """The image tower of an Encoder, computed in ``dtype`` on cast copies of its float32 weights.

    The copies are made in the graph, so gradients reach the float32 weights. Norms keep float32 weights: their
    kernels take mixed inputs. This is not autocast, which on CPUs re-copies weights inside every kernel call.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        self._encoder = encoder
        self._visual: nn.Module = encoder.model.visual  # type: ignore[assignment]
        self._norms = {
            f"{prefix}."
            for prefix, module in self._visual.named_modules()
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
        }
        self.dtype = dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features of float RGB pixels in [0,1] [B, 3, R, R]: float32 [B, dim], not normalised."""
        normalised = (pixels - self._encoder.mean) / self._encoder.std
        images = normalised.to(self.dtype).contiguous(memory_format=torch.channels_last)
        if self.dtype == torch.float32:
            features: Tensor = self._visual(images)
            return features
        cast = {
            name: value if any(name.startswith(norm) for norm in self._norms) else value.to(self.dtype)
            for name, value in self._visual.named_parameters()
        }
        output: Tensor = torch.func.functional_call(self._visual, cast, (images,))
        return output.float()


def fastest_dtype(encoder: Encoder, batch_size: int, repeats: int = 2) -> tuple[torch.dtype, dict[str, float]]:
    """Time one forward and backward of the image tower in float32 and bfloat16.

    Returns:
        The faster dtype, and images/s of each. Buffers (running statistics) are left as found.
    """
    buffers = {name: value.clone() for name, value in encoder.model.named_buffers()}
    pixels = torch.full((batch_size, 3, encoder.resolution, encoder.resolution), 0.5)
    pixels += torch.linspace(0, 0.3, batch_size).view(-1, 1, 1, 1)
    speeds: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tower = ImageTower(encoder, dtype)
        best = float("inf")
        for _ in range(repeats + 1):
            start = time.perf_counter()
            torch.autograd.backward(tower(pixels).square().mean())
            best = min(best, time.perf_counter() - start)
        speeds[str(dtype).removeprefix("torch.")] = round(batch_size / best, 1)
    encoder.model.zero_grad(set_to_none=True)
    for name, value in encoder.model.named_buffers():
        value.copy_(buffers[name])
    return (torch.bfloat16 if speeds["bfloat16"] > speeds["float32"] else torch.float32), speeds


def update_average(average: Encoder, encoder: Encoder, decay: float) -> None:
    """Move every floating-point weight and running statistic of ``average`` towards ``encoder`` by 1 - ``decay``."""
    current, ours = encoder.model.state_dict(), average.model.state_dict()
    floats = [key for key, value in ours.items() if value.is_floating_point()]
    with torch.no_grad():
        torch._foreach_lerp_([ours[key] for key in floats], [current[key] for key in floats], 1 - decay)
        for key in ours.keys() - floats:
            ours[key].copy_(current[key])


@contextmanager
def fast_products() -> Iterator[None]:
    """Settings for a training step, undone after it.

    float32 matrix products may be computed in bfloat16 (the text tower's, whose weights stay float32), and attention
    goes the plain way: the CPU's fused kernel is several times slower on short sequences.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
