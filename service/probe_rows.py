"""How much of a probe fits between two batches of classifications."""

from __future__ import annotations

import time

import torch

from ironclip.encoder import Encoder
from ironclip.probe import Rows, rows_for

# A piece alone takes at most this share of the quantum: on a busy machine it takes longer.
_SHARE = 0.6


def measured_rows(encoder: Encoder, quantum: float) -> tuple[Rows, float]:
    """The largest batches whose forward and backward stay well within the quantum (else one row), and their seconds.

    Args:
        encoder: that gradients are taken of.
        quantum: seconds.
    """
    best = rows_for(encoder.device)
    for size in [size for size in (32, 16, 8, 4, 2, 1) if size <= max(best.gradient, best.views)]:
        seconds = min(_timed(encoder, size) for _ in range(3))
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
