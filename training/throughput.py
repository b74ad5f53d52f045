"""The floor of a training step: what the bare forwards and backwards that it cannot do without would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from training.methods.base import Method, Networks, Tower
from training.towers import ImageTower, timed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from training.recipe import AttackConfig


def multiply_adds(tower: Tower, pixels: Tensor) -> float:
    """Multiply-adds of one forward of ``pixels`` [b, 3, R, R]."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(pixels)
    return float(counter.get_total_flops()) / 2


@dataclass(frozen=True)
class Floor:
    """Seconds of one rank's share of a batch, each measured alone.

    Attributes:
        to_pixels, to_weights: forward and backward.
        original, proxy: forwards of the frozen towers that the method calls in each step.
        step: k * to_pixels + the method's forwards * to_weights + the frozen towers.
    """

    to_pixels: float
    to_weights: float
    original: float
    proxy: float
    step: float


def measure_floor(
    method: Method,
    attack: AttackConfig,
    tower: ImageTower,
    networks: Networks,
    share: int,
    fabric: Fabric,
    *,
    anchor: bool = False,
    repeats: int = 3,
) -> Floor:
    """Time the parts of a step on ``share`` grey pictures, the best of ``repeats`` each.

    Args:
        method: how many forwards its loss has.
        attack: its iterations.
        tower: the student.
        networks: the frozen towers.
        share: pictures at once.
        fabric: the device.
        anchor: whether a step computes f_0(x).
        repeats: how often each part is timed.
    """
    side = tower.resolution
    wide = torch.float64 if tower.dtype == torch.float64 else torch.float32
    pixels = torch.full((share, 3, side, side), 0.5, device=fabric.device, dtype=wide)
    pixels += torch.linspace(0, 0.3, share, device=fabric.device, dtype=wide).view(-1, 1, 1, 1)
    frozen = tower.frozen()
    parameters = [parameter for parameter in tower.visual.parameters() if parameter.requires_grad]

    def forward(network: Tower) -> None:
        with torch.no_grad():
            network(pixels)

    def to_pixels() -> None:
        leaf = pixels.clone().requires_grad_(True)
        torch.autograd.grad(frozen(leaf).square().mean(), leaf)

    def to_weights() -> None:
        torch.autograd.grad(tower(pixels).square().mean(), parameters, allow_unused=True)

    def best(work: object) -> float:
        return min(timed(work, fabric.device) for _ in range(repeats))  # type: ignore[arg-type]

    times = {
        "to_pixels": best(to_pixels),
        "to_weights": best(to_weights),
        "original": best(lambda: forward(networks.original)) if method.frozen_forwards + anchor else 0.0,
        "proxy": best(lambda: forward(networks.proxy)) if method.proxy and networks.proxy is not None else 0.0,
    }
    step = (
        attack.iterations * times["to_pixels"]
        + method.forwards * times["to_weights"]
        + (method.frozen_forwards + anchor) * times["original"]
        + times["proxy"]
    )
    return Floor(**times, step=step)
