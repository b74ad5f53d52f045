"""Which radii a search tries next, and how many it can come to."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ironclip.attacks import Norm
from ironclip.probe.options import ProbeOptions

# Where one is tried after the other, the next lies so far up the bracket: what breaks does so in a few steps, what
# holds costs them all.
_UP = 0.7
# L2 radii below this hold no other picture of 8 bits.
_LEAST_L2 = 1 / 255
# A bracket of L2 radii is narrow enough at this ratio; L-inf ones are whole steps.
_NARROW = 1.05


def lanes_for(device: torch.device) -> int:
    """Radii that a search tries at the same time: a GPU does many as quickly as one, a CPU does not."""
    return 1 if device.type == "cpu" else 8


def next_radii(norm: Norm, lanes: int, low: float, top: float, *, closed: bool = False) -> list[float]:
    """Radii to be tried next between one that held (or 0) and one that broke; none where the bracket is narrow enough.

    Args:
        norm: in whose unit they are.
        lanes: radii at the same time.
        low, top: the bracket.
        closed: nothing broke yet, so ``top`` is to be tried too.
    """
    if closed:
        return _spread(norm, lanes, low, top, closed=True) if low < top else []
    return [eps for eps in _spread(norm, lanes, low, top) if low < eps < top]


def most_radii(options: ProbeOptions, lanes: int) -> int:
    """Radii that a probe attacks at most, whatever breaks.

    Where Square breaks what the gradients did not, the search goes on below: as long as from the start, at most.
    """
    if options.eps:
        return len(set(options.eps))
    count = _most(options.norm, lanes, 0.0, options.top, True)
    if options.black_box is not None:
        count += _most(options.norm, lanes, 0.0, options.top, False)
    return min(count, math.floor(options.top)) if options.norm == "linf" else count


@lru_cache(maxsize=4096)
def _most(norm: Norm, lanes: int, low: float, top: float, closed: bool) -> int:
    """Radii that a search inside a bracket comes to at most."""
    radii = next_radii(norm, lanes, low, top, closed=closed)
    if not radii:
        return 0
    edges = [low, *radii]
    # The smallest that broke, and the one below, which held.
    most = max(_most_open(norm, lanes, held, broke) for held, broke in zip(edges, radii, strict=False))
    above = _most(norm, lanes, radii[-1], top, True) if closed else _most_open(norm, lanes, radii[-1], top)
    return len(radii) + max(most, above)


def _most_open(norm: Norm, lanes: int, low: float, top: float) -> int:
    """The same for a bracket whose top broke, moved to where all brackets of its kind are counted once."""
    if norm == "linf":
        return _most(norm, lanes, 0.0, top - low, False)
    return _most(norm, lanes, 1.0, round(top / low, 9), False) if low > 0 else _most(norm, lanes, 0.0, top, False)


def _spread(norm: Norm, lanes: int, low: float, top: float, *, closed: bool = False) -> list[float]:
    """Radii over the open interval (low, top), or over (low, top] if ``closed``; whole steps for L-inf."""
    if norm == "linf":
        whole = [float(eps) for eps in range(math.floor(low) + 1, math.ceil(top) + closed) if eps <= top]
        if len(whole) <= lanes:
            return whole
        if lanes == 1:
            return [whole[int(_UP * len(whole))]]
        if not closed:
            inner = range(1, lanes + 1)
            return sorted({whole[i * len(whole) // (lanes + 1)] for i in inner})
        start = whole[0]
        shares = torch.logspace(0, math.log10(whole[-1] / start), lanes).tolist()
        return sorted({float(round(start * share)) for share in shares})
    if (low > 0 and top / low <= _NARROW and not closed) or top < _LEAST_L2:
        return []
    if lanes == 1:
        return [top if closed else top / 3 if low == 0 else low * (top / low) ** _UP]
    start = low if low > 0 else top / 256
    steps = lanes if closed else lanes + 1
    return [start * (top / start) ** (i / steps) for i in range(1, steps + closed)]
