"""How easily is one decision fooled? A curve over radii, and the bracket of the smallest that breaks it.

`probe` runs one to its end. A service advances many at once: `Probe` says what it wants to know (`asks`), `pieces` and
`steps` answer that in batches, `take` goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ironclip.classifier import Classifier
from ironclip.errors import OptionError
from ironclip.probe.cost import estimate
from ironclip.probe.options import EFFORTS, ProbeOptions
from ironclip.probe.oracle import Ask, Rows, pieces, rows_for, run, steps
from ironclip.probe.radii import lanes_for
from ironclip.probe.report import adversarial, amplified, png, point, result
from ironclip.probe.search import Lane, Probe
from ironclip.probe.target import Target, VectorTarget

__all__ = [
    "EFFORTS",
    "Ask",
    "Lane",
    "Probe",
    "ProbeOptions",
    "Rows",
    "Target",
    "VectorTarget",
    "adversarial",
    "amplified",
    "estimate",
    "lanes_for",
    "pieces",
    "png",
    "point",
    "position",
    "probe",
    "result",
    "rows_for",
    "run",
    "steps",
]


def position(names: tuple[str, ...], label: str | None, pointer: str) -> int | None:
    """Where a label stands among the names; raises OptionError for one that is not among them."""
    if label is None:
        return None
    if label not in names:
        raise OptionError(
            f"{label[:60]!r} is not among the {len(names)} labels that are chosen from; write it as it stands there.",
            pointer=pointer,
        )
    return names.index(label)


def probe(
    target: Target | Classifier,
    picture: Tensor,
    options: ProbeOptions | None = None,
    *,
    label: str | None = None,
    target_label: str | None = None,
    progress: Callable[[Probe], None] | None = None,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """Attack one decision about one picture.

    Args:
        target: a Classifier (attacked and served as it is), or a Target.
        picture: uint8 [3, R, R], from the encoder's preprocessing.
        options: how; ProbeOptions() if not given.
        label: the true label; what the clean picture is answered with if not given.
        target_label: a label that must be reached; any other than the true one if not given.
        progress: told after each round of queries.
        rows: views in one batch; what suits the device if not given.

    Returns:
        See `report.result`; also `artefacts` with the adversarial picture and the amplified perturbation at
        `broken_at`, uint8 [3, R, R], where there is one.

    Raises:
        OptionError: a label that is not there, or an attack that cannot do this.
    """
    whole = target if isinstance(target, Target) else Target(target)
    options = options or ProbeOptions()
    names = whole.names
    aims = {"label": position(names, label, "/label"), "target_label": position(names, target_label, "/target")}
    started = time.monotonic()
    one = Probe(whole, picture, options, **aims)
    while not one.done:
        asked = one.asks()
        for piece in pieces([ask for _, ask in asked], rows):
            run(piece)
        one.take(asked)
        if progress is not None:
            progress(one)
        if not one.done and time.monotonic() - started > options.seconds:
            one.stop("seconds")
    found = result(one)
    found["cost"]["seconds"] = round(time.monotonic() - started, 3)
    worst = adversarial(one)
    if worst is not None:
        found["artefacts"] = {"adversarial": worst[1], "perturbation": amplified(worst[1], picture)}
    return found
