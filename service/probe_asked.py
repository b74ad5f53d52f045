"""What a probe is asked for: its options within the limits of the server and of the key, its target, its price.

Called by the route before anything is paid, and once the labels are encoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ironclip.attacks import make_attack
from ironclip.classifier import Classifier
from ironclip.defences import Defence
from ironclip.errors import OptionError, shown
from ironclip.probe import Probe, ProbeOptions, Target, VectorTarget, position
from ironclip.probe.cost import passes, queries_of
from service.answers import Item
from service.decisions import Plan
from service.errors import RequestInvalid
from service.probe_schemas import ProbeFields
from service.rate_limits import PASS, PASSES_A_GRADIENT, Meter
from service.runtime import ServedEncoder
from service.schemas import Options
from service.settings import Settings

# A probe of a vector without a label set needs some label for its Classifier; nothing is chosen.
_NO_LABELS = ["picture"]


def probe_options(fields: ProbeFields, settings: Settings) -> ProbeOptions:
    """The library's options, within the server's limits; raises OptionError."""
    options = ProbeOptions(
        norm=fields.norm,
        eps=tuple(fields.eps or ()),
        max_eps=fields.max_eps or 0.0,
        effort=fields.effort,
        attack="" if fields.attack is None else fields.attack,
        seconds=fields.seconds,
        gradients=fields.gradients or 0,
        draws=fields.draws,
        seed=fields.seed,
    )
    limit = settings.probe_max_seconds
    if options.seconds > limit:
        raise OptionError(
            f"{options.seconds:g} seconds are asked for, at most {limit:g} are allowed here "
            "(IRONCLIP_PROBE_MAX_SECONDS).",
            pointer="/seconds",
            limit=limit,
        )
    _check_steps(options, settings.probe_max_gradients)
    return options


def _check_steps(options: ProbeOptions, limit: int) -> None:
    """Raise OptionError for an attack whose options ask for more queries about one radius than a probe may make."""
    if isinstance(options.attack, str):
        return  # what an effort makes of it ends with the budget
    steps = queries_of(make_attack(options.attack_name, options.attack_options)).all
    if steps > limit:
        raise OptionError(
            f"{shown(steps)} steps are asked for at each radius, at most {limit} are allowed here "
            "(IRONCLIP_PROBE_MAX_GRADIENTS).",
            pointer="/attack",
            limit=limit,
        )


def within_limit(options: ProbeOptions, fields: ProbeFields, defence: Defence, settings: Settings) -> ProbeOptions:
    """The same within the server's limit, which is in gradients without a defence.

    Raises:
        OptionError: the caller asks for more; an effort's own budget is made smaller instead.
    """
    limit = settings.probe_max_gradients
    each = passes(defence, 1, 1)
    most = PASSES_A_GRADIENT * limit // each
    if options.budget <= most:
        return options
    if fields.gradients:
        raise OptionError(
            f"{fields.gradients} gradients are asked for, at most {most} are allowed here"
            + (f", since each goes through a defence and takes {each} forwards" if each > PASSES_A_GRADIENT else "")
            + f" (IRONCLIP_PROBE_MAX_GRADIENTS={limit}).",
            pointer="/gradients",
            limit=most,
        )
    return replace(options, gradients=max(1, most))


def affordable(
    options: ProbeOptions, fields: ProbeFields, defence: Defence, meter: Meter, beside: float
) -> ProbeOptions:
    """The same within what the caller's key can ever have at once, less what the request costs ``beside`` the probe.

    A probe is paid for in advance: without this a key could not ask for an effort whose own budget is more. Whoever
    names a budget is told what it costs instead, where it is paid.
    """
    if not meter.limited or fields.gradients:
        return options
    most = math.floor((meter.caller.burst - beside) / PASS / passes(defence, 1, 1))
    return options if options.budget <= most else replace(options, gradients=max(1, most))


def decision_of(fields: ProbeFields, served: ServedEncoder) -> Options:
    """The classification that is attacked."""
    given = fields.model_dump(include=set(Options.model_fields) - {"top_k"}, exclude_none=True)
    if fields.objective == "embedding":
        if fields.label is not None or fields.target is not None or fields.level is not None:
            raise RequestInvalid("With objective embedding nothing is chosen: leave label, target and level out.")
        if "labels" not in given and "label_set" not in given:
            given["labels"] = _NO_LABELS
            if fields.defence is None and served.defence.reads_labels:
                given["defence"] = "none"  # as /embed has it
    elif fields.cosine_below is not None or fields.gallery is not None or fields.top_k is not None:
        raise RequestInvalid("cosine_below, gallery and top_k belong to objective embedding.")
    registered = fields.level is not None and fields.label_set is not None
    if fields.levels is None and (fields.tree is not None or registered):
        given["levels"] = "rollup"
    return Options(**given)


def attacked(
    plan: Plan,
    served: Classifier,
    attacked: Classifier,
    item: Item,
    fields: ProbeFields,
    options: ProbeOptions,
) -> tuple[Callable[[], Probe], dict[str, Any]]:
    """What makes the probe in the worker's thread, and what its answer says beside; all is checked here.

    Raises:
        IronclipError: a label, level, gallery or vector that cannot be.
    """
    encoder = plan.served.attacked
    if fields.objective == "embedding":
        target: Target = VectorTarget(
            attacked,
            served,
            cosine_below=0.5 if fields.cosine_below is None else fields.cosine_below,
            gallery=_gallery(fields, encoder.dim),
            top_k=fields.top_k or 1,
        )
        if plan.defence.reads_labels and fields.label_set is None and fields.labels is None:
            raise OptionError(
                f"The defence {plan.defence.name!r} makes a vector from labels: give labels or a label_set.",
                pointer="/label_set",
            )
    else:
        target = Target(attacked, served, level=fields.level or "")
    label = position(target.names, fields.label, "/label")
    aim = position(target.names, fields.target, "/target")
    pixels = item.pixels
    assert pixels is not None
    about = {
        "encoder": plan.encoder_form,
        "label_set": dict(plan.reference) if target.names else None,
        "level": fields.level,
        "defence": plan.defence_form,
        "preprocessing": {"digest": encoder.preprocessing.digest, "warnings": item.warnings},
    }

    def build() -> Probe:
        return Probe(target, pixels, options, label=label, target_label=aim)

    return build, about


def _gallery(fields: ProbeFields, dim: int) -> torch.Tensor | None:
    """The gallery as unit vectors [G, dim].

    Raises:
        OptionError: vectors of another length, or without one; or no more of them than top_k.
    """
    if fields.gallery is None:
        if fields.top_k is not None:
            raise RequestInvalid("top_k is of a gallery: give one.")
        return None
    rows = fields.gallery
    if len(rows) <= (fields.top_k or 1):
        raise OptionError("The gallery needs more vectors than top_k, or nothing can change.", pointer="/gallery")
    for i, row in enumerate(rows):
        if len(row) != dim:
            raise OptionError(f"A vector of {len(row)} numbers; this encoder's have {dim}.", pointer=f"/gallery/{i}")
    vectors = torch.tensor(rows, dtype=torch.float32)
    lengths = vectors.norm(dim=1, keepdim=True)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise OptionError("A vector of the gallery has no direction.", pointer="/gallery")
    unit: torch.Tensor = vectors / lengths
    return unit
