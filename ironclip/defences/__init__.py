"""Defences at decision time: what stands between an encoder's features and the answer.

A defence turns pixels into views, and the views' features into logits, by way of the encoder's head. It is
part of the Classifier, so that what attacks a decision attacks the defence too. It says of itself whether it is
random, differentiable and optimising, and which heads it serves. A new one is one file and one entry in DEFENCES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from ironclip.defences.clipure import ClipureCos
from ironclip.defences.cola import Cola
from ironclip.defences.contract import Defence, Encode, HeadRule
from ironclip.defences.none import NoDefence
from ironclip.defences.ttc import TestTimeCounterattack
from ironclip.errors import OptionError

__all__ = ["DEFENCES", "Defence", "Encode", "HeadRule", "make_defence"]

DEFENCES: dict[str, Callable[..., Defence]] = {
    "none": NoDefence,
    "cola": Cola,
    "ttc": TestTimeCounterattack,
    "clipure": ClipureCos,
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
