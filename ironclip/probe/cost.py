"""What a probe costs: forwards of the tower as the one unit, and how many there can be before it is begun."""

from __future__ import annotations

from typing import Any, NamedTuple

from ironclip.attacks import APGD, APGDT, FAB, FGSM, PGD, Attack, AutoAttack, Square, ThreatModel
from ironclip.attacks.eight_bit import holds_another
from ironclip.defences import Defence
from ironclip.probe.options import EFFORTS, ProbeOptions
from ironclip.probe.radii import most_radii
from ironclip.probe.target import UNSEEN


class Queries(NamedTuple):
    """Queries that an attack makes about one picture at most: with a gradient, and without."""

    gradients: int
    forwards: int

    @property
    def all(self) -> int:
        """All of them."""
        return self.gradients + self.forwards


def passes(defence: Defence, forwards: int, gradients: int) -> int:
    """Forwards of the tower that decisions are worth: a backward through a view is two; a gradient's forward counts."""
    return defence.cost * forwards + 2 * defence.view_count * gradients


def queries_of(attack: Attack) -> Queries:
    """What an attack asks about one picture at most, where nothing fools."""
    if isinstance(attack, AutoAttack):
        parts = [queries_of(part) for part in attack.parts]
        return Queries(sum(part.gradients for part in parts), sum(part.forwards for part in parts))
    if isinstance(attack, APGD):
        return Queries(attack.restarts * (attack.iterations + 1), int(attack.loss == "dlr"))
    if isinstance(attack, APGDT):
        return Queries(attack.restarts * attack.classes * (attack.iterations + 1), 1)
    if isinstance(attack, FAB):
        # After each step there may be one back towards the picture, whose point is asked about too.
        return Queries(attack.restarts * attack.classes * (2 * attack.iterations + 1), 1)
    if isinstance(attack, Square):
        return Queries(0, attack.restarts * attack.queries)
    if isinstance(attack, PGD):
        return Queries(attack.restarts * attack.iterations, attack.restarts * int(attack.keep == "best"))
    if isinstance(attack, FGSM):
        return Queries(1, 1)
    raise TypeError(f"nobody has said what {attack.name} asks at most")


def estimate(
    options: ProbeOptions, defence: Defence, *, targeted: bool, vector: bool, lanes: int = 1
) -> dict[str, Any]:
    """What a probe may cost at most, before it is begun: its budget, or all that there is to ask if that is less.

    That nothing fools the attack until its end at any radius is the dearest; and that it thinks at each query that it
    has, so that the served decision is asked too. A budget may be exceeded by the round of queries that uses it up.

    Args:
        options: how.
        defence: that is attacked through.
        targeted, vector: as `ProbeOptions.attacks`.
        lanes: radii that a search tries at the same time, see `lanes_for`.
    """
    parts = [queries_of(attack) for attack, _ in options.attacks(targeted=targeted, vector=vector)]
    each = Queries(sum(part.gradients for part in parts), sum(part.forwards for part in parts))
    square = options.black_box if not (targeted or vector) else None
    beside = square.queries if square is not None else 0
    fresh = options.draws == "fresh" and defence.random
    draws, judges = (EFFORTS[options.effort].draws, len(UNSEEN)) if fresh else (1, 1)
    radii = most_radii(options, lanes)
    # Where there is no other picture of 8 bits, the one that there is is asked about once.
    alone = sum(not holds_another(ThreatModel(options.norm, eps * options.scale)) for eps in set(options.eps))
    gradients = draws * (radii - alone) * each.gradients
    asked = (radii - alone) * each.all + alone + beside
    one = passes(defence, 1, 1)
    whole = passes(defence, (draws + judges) * asked + 2, gradients)  # and the picture as it is, twice
    return {
        "gradients_at_most": min(options.budget, gradients),
        "tower_passes_at_most": min(options.budget * one, whole),
        "seconds_at_most": options.seconds,
        "tower_passes_per_gradient": one,
        "radii_at_most": radii,
        "draws_a_step": draws,
        "steps_a_radius_at_most": each.all,
        "black_box_queries_at_most": beside,
    }
