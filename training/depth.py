"""How deep a hyperbolic head's nodes lie, and what margin pictures have there: level by level of a tree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ironclip.classifier import Classifier, text_points
from ironclip.errors import OptionError
from ironclip.hyperbolic import ball_norm
from ironclip.preprocessing import to_float
from training.robustness import Sample


def node_norms(classifier: Classifier) -> dict[str, Tensor]:
    """Level -> distance of its nodes from the middle of the ball, [nodes], from 0 to 1/sqrt(curvature).

    Raises:
        OptionError: a head that is not hyperbolic, or levels that are not scored by their own prompts.
    """
    head = classifier.encoder.head
    if head.type != "poincare" or classifier.level_mode != "prompts":
        raise OptionError("depth is asked of a poincare head with levels=prompts")
    names = list(classifier.levels)
    banks = {names[0]: classifier.bank, **classifier.level_banks}
    return {name: ball_norm(text_points(head, banks[name]), head.curvature) for name in names}


@torch.no_grad()
def margins(classifier: Classifier, pixels: Tensor, truths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Level -> logit of the true node less the best other one, [N].

    Args:
        classifier: with levels.
        pixels: uint8 [N, 3, R, R].
        truths: level -> int64 [N], the true nodes.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in truths}
    for rows in torch.split(torch.arange(len(pixels)), 256):
        features = classifier.encode(to_float(pixels[rows]).to(classifier.encoder.device))
        levels = classifier.level_logits(features, classifier.decide(features))
        for name, truth in truths.items():
            logits, target = levels[name].cpu(), truth[rows, None]
            others = logits.scatter(1, target, -torch.inf).amax(1)
            parts[name].append(logits.gather(1, target)[:, 0] - others)
    return {name: torch.cat(found) for name, found in parts.items()}


def depth_profile(classifier: Classifier, sample: Sample, attacked: Mapping[str, Tensor]) -> dict[str, Any]:
    """Norms, order, margins and robust accuracy by level.

    Args:
        classifier: with a poincare head and levels of their own prompts.
        sample: pictures.
        attacked: level -> the sample attacked at this level, uint8 [N, 3, R, R].

    Returns:
        ``levels``: name -> ``nodes``, ``norm`` (10th, 50th, 90th percentile), ``margin`` and ``margin_attacked`` (the
        same, in units of distance), ``clean``, ``robust`` (percent); ``in_order``: percent of edges whose child lies
        deeper than its parent.
    """
    norms = node_norms(classifier)
    truths = {name: level.index[sample.labels] for name, level in classifier.levels.items()}
    scale = classifier.encoder.head.temperature
    before = margins(classifier, sample.pixels, truths)
    levels: dict[str, Any] = {}
    for name in classifier.levels:
        after = margins(classifier, attacked[name], {name: truths[name]})[name]
        levels[name] = {
            "nodes": len(norms[name]),
            "norm": _percentiles(norms[name]),
            "margin": _percentiles(before[name] / scale),
            "margin_attacked": _percentiles(after / scale),
            "clean": _percent(before[name] > 0),
            "robust": _percent((before[name] > 0) & (after > 0)),
        }
    ordered = []
    names = list(classifier.levels)
    for below, above in itertools.pairwise(names):
        lower, upper = classifier.levels[below], classifier.levels[above]
        edges = torch.unique(torch.stack([lower.index, upper.index], 1), dim=0)
        own = [lower.nodes[child] == upper.nodes[parent] for child, parent in edges.tolist()]
        edges = edges[~torch.tensor(own, dtype=torch.bool)]
        ordered.append(norms[below][edges[:, 0]] > norms[above][edges[:, 1]])
    return {
        "levels": levels,
        "in_order": _percent(torch.cat(ordered)),
        "edges": int(sum(len(part) for part in ordered)),
    }


def _percentiles(values: Tensor) -> list[float]:
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    return [round(value, 4) for value in torch.quantile(values.float().cpu(), quantiles).tolist()]


def _percent(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 2) if len(hits) else 0.0
