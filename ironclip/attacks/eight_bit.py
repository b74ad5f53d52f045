"""Pictures in 8 bits, as files hold them, inside a threat model: what an attack found must not get lost in rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from ironclip.attacks.threat import ThreatModel

# What float32 makes of a value that was not changed, in 1/255, is less than this.
_UNCHANGED = 1e-4
# What float64 may add to the square of a length.
_EXACT = 1e-9


def holds_another(threat: ThreatModel) -> bool:
    """Whether the ball holds any other picture of 8 bits: in either norm it takes a whole step of one value."""
    return threat.eps * 255 >= 1 - _UNCHANGED


def inside_8_bits(pictures: Tensor, originals: Tensor, threat: ThreatModel) -> Tensor:
    """Whether pictures of 8 bits, uint8 [N, 3, R, R], are inside the threat model, counted in whole steps: bool [N]."""
    steps = (pictures.double() - originals.to(pictures.device).double()).flatten(1)
    if threat.norm == "linf":
        return steps.abs().amax(1) <= threat.eps * 255 + _UNCHANGED
    return steps.square().sum(1) <= (255 * threat.eps) ** 2 * (1 + _EXACT)


def in_8_bits(pixels: Tensor, originals: Tensor, threat: ThreatModel) -> Tensor:
    """Pictures of 8 bits near ``pixels``, inside the threat model.

    For L-inf each value is rounded and kept within the whole steps that the radius allows. For L2 values are cut
    towards the original, and what is left of the radius is then spent on whole steps, where the most was cut off
    first: rounding alone would wipe out a perturbation of less than half a step everywhere, which a radius well above
    one step can be. Where nothing was changed nothing is.

    Pixels outside the ball, which FAB asks about, come into it for L-inf and stay outside for L2 (`inside_8_bits`).

    Args:
        pixels: float [N, 3, R, R] in [0, 1].
        originals: uint8 [N, 3, R, R].
        threat: what may be changed.

    Returns:
        uint8 [N, 3, R, R].
    """
    start = originals.to(pixels.device).float()
    steps = pixels.detach().float() * 255
    if threat.norm == "linf":
        reach = int(threat.eps * 255 + _UNCHANGED)
        inside = torch.minimum(torch.maximum(steps.round(), start - reach), start + reach)
        return inside.clamp(0, 255).to(torch.uint8)
    delta = (steps.clamp(0, 255) - start).flatten(1)
    wanted = delta.abs()
    whole = (wanted + _UNCHANGED).floor()
    rest = torch.where(wanted > _UNCHANGED, wanted - whole, -torch.inf)
    # Lengths in whole steps are exact in float64, and so is the radius that they must not pass.
    spent = whole.double().square().sum(1, keepdim=True)
    order = rest.argsort(dim=1, descending=True, stable=True)
    price = (2 * whole + 1).gather(1, order).double()
    price = torch.where(rest.gather(1, order) > -torch.inf, price, torch.inf)
    bought = spent + price.cumsum(1) <= (255 * threat.eps) ** 2 * (1 + _EXACT)
    whole += torch.zeros_like(whole).scatter(1, order, bought.to(whole.dtype))
    rounded = start + (delta.sign() * whole).view_as(start)
    return rounded.clamp(0, 255).to(torch.uint8)
