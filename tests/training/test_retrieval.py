"""Retrieval under attacks on the embedding: recall counts right, and each goal does what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ironclip.attacks import ThreatModel
from ironclip.classifier import predict
from ironclip.encoder import Encoder
from ironclip.errors import InputError, OptionError
from training.__main__ import main
from training.retrieval import GOALS, Pairs, caption_classifier, read_pairs, recalls, retrieval, targets_of
from training.robustness import Cell

CAPTIONS = ("a red boat", "two dogs", "the sea at night", "a loaf of bread")
CELL = Cell("apgd", ThreatModel("linf", 16 / 255), {"iterations": 12})


def test_recall_in_both_directions() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [9.0, 1.0, 0.0], [5.0, 4.0, 6.0]])
    truth = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]).bool()
    found = recalls(logits, truth)
    assert found["image_to_text"]["1"]["percent"] == 50.0
    assert found["image_to_text"]["5"]["percent"] == 100.0
    # The first caption's own picture is third behind others, the second's is not first, the third's is.
    assert found["text_to_image"]["1"]["percent"] == pytest.approx(100 / 3, abs=0.01)


def test_targets_are_never_a_pictures_own() -> None:
    truth = torch.eye(6, 4).bool() | (torch.arange(6)[:, None] % 4 == torch.arange(4))
    for seed in range(5):
        assert not truth.gather(1, targets_of(truth, seed)[:, None]).any()
    with pytest.raises(InputError, match="not a picture's own"):
        targets_of(torch.ones(2, 2).bool(), 0)


@pytest.fixture
def pairs(tiny_encoder: Encoder) -> Pairs:
    """Noise, each picture captioned with what the encoder finds nearest (or next to that): retrieval works at first."""
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    classifier = caption_classifier(tiny_encoder, CAPTIONS)
    nearest = predict(classifier, pixels).logits.argmax(1)
    return Pairs("noise", pixels, CAPTIONS, nearest[:, None] == torch.arange(len(CAPTIONS)))


def test_each_goal_does_what_it_says(tiny_encoder: Encoder, pairs: Pairs, tmp_path: Path) -> None:
    classifier = caption_classifier(tiny_encoder, pairs.captions)
    found: dict[str, Any] = {goal: retrieval(classifier, pairs, goal, CELL, tmp_path, batch_size=5) for goal in GOALS}
    for goal, result in found.items():
        assert result["clean"]["image_to_text"]["1"]["percent"] == 100.0
        if goal != "away":
            assert result["attacked"]["image_to_text"]["1"]["percent"] < 100.0
        assert json.loads(next(tmp_path.glob("retrieval-noise-*.json")).read_text(encoding="utf-8"))
    recall = {goal: result["attacked"]["image_to_text"]["1"]["percent"] for goal, result in found.items()}
    assert recall["caption"] <= min(recall.values())
    assert found["towards"]["target"]["1"]["percent"] > 0
    assert "target" not in found["away"]
    assert len(list(tmp_path.glob("retrieval-*.json"))) == len(list(tmp_path.glob("examples-*"))) == len(GOALS)
    said: list[str] = []
    assert retrieval(classifier, pairs, "caption", CELL, tmp_path, progress=said.append) == found["caption"]
    assert said == []


def test_mistakes_are_named(tiny_encoder: Encoder, pairs: Pairs, tmp_path: Path) -> None:
    classifier = caption_classifier(tiny_encoder, pairs.captions)
    with pytest.raises(OptionError, match="chooses its own objective"):
        retrieval(classifier, pairs, "away", Cell("square", CELL.threat), tmp_path)
    with pytest.raises(OptionError, match="no goal 'up'"):
        retrieval(classifier, pairs, "up", CELL, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"there is no .*captions\.json"):
        read_pairs(tmp_path, tiny_encoder.preprocessing)


def test_a_folder_of_pairs_from_the_command_line(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(3):
        Image.effect_noise((40, 50), 60 + number).convert("RGB").save(folder / f"{number}.png")
    captions = {f"{n}.png": [CAPTIONS[n], f"picture {n}"] for n in range(3)}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    command = ["retrieval", "--encoder", str(tiny_artifact), "--pairs", str(folder), "--results", str(tmp_path / "r")]
    assert main([*command, "--goal", "towards", "--set", "iterations=2"]) == 0
    out = capsys.readouterr().out
    assert "attacked text_to_image" in out
    assert "target among the first" in out
    (folder / "1.png").unlink()
    assert main(command) == 1
    assert "'1.png' is not there" in capsys.readouterr().err
