"""What a probe can be asked for, and what the efforts stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ironclip.attacks import APGD, ATTACKS, NORMS, Attack, AutoAttack, Norm, Square, make_attack
from ironclip.errors import OptionError, shown

EffortName = Literal["quick", "standard", "thorough"]
Draws = Literal["fixed", "fresh"]
Goal = Literal["label", "embedding"]
MOST_EPS = {"linf": 255.0, "l2": 1000.0}
# Upper ends of a search: L-inf in 1/255, L2 in pixel units over the whole picture.
DEFAULT_MAX = {"linf": 16.0, "l2": 8.0}
_MOST_POINTS = 64
# Attacks that take any objective, so also a target's and an embedding's.
FREE_ATTACKS = ("fgsm", "pgd", "apgd")


@dataclass(frozen=True)
class Effort:
    """How hard a probe tries at each radius.

    Attributes:
        version, iterations, classes, queries: of AutoAttack's parts, see `AutoAttack`.
        square: queries of Square at the largest radius that held, beside the gradients: does it know better?
        draws: averaged in each step against decisions that draw anew.
        gradients: gradient steps in all, where the caller sets no budget.
    """

    version: Literal["standard", "ensemble", "rand"]
    iterations: int
    classes: int
    queries: int
    square: int
    draws: int
    gradients: int


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort("rand", 20, 1, 1, 100, 3, 2_000),
    "standard": Effort("ensemble", 50, 3, 1, 500, 10, 20_000),
    "thorough": Effort("standard", 100, 9, 2_000, 0, 20, 200_000),
}


@dataclass(frozen=True)
class ProbeOptions:
    """Everything about a probe but picture and decision.

    Attributes:
        norm: `linf` (radii in 1/255) or `l2` (radii in pixel units, a pixel running from 0 to 1, over the picture).
        eps: radii to try; if empty, the smallest breaking one is searched.
        max_eps: upper end of the search; 0 takes 16 for `linf`, 8 for `l2`.
        effort: how hard each radius is attacked.
        attack: a name of ATTACKS in place of the effort's own attacks, with no less than the effort has; or a mapping
            with ``name`` and options, ``{"name": "pgd", "iterations": 10}``, which is taken as it is: what it does not
            name is the attack's own default, as in `make_attack` and ``python -m training evaluate``.
        seconds: of work at most; what is known then is the answer.
        gradients: work at most, in gradient steps: when a probe has made as many forwards and backwards as so many of
            them take (a query without a gradient is a third of one, a draw counts as a query), no further round of
            queries is begun; 0 takes the effort's.
        draws: what is attacked of a defence that draws: `fixed`, the very draws that are served; or `fresh`, a decision
            that draws anew each time, which counts as broken where most of some unseen draws are fooled.
        seed: of the attacks.

    Raises:
        OptionError: with a pointer to what is wrong.
    """

    norm: Norm = "linf"
    eps: tuple[float, ...] = ()
    max_eps: float = 0.0
    effort: EffortName = "quick"
    attack: str | Mapping[str, Any] = ""
    seconds: float = 10.0
    gradients: int = 0
    draws: Draws = "fixed"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("norm", self.norm, NORMS)
        _one_of("effort", self.effort, tuple(EFFORTS))
        _one_of("draws", self.draws, get_args(Draws))
        most = MOST_EPS[self.norm]
        if len(self.eps) > _MOST_POINTS:
            raise OptionError(
                f"{len(self.eps)} radii were given, at most {_MOST_POINTS} are tried in one probe.",
                pointer="/eps",
                limit=_MOST_POINTS,
            )
        for i, eps in enumerate(self.eps):
            _between(f"eps/{i}", eps, 0, most, unit=self.unit)
        if self.max_eps:
            _between("max_eps", self.max_eps, 1 if self.norm == "linf" else 0.01, most, unit=self.unit)
        _between("seconds", self.seconds, 0.01, 86_400)
        _between("gradients", self.gradients, 0, 10**9)
        _between("seed", self.seed, 0, 2**53)
        _checked_attack(self.attack)

    @property
    def unit(self) -> str:
        """What radii are counted in, for people."""
        return "1/255" if self.norm == "linf" else "pixel units (0 to 1), L2 over the picture"

    @property
    def scale(self) -> float:
        """Pixel units of one unit of a radius."""
        return 1 / 255 if self.norm == "linf" else 1.0

    @property
    def top(self) -> float:
        """Upper end of the search."""
        return self.max_eps or DEFAULT_MAX[self.norm]

    @property
    def budget(self) -> int:
        """Work at most, in gradient steps."""
        return self.gradients or EFFORTS[self.effort].gradients

    @property
    def attack_name(self) -> str:
        """Name of the one attack that is asked for; "" where the effort chooses."""
        return self.attack if isinstance(self.attack, str) else str(self.attack["name"])

    def attacks(self, *, targeted: bool, vector: bool) -> list[tuple[Attack, str]]:
        """The attacks on one radius in their order, each with the objective that its problem is given.

        Args:
            targeted: a label is to be reached: only attacks that take any objective will do.
            vector: a vector is attacked, which has an objective of its own: the same, and no name says which.

        Raises:
            OptionError: the attack asked for cannot.
        """
        effort, free = EFFORTS[self.effort], targeted or vector
        if name := self.attack_name:
            if free and name not in FREE_ATTACKS:
                raise OptionError(
                    f"The attack {name!r} chooses its own objective; for a target or an embedding use one of "
                    f"{', '.join(FREE_ATTACKS)}.",
                    pointer="/attack",
                )
            return [(make_attack(name, self.attack_options), "ce")]
        if free:
            apgd = APGD("own", effort.iterations, restarts=effort.classes, seed=self.seed)
            return [(apgd, "ce")] if vector else [(apgd, "ce"), (apgd, "margin")]
        whole = AutoAttack(effort.version, effort.iterations, effort.queries, effort.classes, self.seed)
        return [(whole, "ce")]

    @property
    def attack_options(self) -> dict[str, Any]:
        """Options of the one attack asked for: as they are given, else its own and no less than the effort has."""
        given = {} if isinstance(self.attack, str) else {k: v for k, v in self.attack.items() if k != "name"}
        fields = dataclasses.fields(make_attack(self.attack_name, given))  # type: ignore[arg-type]
        own: dict[str, Any] = {field.name: field.default for field in fields}
        seed = {"seed": self.seed} if "seed" in own else {}
        if not isinstance(self.attack, str):
            return seed | given
        effort = EFFORTS[self.effort]
        least = {"iterations": effort.iterations, "classes": effort.classes, "queries": effort.queries}
        return {name: max(own[name], most) for name, most in least.items() if name in own} | seed

    @property
    def black_box(self) -> Square | None:
        """What is held against the gradients, if anything: no attack by name, and AutoAttack has its own."""
        queries = EFFORTS[self.effort].square
        return Square(queries, seed=self.seed) if queries and not self.attack else None

    @property
    def draws_a_step(self) -> int:
        """Draws averaged in one step against fresh ones."""
        return EFFORTS[self.effort].draws


def _checked_attack(attack: object) -> None:
    """Raise OptionError, pointing to it, for what names no attack or gives it options that it does not take."""
    if attack == "":
        return
    options: dict[Any, Any] = {}
    name = attack
    if isinstance(attack, Mapping):
        options = dict(attack)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise OptionError('An attack is a name or {"name": ..., option: ...}.', pointer="/attack/name")
    elif not isinstance(attack, str) or attack not in ATTACKS:
        known = ", ".join(ATTACKS)
        raise OptionError(f"There is no attack {str(attack)[:60]!r}; there are: {known}.", pointer="/attack")
    try:
        make_attack(name, options)
    except OptionError as error:
        error.pointer = error.pointer or "/attack"
        raise


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} is one of {', '.join(choices)}, not {str(value)[:40]!r}.", pointer=f"/{name}")


def _between(name: str, value: object, low: float, high: float, unit: str = "") -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        said = f" (in {unit})" if unit else ""
        raise OptionError(
            f"{name.partition('/')[0]} lies in {low:g} to {high:g}{said}, not {shown(value)}.",
            pointer=f"/{name}",
            limit=high,
        )
