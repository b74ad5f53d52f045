"""How much of a probe fits between two batches of classifications."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ironclip.encoder import Encoder
from ironclip.probe import Rows, rows_for

# A piece alone takes at most this share of the quantum: on a busy machine it takes longer.
_SHARE = 0.6
# Forwards that a forward and a backward to the pixels take at least (the weights take no gradients).
_FORWARDS = 2.0


def measured_rows(encoder: Encoder, quantum: float, forward: Callable[[int], float]) -> tuple[Rows, float]:
    """The largest batches whose forward and backward stay well within the quantum (else one row), and their seconds.

    Args:
        encoder: that gradients are taken of.
        quantum: seconds.
        forward: seconds that a forward of so many pictures takes at least, so that what cannot fit is not run.
    """
    best = rows_for(encoder.device)
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size <= max(best.gradient, best.views)]
    for size in sizes:
        if size > 1 and _FORWARDS * forward(size) > _SHARE * quantum:
            continue
        seconds = _timed(encoder, size)
        if seconds > _SHARE * quantum:  # the first also sets things up
            seconds = min(seconds, _timed(encoder, size))
        if seconds <= _SHARE * quantum or size == 1:
            break
    return Rows(min(best.gradient, size), min(best.forward, size), min(best.views, size)), seconds


def _timed(encoder: Encoder, size: int) -> float:
    side = encoder.resolution
    with torch.enable_grad():
        pixels = torch.zeros(size, 3, side, side, device=encoder.device, requires_grad=True)
        began = time.perf_counter()
        torch.autograd.grad(encoder.encode_image(pixels).sum(), pixels)
        if pixels.is_cuda:
            torch.cuda.synchronize(pixels.device)
    return time.perf_counter() - began
