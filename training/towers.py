"""Building an open_clip model for training, and running its image tower in a cheaper dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ironclip.encoder import Encoder
from ironclip.folding import foldable, folded, folded_weights
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
    model: nn.Module,
    kind: Literal["adamw", "muon", "sgd"],
    weight_decay: float,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    momentum: float = 0.9,
) -> list[torch.optim.Optimizer]:
    """Optimisers that together hold every trainable parameter.

    Matrices decay; biases, norms, embeddings and temperature do not.

    Args:
        model: whose parameters.
        kind: ``muon`` for the matrices (convolutions are such) and AdamW for the rest, or one of the others for all.
        weight_decay: of the matrices.
        betas: of AdamW.
        momentum: of SGD.
    """
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or any(part in name for part in NO_DECAY)
            (rest if plain else matrices).append(parameter)
    spared = {"params": rest, "weight_decay": 0.0}
    if kind == "muon":
        return [Muon(matrices, lr=0.0, weight_decay=weight_decay), _adamw([spared], betas)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, spared]
    if kind == "sgd":
        return [torch.optim.SGD(groups, lr=0.0, momentum=momentum)]
    return [_adamw(groups, betas)]


def _adamw(groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    # Fused: one pass over memory a step; the token table alone has four million weights.
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


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
    """The image tower of an Encoder, computed in ``dtype`` on cast copies of its master weights.

    The copies are made in the graph, so gradients reach the masters. This is not autocast, which on CPUs re-copies
    weights inside every kernel call. Norms keep their masters' precision where the kernels take mixed inputs: batch
    norms always, layer norms on CPUs.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        self._encoder = encoder
        self.visual: nn.Module = encoder.model.visual  # type: ignore[assignment]
        kept = (nn.BatchNorm2d, nn.LayerNorm) if encoder.device.type == "cpu" else (nn.BatchNorm2d,)
        self._norms = tuple(f"{prefix}." for prefix, module in self.visual.named_modules() if isinstance(module, kept))
        self.dtype = dtype
        self.resolution = encoder.resolution
        self._pairs = foldable(self.visual)
        # What `frozen` runs: its weights are replaced in every call.
        self._folded = folded(self.visual) if self._pairs else self.visual

    def weights(self) -> dict[str, Tensor]:
        """Copies of the weights in ``dtype``, in the graph unless under no_grad; empty where none are needed."""
        return {
            name: value.to(self.dtype)
            for name, value in self.visual.named_parameters()
            if value.dtype != self.dtype and not name.startswith(self._norms)
        }

    def __call__(self, pixels: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """Features of float RGB pixels in [0,1] [B, 3, R, R]: float32 (float64) [B, dim], not normalised.

        ``weights`` that `weights` returned serve several calls; without them each call makes its own.
        """
        return self._run(self.visual, self.weights() if weights is None else weights, pixels)

    def _run(self, visual: nn.Module, weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
        normalised = (pixels - self._encoder.mean) / self._encoder.std
        images = normalised.to(self.dtype).contiguous(memory_format=torch.channels_last)
        output = torch.func.functional_call(visual, weights, (images,)) if weights else visual(images)
        features: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa's towers return their tokens too
        return features if features.dtype == torch.float64 else features.float()

    def frozen(self) -> Callable[[Tensor], Tensor]:
        """The tower as it is now in eval mode, differentiable to the pixels alone; its weights are cast once.

        Batch norms are folded into the convolutions: a backward to the pixels takes half the time.
        """
        with torch.no_grad():
            weights = {name: value.detach() for name, value in self.visual.named_parameters()} | self.weights()
            if self._pairs:
                inside = tuple(f"{norm}." for _, norm in self._pairs)
                weights = {name: value for name, value in weights.items() if not name.startswith(inside)}
                for name, value in folded_weights(self.visual, self._pairs).items():
                    weights[name] = value.to(self.dtype)
            # A name left out would be attacked as it was when the run began.
            assert weights.keys() == dict(self._folded.named_parameters()).keys()
        return lambda pixels: self._run(self._folded, weights, pixels)


def now(device: torch.device) -> float:
    """Seconds on a clock, after the work queued on the device's current stream (a copy on another may go on)."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes, what it leaves queued on the device included."""
    start = now(device)
    work()
    return now(device) - start


def _forward_and_backward(tower: ImageTower, pixels: Tensor) -> None:
    torch.autograd.backward(tower(pixels).square().mean())


def fastest_dtype(encoder: Encoder, batch_size: int, repeats: int = 2) -> tuple[torch.dtype, dict[str, float]]:
    """Time one forward and backward of the image tower in float32 and bfloat16.

    Returns:
        The faster dtype, and images/s of each. Buffers (running statistics) are left as found.
    """
    buffers = {name: value.clone() for name, value in encoder.model.named_buffers()}
    pixels = torch.full((batch_size, 3, encoder.resolution, encoder.resolution), 0.5, device=encoder.device)
    pixels += torch.linspace(0, 0.3, batch_size, device=encoder.device).view(-1, 1, 1, 1)
    speeds: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        tower = ImageTower(encoder, dtype)
        work = partial(_forward_and_backward, tower, pixels)
        best = float("inf")
        for _ in range(repeats + 1):
            best = min(best, timed(work, encoder.device))
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
