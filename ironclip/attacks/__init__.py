"""Attacks on a decision: they ask about pixels and are told loss, verdict and gradient, one query at a time.

`ATTACKS` names them. `drive` runs one to its end against a `WhiteBox`; `Run` advances one answer at a time. A new
attack is one file here and one entry in ATTACKS; the contract test runs over them all.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ironclip.attacks.apgd import APGD, APGDT
from ironclip.attacks.autoattack import AutoAttack
from ironclip.attacks.contract import Answer, Attack, Problem, Query, Result, Run, classification, drive
from ironclip.attacks.fab import FAB
from ironclip.attacks.pgd import FGSM, PGD
from ironclip.attacks.square import Square
from ironclip.attacks.threat import NORMS, Norm, ThreatModel
from ironclip.attacks.whitebox import WhiteBox
from ironclip.errors import OptionError

__all__ = [
    "APGD",
    "APGDT",
    "ATTACKS",
    "FAB",
    "FGSM",
    "NORMS",
    "PGD",
    "Answer",
    "Attack",
    "AutoAttack",
    "Norm",
    "Problem",
    "Query",
    "Result",
    "Run",
    "Square",
    "ThreatModel",
    "WhiteBox",
    "classification",
    "drive",
    "make_attack",
]

# Raised when one of them finds more than before, so that results say which they were made by. 2: FAB-T makes all steps.
VERSION = 2
_KINDS = {int: "whole number", float: "finite number", bool: "yes or no (true, false)", str: "text"}

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "pgd": partial(PGD, loss="own"),
    "cw": partial(PGD, loss="cw"),
    "apgd": partial(APGD, loss="own"),
    "apgd-ce": partial(APGD, loss="ce"),
    "apgd-dlr": partial(APGD, loss="dlr"),
    "apgd-t": APGDT,
    "fab-t": FAB,
    "square": Square,
    "autoattack": partial(AutoAttack, version="standard"),
    "autoattack-ensemble": partial(AutoAttack, version="ensemble"),
    "autoattack-rand": partial(AutoAttack, version="rand"),
}


def make_attack(name: object, options: object = None) -> Attack:
    """The attack of this name with these options (a mapping); raises OptionError listing what exists."""
    if not isinstance(name, str) or name not in ATTACKS:
        raise OptionError(
            f"There is no attack {str(name)[:60]!r}; there are: {', '.join(ATTACKS)}.", pointer="/attack/name"
        )
    make = ATTACKS[name]
    fixed: Mapping[str, Any] = make.keywords if isinstance(make, partial) else {}
    kind: Any = make.func if isinstance(make, partial) else make
    known = [field.name for field in dataclasses.fields(kind) if field.name not in fixed]
    if options is None:
        options = {}
    if not isinstance(options, Mapping) or not set(options) <= set(known):
        given = ", ".join(sorted(map(str, options)))[:200] if isinstance(options, Mapping) else type(options).__name__
        raise OptionError(
            f"The attack {name!r} has the options {', '.join(known) or '(none)'}; given were: {given}.",
            pointer="/attack",
        )
    hints = typing.get_type_hints(kind) if options else {}
    for field in dataclasses.fields(kind):
        if field.name in options:
            _check_option(name, field, typing.get_args(hints[field.name]), options[field.name])
    return make(**options)


def _check_option(attack: str, field: dataclasses.Field[Any], choices: tuple[Any, ...], value: object) -> None:
    """Raise OptionError unless the value is a choice, or of the kind that the default is."""
    default = field.default
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = type(value) is type(default)
    if isinstance(default, float):
        fits = (whole or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]
    if not fits or (choices and value not in choices):
        what = f"one of {', '.join(map(str, choices))}" if choices else f"a {_KINDS[type(default)]}"
        raise OptionError(
            f"{field.name} of the attack {attack!r} is {what}, not {str(value)[:40]!r}.", pointer="/attack"
        )
