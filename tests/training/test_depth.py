"""Depth of a hyperbolic head's nodes, on a head whose norms and margins are known; and tables column by column."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from training.compare_report import depth_table, retrieval_table, severity_table, transfer_table
from training.depth import depth_profile, node_norms
from training.robustness import Sample

NAMES = ["carrot", "kale", "cat", "dog"]
TREE = {"levels": ["name", "kind"], "parents": dict(zip(NAMES, ["plant", "plant", "pet", "pet"], strict=True))}


class Flat(Classifier):
    """Features are the first pixels of the picture."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.flatten(1)[:, None, : self.encoder.dim] * 2


@pytest.fixture
def classifier(tiny_encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Classifier:
    monkeypatch.setattr(tiny_encoder, "head", Head("poincare", temperature=10.0))
    found = Flat(tiny_encoder, LabelSet.parse(NAMES), tree=LabelTree.parse(TREE), levels="prompts")
    # Names on four axes at tangent length 1, kinds between their children at 0.5; dog lies nearer than its kind.
    found.bank.weights.copy_(torch.eye(4, tiny_encoder.dim))
    found.bank.norms.copy_(torch.tensor([1.0, 1.0, 1.0, 0.3]))
    kinds = found.level_banks["kind"]
    kinds.weights.zero_()
    kinds.weights[0, :2] = kinds.weights[1, 2:4] = 0.5**0.5
    kinds.norms.fill_(0.5)
    return found


def test_norms_order_and_margins_are_those_of_the_ball(classifier: Classifier) -> None:
    norms = node_norms(classifier)
    assert norms["name"].tolist() == pytest.approx([math.tanh(1)] * 3 + [math.tanh(0.3)], abs=1e-5)
    assert norms["kind"].tolist() == pytest.approx([math.tanh(0.5)] * 2, abs=1e-5)
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    pixels[0, 0, 0, 0] = pixels[1, 0, 0, 2] = 128  # right on carrot, and on cat
    sample = Sample("two", pixels, torch.tensor([0, 2]))
    swapped = pixels.flip(0)
    profile = depth_profile(classifier, sample, {"name": swapped, "kind": pixels})
    assert profile["in_order"] == 75.0  # dog lies above its parent
    assert profile["edges"] == 4
    name, kind = profile["levels"]["name"], profile["levels"]["kind"]
    assert (name["clean"], name["robust"], kind["robust"]) == (100.0, 0.0, 100.0)
    # From carrot: itself at 0, the nearest other is dog at right angles, cosh d = cosh 2 cosh 0.6.
    away = 2 * (2 * 128 / 255)
    margin = math.acosh(math.cosh(away) * math.cosh(0.6)) - (away - 2)
    assert name["margin"][1] == pytest.approx(margin, abs=0.01)
    assert name["margin_attacked"][1] < -1
    assert kind["margin"][1] == kind["margin_attacked"][1] > 0


def test_depth_is_not_asked_of_another_head(tiny_encoder: Encoder) -> None:
    with pytest.raises(OptionError, match="poincare head"):
        node_norms(Classifier(tiny_encoder, LabelSet.parse(NAMES)))


def test_tables_have_each_number_in_its_place(tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")

    def recall(first: float, second: float) -> dict[str, Any]:
        return {"image_to_text": {"1": {"percent": first}}, "text_to_image": {"1": {"percent": second}}}

    for goal, attacked in (("away", recall(3, 4)), ("towards", recall(5, 6))):
        content = {"goal": goal, "clean": recall(1, 2), "attacked": attacked, "target": {"1": {"percent": 7}}}
        write(f"retrieval/tecoa-{goal}.json", content)
    table = retrieval_table(tmp_path).splitlines()
    assert [cell.strip() for cell in table[0].split("|")[2:-1]] == [
        "clean, picture to text",
        "clean, text to picture",
        "away: picture to text",
        "away: text to picture",
        "towards: picture to text",
        "towards: text to picture",
        "target comes first",
    ]
    assert table[2] == "| tecoa | " + " | ".join(f"{n}.0 %" for n in range(1, 8)) + " |"
    cell = {"robust": {"percent": 10}, "fooled": {"percent": 20}}
    made = {"a": {"a": cell, "b": {"robust": {"percent": 30}}}, "b": {"a": {"robust": {"percent": 40}}, "b": cell}}
    write("transfer.json", {"clean": {"a": {"percent": 50}, "b": {"percent": 60}}, "made_on": made})
    rows = transfer_table(tmp_path).splitlines()
    assert rows[2:] == ["| (clean) | 50.0 % | 60.0 % |", "| a | 10.0 % | 30.0 % |", "| b | 40.0 % | 10.0 % |"]
    write("levels/tecoa-rollup.json", {"severity": {"": 1.5, "name": 2.25, "kind": None}})
    assert severity_table(tmp_path, "rollup").splitlines()[2] == "| tecoa | 1.50 | 2.25 | - |"
    parts = {"norm": [0.1, 0.2, 0.3], "margin": [1, 2, 3], "margin_attacked": [-3, -2, -1]}
    write(
        "depth/hier.json",
        {"levels": {"name": {"nodes": 9, "clean": 90, "robust": 40, **parts}}, "in_order": 99.5, "edges": 12},
    )
    assert depth_table(tmp_path).splitlines()[2] == "| hier | name | 9 | 0.200 | 2.00 | -2.00 | 90.0 % | 40.0 % |"
