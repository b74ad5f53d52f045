"""Defences at decision time: what stands between an encoder's features and the answer.

A defence turns pixels into views, and the views' features into logits, by way of the encoder's head. It is
part of the Classifier, so that what attacks a decision attacks the defence too. It says of itself whether it is
random, differentiable and optimising, and which heads it serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ironclip.defences.none import NoDefence
from ironclip.errors import OptionError
from ironclip.textbank import TextBank

# (features [..., dim], bank) -> logits [..., K]: the encoder's native rule.
HeadLogits = Callable[[Tensor, TextBank], Tensor]


class Defence(Protocol):
    """What a Classifier asks of a defence.

    Attributes:
        name: its key in DEFENCES.
        random: two calls on the same pixels may differ.
        differentiable: gradients reach the pixels.
        optimising: it runs an optimisation loop of its own.
        descriptions: it compares with the labels' descriptions, so its text banks hold them.
        heads: types of head it serves.
        view_count: views it makes of one picture; each costs one forward of the image tower.
    """

    name: str
    random: bool
    differentiable: bool
    optimising: bool
    descriptions: bool
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


def make_defence(name: object = "none", options: object = None) -> Defence:
    """The defence of this name with these options (a mapping); raises OptionError listing what exists."""
    if not isinstance(name, str) or name not in DEFENCES:
        raise OptionError(
            f"There is no defence {str(name)[:60]!r}; there are: {', '.join(DEFENCES)}.", pointer="/defence/name"
        )
    if options is None:
        options = {}
    known = list(inspect.signature(DEFENCES[name]).parameters)
    if not isinstance(options, Mapping) or not set(options) <= set(known):
        given = ", ".join(sorted(map(str, options)))[:200] if isinstance(options, Mapping) else type(options).__name__
        raise OptionError(
            f"The defence {name!r} has the options {', '.join(known) or '(none)'}; given were: {given}.",
            pointer="/defence",
        )
    return DEFENCES[name](**options)
