"""Defences at decision time: what stands between an encoder's features and the answer.

A defence turns pixels into views, and the views' features into logits, by way of the encoder's head. It is
part of the Classifier, so that what attacks a decision attacks the defence too. It says of itself whether it is
random, differentiable and optimising, and which heads it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ironclip.defences.none import NoDefence
from ironclip.errors import OptionError
from ironclip.labels import TextBank

# (features [..., dim], bank) -> logits [..., K]: the encoder's native rule.
HeadLogits = Callable[[Tensor, TextBank], Tensor]


class Defence(Protocol):
    """What a Classifier asks of a defence.

    Attributes:
        name: its key in DEFENCES.
        random: two calls on the same pixels may differ.
        differentiable: gradients reach the pixels.
        optimising: it runs an optimisation loop of its own.
        heads: types of head it serves.
        view_count: views it makes of one picture; each costs one forward of the image tower.
    """

    name: str
    random: bool
    differentiable: bool
    optimising: bool
    heads: tuple[str, ...]

    @property
    def view_count(self) -> int:
        """Views of one picture."""

    def options(self) -> dict[str, Any]:
        """All options with their values, for answers and cache keys."""

    def prepare(self, bank: TextBank) -> Any:
        """State that depends on the text bank alone; made once per bank."""

    def views(self, pixels: Tensor) -> Tensor:
        """[N, 3, R, R] in [0,1] -> [N, view_count, 3, R, R]."""

    def logits(self, features: Tensor, bank: TextBank, state: Any, head: HeadLogits) -> Tensor:
        """Features of the views [N, view_count, dim], not normalised -> logits [N, K]."""


DEFENCES: dict[str, Callable[..., Defence]] = {
    "none": NoDefence,
}


def make_defence(name: str = "none", options: Mapping[str, Any] | None = None) -> Defence:
    """The defence of this name with these options; raises OptionError listing what exists."""
    if name not in DEFENCES:
        raise OptionError(
            f"There is no defence {name[:60]!r}; there are: {', '.join(DEFENCES)}.", pointer="/defence/name"
        )
    try:
        return DEFENCES[name](**dict(options or {}))
    except TypeError as error:
        raise OptionError(
            f"The defence {name!r} does not take these options: {', '.join(sorted(options or {}))[:200]}.",
            pointer="/defence",
        ) from error
