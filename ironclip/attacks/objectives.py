"""What an attack raises: one number for each item, larger when the decision is nearer to wrong.

An objective takes a model's outputs for some items and the items' positions in the attacked batch. The ones here read
logits [b, K]; a training method may bring its own, on features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.errors import OptionError

# (outputs [b, ...], items int64 [b]) -> loss [b]
Objective = Callable[[Tensor, Tensor], Tensor]
# (outputs [b, ...], items int64 [b]) -> bool [b]
Verdict = Callable[[Tensor, Tensor], Tensor]


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest logit of another class: [b]."""
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1)


def _own(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None])[:, 0]


def cross_entropy(labels: Tensor) -> Objective:
    """Cross-entropy of the label (Goodfellow et al. 2015; Madry et al. 2018)."""
    return lambda logits, items: F.cross_entropy(logits, labels[items], reduction="none")


def margin(labels: Tensor) -> Objective:
    """Largest other logit minus the label's own (Carlini and Wagner 2017, f6, without its floor): above 0 is fooled."""

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        return _others(logits, labels[items]) - _own(logits, labels[items])

    return loss


def carlini_wagner(labels: Tensor, confidence: float = 50.0) -> Objective:
    """``-relu(own - largest other + confidence)``, as the CLIP robustness papers use it inside PGD ("CW attack")."""

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        return -F.relu(_own(logits, labels[items]) - _others(logits, labels[items]) + confidence)

    return loss


def dlr(labels: Tensor) -> Objective:
    """Difference of logits ratio (Croce and Hein 2020, eq. 6): no scale or shift of the logits changes it.

    Needs three classes.
    """

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        top = logits.topk(3, dim=1).values
        numerator = _own(logits, labels[items]) - _others(logits, labels[items])
        return -numerator / (top[:, 0] - top[:, 2]).clamp_min(1e-12)

    return loss


def targeted_cross_entropy(targets: Tensor) -> Objective:
    """Minus the cross-entropy of the target class."""
    return lambda logits, items: -F.cross_entropy(logits, targets[items], reduction="none")


def targeted_margin(targets: Tensor) -> Objective:
    """The target's logit minus the largest other: above 0 the target is the answer."""

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        return _own(logits, targets[items]) - _others(logits, targets[items])

    return loss


def targeted_dlr(labels: Tensor, targets: Tensor) -> Objective:
    """Targeted difference of logits ratio (Croce and Hein 2020, eq. 7). Needs four classes."""

    def loss(logits: Tensor, items: Tensor) -> Tensor:
        top = logits.topk(4, dim=1).values
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
        return -(_own(logits, labels[items]) - _own(logits, targets[items])) / spread.clamp_min(1e-12)

    return loss


UNTARGETED: dict[str, Callable[[Tensor], Objective]] = {
    "ce": cross_entropy,
    "margin": margin,
    "cw": carlini_wagner,
    "dlr": dlr,
}
TARGETED: dict[str, Callable[[Tensor], Objective]] = {"ce": targeted_cross_entropy, "margin": targeted_margin}
# The fewest classes that an objective is defined for.
LEAST_CLASSES = {"dlr": 3, "targeted_dlr": 4}


def make_objective(name: str, labels: Tensor, targets: Tensor | None = None) -> Objective:
    """The objective of this name against ``labels``, or towards ``targets`` if given; raises OptionError."""
    known = UNTARGETED if targets is None else TARGETED
    if name not in known:
        kind = "untargeted" if targets is None else "targeted"
        raise OptionError(f"There is no {kind} objective {str(name)[:40]!r}; there are: {', '.join(known)}.")
    return known[name](labels if targets is None else targets)


def wrong(labels: Tensor) -> Verdict:
    """Fooled when the answer is not the label. A tie or a NaN is not the label's win, so it counts as fooled."""

    def verdict(logits: Tensor, items: Tensor) -> Tensor:
        return ~(_own(logits, labels[items]) > _others(logits, labels[items]))

    return verdict


def reached(targets: Tensor) -> Verdict:
    """Fooled when the answer is the target."""
    return lambda logits, items: _own(logits, targets[items]) > _others(logits, targets[items])
