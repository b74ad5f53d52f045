"""Examples that others answer: they stay in the ball as 8-bit pictures, resume, and the matrices count right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ironclip.attacks import ThreatModel, make_attack
from ironclip.classifier import Classifier, predict
from ironclip.encoder import Encoder
from ironclip.errors import InputError
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from ironclip.preprocessing import Preprocessing
from tests.conftest import make_tiny_encoder
from training.__main__ import main
from training.examples import attack_all, examples, level_matrix, transfer_matrix
from training.robustness import Cell, Sample

NAMES = ["carrot", "kale", "cat", "dog", "rocket"]
KINDS = dict(zip(NAMES, ["plant", "plant", "pet", "pet", "thing"], strict=True))
TREE = LabelTree.parse({"levels": ["name", "kind"], "parents": KINDS})
CELL = Cell("pgd", ThreatModel("linf", 30 / 255), {"iterations": 10})


@pytest.fixture
def classifier(tiny_encoder: Encoder) -> Classifier:
    return Classifier(tiny_encoder, LabelSet.parse(NAMES), tree=TREE)


@pytest.fixture
def sample(classifier: Classifier) -> Sample:
    """Sixteen pictures, the first two with a label that the encoder does not give them."""
    pixels = torch.randint(0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = predict(classifier, pixels).logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % len(NAMES)
    return Sample("noise", pixels, labels)


def test_examples_are_8_bit_pictures_inside_the_ball_and_resume(
    classifier: Classifier, sample: Sample, tmp_path: Path
) -> None:
    whole = examples(classifier, sample, CELL, tmp_path / "whole", batch_size=5)
    moved = (whole.int() - sample.pixels.int()).abs()
    assert moved.max() == 30
    assert torch.equal(whole[:2], sample.pixels[:2])  # wrong as they are
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examples(classifier, sample, CELL, tmp_path / "parts", batch_size=5, progress=stop)
    assert torch.equal(examples(classifier, sample, CELL, tmp_path / "parts", batch_size=5), whole)
    again: list[str] = []
    assert torch.equal(examples(classifier, sample, CELL, tmp_path / "whole", progress=again.append), whole)
    assert again == []


@pytest.mark.parametrize("cell", [CELL, Cell("pgd", ThreatModel("linf", 30 / 255), {"iterations": 10, "keep": "last"})])
def test_examples_for_others_take_all_steps(classifier: Classifier, sample: Sample, cell: Cell, tmp_path: Path) -> None:
    """Where a picture first fools its maker is just across that one's boundary, from where little carries over."""
    images, labels, asked = sample.pixels.float() / 255, sample.labels, list[int]()

    def model(pixels: torch.Tensor) -> torch.Tensor:
        asked.append(len(pixels) if pixels.requires_grad else 0)
        return classifier(pixels)

    keys = torch.arange(len(labels))
    attack_all(model, images, labels, make_attack(cell.attack, cell.options), cell.threat, keys, whole=True)
    assert sum(asked) == 10 * 14  # the two that are wrong are not attacked
    made, stopped = (examples(classifier, sample, cell, tmp_path, whole=whole) for whole in (True, False))
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(classifier(one.float() / 255)[2:], labels[2:]) for one in (made, stopped)
        ]
    assert float(losses[0]) > float(losses[1])


def test_the_transfer_matrix(classifier: Classifier, sample: Sample, tmp_path: Path) -> None:
    other = Classifier(make_tiny_encoder(seed=5), LabelSet.parse(NAMES))
    found = transfer_matrix({"a": classifier, "b": other}, sample, CELL, tmp_path)
    assert found["clean"]["a"]["percent"] == pytest.approx(100 * 14 / 16)
    row = found["made_on"]["a"]
    assert row["a"]["sees"] == "white box"
    assert row["b"]["sees"] == "transfer"
    made = examples(classifier, sample, CELL, tmp_path)
    right = predict(classifier, made).logits.argmax(1) == sample.labels
    assert row["a"]["robust"]["percent"] == pytest.approx(100 * int(right.sum()) / 16)
    assert row["a"]["fooled"]["percent"] == pytest.approx(100 * (14 - int(right.sum())) / 14, abs=0.01)
    (file,) = tmp_path.glob("transfer-noise-*.json")
    assert json.loads(file.read_text(encoding="utf-8")) == found
    strange = make_tiny_encoder()
    strange.preprocessing = Preprocessing.from_open_clip({**strange.preprocess_cfg, "interpolation": "bilinear"})
    with pytest.raises(InputError, match="prepare pictures differently"):
        transfer_matrix({"a": classifier, "c": Classifier(strange, LabelSet.parse(NAMES))}, sample, CELL, tmp_path)


def test_the_matrix_of_levels(classifier: Classifier, sample: Sample, tmp_path: Path) -> None:
    found = level_matrix(classifier, TREE.bind(NAMES), sample, CELL, tmp_path)
    assert set(found["attacked"]) == {"name", "kind"}
    for level, row in found["attacked"].items():
        assert row[level]["percent"] < found["clean"][level]["percent"]
        for scored in row:
            assert found["worst"][scored]["percent"] <= row[scored]["percent"]
    assert 1.0 <= found["severity"][""] <= 2.0
    assert found["severity"]["kind"] >= found["severity"]["name"]  # an attack on the kind makes graver mistakes
    carried = found["carried"]["kind"]["kind"]
    assert carried["percent"] > 0
    assert carried["pictures"] == round(found["clean"]["kind"]["percent"] * 16 / 100)


def test_the_commands(demo_data: Path, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(demo_data), "--vendor", "other", "--results", str(tmp_path), "--count", "4"]
    pgd = ["--attack", "pgd", "--set", "iterations=2"]
    assert main(["transfer", "--encoders", str(tiny_artifact), "demo", *common, *pgd]) == 1
    assert "prepare pictures differently" in capsys.readouterr().err
    assert main(["transfer", "--encoders", str(tiny_artifact), *common, *pgd]) == 0
    assert "fooled, of those both had right" in capsys.readouterr().out
    assert main(["levels", "--encoder", str(tiny_artifact), *common, *pgd, "--mode", "rollup"]) == 0
    out = capsys.readouterr().out
    assert "| (clean) |" in out
    assert "| (worst of all) |" in out
    assert main(["levels", "--encoder", str(tiny_artifact), *common, "--attack", "nonsense"]) == 1
    assert "There is no attack 'nonsense'" in capsys.readouterr().err
