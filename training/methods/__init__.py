"""Methods that make an encoder robust, one file each: an objective for the attack, and a loss."""

from __future__ import annotations

from collections.abc import Callable

from training.methods.agft import AGFT
from training.methods.base import Method
from training.methods.fare import FARE
from training.methods.hierarchical import Hierarchical
from training.methods.hpt_gpd import HPTGPD
from training.methods.pmg_aft import PMGAFT
from training.methods.simclip import SimCLIP
from training.methods.tecoa import TeCoA

METHODS: dict[str, Callable[..., Method]] = {
    "simclip": SimCLIP,
    "fare": FARE,
    "tecoa": TeCoA,
    "pmg_aft": PMGAFT,
    "agft": AGFT,
    "hpt_gpd": HPTGPD,
    "hierarchical": Hierarchical,
}
