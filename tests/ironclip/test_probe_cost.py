"""What a probe may cost is said beforehand: no attack asks more, no search tries more radii."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ironclip.attacks import ATTACKS, Answer, AutoAttack, Run, ThreatModel, classification, make_attack
from ironclip.classifier import Classifier
from ironclip.defences import make_defence
from ironclip.labels import LabelSet
from ironclip.probe import ProbeOptions, Target, VectorTarget, estimate, probe
from ironclip.probe.cost import queries_of
from ironclip.probe.radii import most_radii, next_radii
from tests.conftest import make_tiny_encoder

# Options that make an attack as long as it can be, and short enough for a test.
SHORT = {"iterations": 7, "restarts": 2, "classes": 3, "queries": 9}


def asked(attack: Any, across: bool) -> tuple[int, int]:
    """Queries with and without a gradient about a picture that nothing fools, or that is across every second time."""
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run = Run(attack, classification(image, torch.zeros(1, dtype=torch.int64), ThreatModel("linf", 8 / 255)))
    counts, number = [0, 0], 0
    while run.query is not None:
        number += 1
        counts[0 if run.query.gradient else 1] += 1
        outputs = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.2]]) + 0.01 * number
        gradient: Tensor | None = torch.randn(1, 3, 8, 8) if run.query.gradient else None
        # FAB crosses beyond the radius, which breaks nothing and sends it back.
        fooled = torch.tensor([across and bool((run.query.pixels - image).abs().max() > 8 / 255 + 1e-4)])
        run.answer(Answer(torch.tensor([float(number)]), fooled, outputs, gradient))
    return counts[0], counts[1]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_asks_more_than_is_said(name: str, across: bool) -> None:
    attack = make_attack(name)
    fields = attack.__dataclass_fields__  # type: ignore[attr-defined]
    attack = replace(attack, **{field: value for field, value in SHORT.items() if field in fields})  # type: ignore[type-var]
    gradients, forwards = asked(attack, across)
    most = queries_of(attack)
    assert gradients <= most.gradients
    assert forwards <= most.forwards
    if not across and not isinstance(attack, AutoAttack) and name != "fab-t":
        assert (gradients, forwards) == most


@pytest.mark.parametrize(("norm", "tops"), [("linf", (1.0, 4.0, 16.0, 16.5, 255.0)), ("l2", (1.0, 8.0))])
@pytest.mark.parametrize("lanes", [1, 8])
def test_no_search_tries_more_radii_than_is_said(norm: Any, tops: tuple[float, ...], lanes: int) -> None:
    for top in tops:
        options = ProbeOptions(norm=norm, max_eps=top, effort="thorough")  # whose Square is no stage of its own
        whole = options.top if norm == "linf" else 200
        worst = 0
        for i in range(int(whole) + 2):
            breaks = i - 0.5 if norm == "linf" else top * 1.04**-i
            low, broke, tried = 0.0, None, 0
            while radii := next_radii(norm, lanes, low, broke or options.top, closed=broke is None):
                tried += len(radii)
                broke = min((eps for eps in radii if eps >= breaks), default=broke)
                low = max((eps for eps in radii if eps < breaks), default=low)
            worst = max(worst, tried)
        most = most_radii(options, lanes)
        assert worst <= most
        assert norm == "l2" or worst == most or lanes > 1
    assert most_radii(ProbeOptions(eps=(1.0, 2.0, 2.0)), lanes) == 2


@pytest.mark.parametrize("options", [ProbeOptions(eps=(0.5, 1, 2)), ProbeOptions(attack="square", max_eps=2)])
@pytest.mark.parametrize("defence", ["none", "cola"])
def test_a_probe_keeps_to_what_it_was_said_to_cost(options: ProbeOptions, defence: str) -> None:
    made = make_defence(defence)
    classifier = Classifier(make_tiny_encoder().served(), LabelSet.parse(["dog", "cat", "cow", "horse"]), defence=made)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    options = replace(options, seconds=600)
    said = estimate(options, made, targeted=False, vector=False)
    found = probe(Target(classifier), image, options)
    assert 0 < found["cost"]["tower_passes"] <= said["tower_passes_at_most"]
    assert found["cost"]["gradients"] <= said["gradients_at_most"]
    endless = VectorTarget(classifier, cosine_below=-1.0)  # it never is: every radius is attacked to its end
    if not options.attack:
        said = estimate(options, made, targeted=False, vector=True)
        cost = probe(endless, image, options)["cost"]
        assert cost["gradients"] == said["gradients_at_most"]
        assert cost["tower_passes"] <= said["tower_passes_at_most"]
