"""Random numbers that belong to an item: a hash of (seed, item key, step, position), on any device.

Draws for one picture (an attack's, a defence's) must not depend on which pictures share its batch, nor on the device,
and must leave torch's own generators as they are. So they are counted, not drawn in turn (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), with a 32-bit integer mixer in place of Philox.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_PART = 1 << 15


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words (held in int64) whose every input bit moves about half of the output bits."""
    return _mix_(x.clone())


def _mix_(x: Tensor) -> Tensor:
    """The same in place."""
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


def _words(keys: Tensor, seed: int, step: int, count: int, stream: int) -> Tensor:
    """int64 [N, count] of uniform 32-bit words."""
    state = _mix(keys.to(torch.int64) & _MASK)
    state = _mix(state ^ ((keys.to(torch.int64) >> 32) & _MASK))
    for part in (seed, seed >> 32, step, stream):
        state = _mix((state + 0x9E3779B9 + (part & _MASK)) & _MASK)
    counter = _mix(torch.arange(count, device=keys.device, dtype=torch.int64))
    words = counter + state[:, None]
    # On a CPU in parts that stay in its cache.
    parts = torch.split(words.view(-1), _PART) if words.device.type == "cpu" else (words,)
    for together in parts:
        _mix_(together.bitwise_and_(_MASK))
    return words


def uniform(keys: Tensor, shape: Sequence[int], *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): float32 [N, *shape].

    Args:
        keys: int64 [N], which item each row is for.
        shape: of one item's draw.
        seed: of the attack or defence.
        step: each step draws anew.
        stream: tells several draws of one step apart.
    """
    words = _words(keys, seed, step, math.prod(shape), stream)
    return ((words >> 8).float() * 2.0**-24).reshape(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int], *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Standard normal numbers (Box and Muller 1958): float32 [N, *shape]; arguments as `uniform`."""
    pair = uniform(keys, (2, *shape), seed=seed, step=step, stream=stream)
    radius = torch.sqrt(-2 * torch.log1p(-pair[:, 0]))
    return radius * torch.cos(2 * math.pi * pair[:, 1])


def integers(keys: Tensor, shape: Sequence[int], high: int, *, seed: int, step: int, stream: int = 0) -> Tensor:
    """Uniform integers 0 .. high-1: int64 [N, *shape]; other arguments as `uniform`."""
    words = _words(keys, seed, step, math.prod(shape), stream)
    return ((words * high) >> 32).reshape(len(keys), *shape)


def signs(keys: Tensor, shape: Sequence[int], *, seed: int, step: int, stream: int = 0) -> Tensor:
    """-1 or 1 with equal chance: float32 [N, *shape]; arguments as `uniform`."""
    return uniform(keys, shape, seed=seed, step=step, stream=stream).lt(0.5).float() * 2 - 1
