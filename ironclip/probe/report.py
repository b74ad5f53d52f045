"""What a probe has found, in words and JSON; its pictures as PNG."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ironclip.probe.search import Lane, Probe

STATEMENT = (
    "Empirical: an attack that failed is no proof that none succeeds. robust_to is what these attacks could not do, "
    "broken_at is what one of them did. It is not a certificate."
)
# Gray of no change in the picture of a perturbation.
_MIDDLE = 128


def point(probe: Probe, lane: Lane) -> dict[str, Any]:
    """One radius of the curve."""
    broken: bool | None = {"broken": True, "held": False}.get(lane.state)
    form: dict[str, Any] = {
        "eps": _short(lane.eps),
        "broken": broken,
        "state": lane.state,
        "steps": lane.steps,
        "gradients": lane.gradients,
    }
    lowest = _short(lane.lowest) if math.isfinite(lane.lowest) else None
    if probe.target.names:
        form["score_of_label"] = lowest
        if lane.said is not None:
            form |= {"label": probe.target.names[lane.said[0]], "score": _short(lane.said[1])}
    else:
        form["cosine"] = lowest
    if broken and lane.found_by:
        form["attack"] = lane.found_by
        if lane.part:
            form["part"] = lane.part
    return form


def clean(probe: Probe, *, most: int = 5) -> dict[str, Any]:
    """The decision about the picture as it is; empty for a vector."""
    if not probe.target.names:
        return {}
    names, scores, outputs = probe.target.names, probe.clean.scores(), probe.clean.outputs
    order = scores.argsort(descending=True, stable=True)[:most].tolist()
    label = probe.aim.label
    assert label is not None
    others = outputs.clone()
    others[label] = -torch.inf
    margin = _short(float(outputs[label] - others.max())) if len(outputs) > 1 else None
    return {
        "label": names[order[0]],
        "score": _short(float(scores[order[0]])),
        "margin": margin,
        "correct": probe.said == label,
        "score_of_label": _short(float(scores[label])),
        "predictions": [{"label": names[k], "score": _short(float(scores[k]))} for k in order],
    }


def warnings(probe: Probe, *, resized: bool | None = None) -> list[dict[str, str]]:
    """What makes the numbers doubtful or needs knowing, in the manner of AutoAttack's flags."""
    defence, options = probe.target.attacked.defence, probe.options
    lanes = list(probe.lanes.values())
    found: dict[str, str] = {}
    blind, asked = sum(lane.blind for lane in lanes), sum(lane.gradients for lane in lanes)
    if blind:
        found["zero-gradient"] = (
            f"{blind} of {asked} gradients were zero everywhere: something hides them from the attack, and what held "
            "may fall to another one."
        )
    if probe.black_box_won:
        found["black-box-stronger"] = (
            "Square, which sees no gradient, broke what gradients did not: they mislead here; do not trust robust_to."
        )
    if not probe.target.adaptive:
        found["transfer"] = (
            f"The attack did not see the defence that is served ({probe.target.served.defence.name!r}): what it found "
            "is transfer, and one that sees it may find more."
        )
    if probe.unsteady:
        found["random"] = (
            "The same picture was answered differently twice, though nothing was to be drawn anew: something random "
            "that is not declared is in the decision, and what held may have held by chance."
        )
    if defence.random and not probe.fresh:
        found["draws-known"] = (
            f"The defence {defence.name!r} draws; attacked were the very draws that are served (seed "
            f"{defence.options().get('seed')}). Ask with draws: fresh for a decision that draws anew each time."
        )
    if not defence.differentiable:
        found["approximate-gradient"] = (
            f"The defence {defence.name!r} has no exact gradient; the attack went around it (BPDA). A stronger one "
            "may exist."
        )
    judged = probe.target.served.defence
    if judged.optimising:
        found["optimises-at-inference"] = (
            f"The defence {judged.name!r} takes gradients of its own for each picture. Attacks that are not made for "
            "such a defence, AutoAttack's too, are known to find too little, and pictures that fool the bare encoder "
            "often fool it as well (Croce et al. 2022): do not trust robust_to."
        )
    if probe.exhausted:
        found["unfinished"] = f"The probe ended early ({probe.exhausted}): radii in state unknown were not decided."
    if any(0 < eps * options.scale * 255 < 1 for eps in options.eps):
        found["below-one-step"] = (
            "A radius below 1/255 holds no other picture of 8 bits: nothing was attacked there, and what it came to is "
            "of the picture as it is."
        )
    if resized:
        found["resized"] = (
            "The picture was resized to the encoder's pixels, which are what is perturbed: the radius is of those, not "
            "of the file that was sent."
        )
    return [{"code": code, "detail": detail} for code, detail in found.items()]


def result(probe: Probe, *, resized: bool | None = None) -> dict[str, Any]:
    """Everything that is known now, as JSON values."""
    options, names = probe.options, probe.target.names
    aim = probe.aim
    attacked = probe.target.attacked
    lanes = sorted(probe.lanes.values(), key=lambda lane: lane.eps)
    broken = probe.broken_at
    form: dict[str, Any] = {
        "status": "budget_exhausted" if probe.exhausted else "complete",
        "statement": STATEMENT,
        "objective": "label" if names else "embedding",
        "clean": clean(probe),
        "label": names[aim.label] if names and aim.label is not None else None,
        "target": names[aim.target] if names and aim.target is not None else None,
        "norm": options.norm,
        "unit": options.unit,
        "resolution": attacked.encoder.resolution,
        "points": [point(probe, lane) for lane in lanes],
        "robust_to": _short(probe.robust_to),
        "broken_at": _short(broken) if broken is not None else None,
        "effort": options.effort,
        "attack": {
            "name": options.attack_name or "+".join(_names(probe)),
            "adaptive": probe.target.adaptive,
            "draws": "fresh" if probe.fresh else "fixed",
            "seed": options.seed,
            **({"options": options.attack_options} if options.attack else {}),
        },
        "cost": {
            "gradients": probe.gradients,
            "forwards": probe.forwards,
            "confirmations": probe.confirmations,
            "views": attacked.defence.view_count,
            "tower_passes": probe.passes,
        },
        "warnings": warnings(probe, resized=resized),
    }
    return form


def adversarial(probe: Probe) -> tuple[float, Tensor] | None:
    """The smallest radius that broke it, and the picture: uint8 [3, R, R]; None where nothing did."""
    broken = probe.broken_at
    lane = probe.lanes.get(broken) if broken is not None else None
    if lane is None or lane.picture is None:
        return None
    return lane.eps, lane.picture


def png(picture: Tensor) -> bytes:
    """uint8 [3, R, R] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def amplified(picture: Tensor, original: Tensor) -> Tensor:
    """The perturbation around middle gray, its largest change at black or white: uint8 [3, R, R]."""
    delta = picture.cpu().float() - original.cpu().float()
    gain = (_MIDDLE - 1) / max(1.0, float(delta.abs().max()))
    return (delta * gain + _MIDDLE).round().clamp(0, 255).to(torch.uint8)


def _names(probe: Probe) -> list[str]:
    free, targeted = probe.target.free, probe.aim.target is not None
    names = [attack.name for attack, _ in probe.options.attacks(targeted=targeted, vector=free)]
    return list(dict.fromkeys(names))


def _short(value: float) -> float:
    return float(f"{value:.6g}")
