"""Cells of an evaluation: what they count, that they resume, and that doubtful numbers are marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ironclip.attacks import ThreatModel
from ironclip.classifier import Classifier, predict
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from service.__main__ import main as service_main
from training.__main__ import main
from training.checkpoint import CheckpointError
from training.emoji.pictures import manifest_names, read_manifest
from training.evaluate import TEMPLATES, emoji_classifier, emoji_sample
from training.gates import check, worst_case
from training.robustness import (
    FOOLED,
    HELD,
    WRONG,
    Cell,
    Sample,
    fixed_sample,
    measure,
    measure_all,
    wilson,
)

NAMES = ["carrot", "kale", "cat", "dog", "rocket"]
TREE = {"levels": ["name", "kind"], "parents": dict(zip(NAMES, ["plant", "plant", "pet", "pet", "thing"], strict=True))}
PGD = Cell("pgd", ThreatModel("linf", 20 / 255), {"iterations": 5})


@pytest.fixture
def classifier(tiny_encoder: Encoder) -> Classifier:
    return Classifier(tiny_encoder, LabelSet.parse(NAMES), tree=LabelTree.parse(TREE))


@pytest.fixture
def sample(classifier: Classifier) -> Sample:
    """Twenty pictures, the first four with a label that the encoder does not give them."""
    pixels = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = predict(classifier, pixels).logits.argmax(1)
    labels[:4] = (labels[:4] + 1) % len(NAMES)
    return Sample("noise", pixels, labels)


def test_what_does_not_fit_is_attacked_in_smaller_parts(
    classifier: Classifier, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(classifier, sample, PGD, tmp_path / "whole.json")
    encode, sizes = classifier.encoder.encode_image, []

    def small(pixels: Tensor) -> Tensor:
        sizes.append(len(pixels))
        if len(pixels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(pixels)

    monkeypatch.setattr(classifier.encoder, "encode_image", small)
    said: list[str] = []
    parts = measure(classifier, sample, PGD, tmp_path / "parts.json", batch_size=20, progress=said.append)
    assert parts["outcomes"] == whole["outcomes"]
    assert sizes[:3] == [20, 10, 5]
    assert said[0] == "out of memory: 10 pictures at a time from here"
    assert parts["encoder"]["device"] == "cpu"
    assert parts["commit"]


def test_it_counts_what_is_right_and_what_holds(classifier: Classifier, sample: Sample, tmp_path: Path) -> None:
    none = measure(classifier, sample, Cell("pgd", ThreatModel("linf", 0.0)), tmp_path / "none.json")
    assert none["outcomes"] == WRONG * 4 + HELD * 16
    assert none["clean"] == none["robust"] == 80.0
    result = measure(classifier, sample, PGD, tmp_path / "pgd.json", batch_size=7)
    outcomes = result["outcomes"]
    assert outcomes[:4] == WRONG * 4
    assert outcomes.count(FOOLED) > 0
    assert result["robust"] == 5 * outcomes.count(HELD)
    low, high = result["robust_interval"]
    assert low <= result["robust"] <= high
    assert json.loads((tmp_path / "pgd.json").read_text(encoding="utf-8")) == result
    assert not (tmp_path / "pgd.partial.json").exists()
    kind = measure(classifier, sample, Cell("pgd", PGD.threat, PGD.options, "kind"), tmp_path / "kind.json")
    assert kind["robust"] >= result["robust"]
    assert kind["outcomes"][0] in {WRONG, HELD, FOOLED}
    with pytest.raises(OptionError, match="has: name, kind"):
        measure(classifier, sample, Cell("pgd", PGD.threat, level="family"), tmp_path / "no.json")


def test_autoattack_goes_on_from_its_ensemble_as_if_in_one_piece(
    classifier: Classifier, sample: Sample, tmp_path: Path
) -> None:
    options = {"iterations": 3, "queries": 30, "classes": 2}
    cell = Cell("autoattack", ThreatModel("linf", 10 / 255), options)
    whole = measure(classifier, sample, cell, tmp_path / "whole.json")
    assert {WRONG, FOOLED, HELD} == set(whole["outcomes"])
    (parted,) = measure_all(classifier, sample, tmp_path / "parts", ["autoattack"], [10], options=options)
    ensemble = json.loads(next((tmp_path / "parts").glob("noise-autoattack-ensemble-*.json")).read_text("utf-8"))
    assert whole["forwards"] > ensemble["forwards"] + 12 * 30  # FAB's and Square's on what stood
    assert parted["outcomes"] == whole["outcomes"]
    assert (parted["attack"], parted["key"]) == ("autoattack", whole["key"])
    assert (parted["backwards"], parted["blind"]) == (whole["backwards"], whole["blind"])
    assert parted["seconds"] > ensemble["seconds"]
    with pytest.raises(OptionError, match="goes on from no such cell"):
        measure(classifier, sample, PGD, tmp_path / "other.json", after=ensemble)


def test_a_stopped_cell_goes_on_and_a_finished_one_is_kept(
    classifier: Classifier, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure(classifier, sample, PGD, tmp_path / "whole.json", batch_size=6)
    said: list[str] = []

    def stop_at_the_second(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    path = tmp_path / "cell.json"
    with pytest.raises(KeyboardInterrupt):
        measure(classifier, sample, PGD, path, batch_size=6, progress=stop_at_the_second)
    assert not path.exists()
    measure(classifier, sample, PGD, path, batch_size=6, progress=said.append)
    assert [line.split(":")[1].split(",")[0].strip() for line in said] == ["6/20", "12/20", "18/20", "20/20"]
    found = json.loads(path.read_text(encoding="utf-8"))
    for part in ("outcomes", "forwards", "backwards", "robust"):
        assert found[part] == whole[part], part
    measure(classifier, sample, PGD, path, progress=said.append)
    assert len(said) == 4
    other = Cell("pgd", ThreatModel("linf", 2 / 255), PGD.options)
    with pytest.raises(CheckpointError, match="another encoder, sample or attack"):
        measure(classifier, sample, other, path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="remove it"):
        measure(classifier, sample, PGD, path)


def test_nobody_right_is_no_error(classifier: Classifier, sample: Sample, tmp_path: Path) -> None:
    result = measure(classifier, Sample("four", sample.pixels[:4], sample.labels[:4]), PGD, tmp_path / "cell.json")
    assert result["outcomes"] == WRONG * 4
    assert result["robust"] == 0


class Pictures:
    classes: Sequence[str] = NAMES
    labels = torch.arange(50) % 5

    def __len__(self) -> int:
        return 50

    def images(self, indices: Sequence[int]) -> Tensor:
        return torch.tensor(indices).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 255


def test_a_sample_is_fixed_by_its_seed() -> None:
    keep = torch.tensor([True, True, False, True, True])
    first, again, other = (fixed_sample("p", Pictures(), 12, seed=seed, keep=keep) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    drawn = first.pixels[:, 0, 0, 0].long()
    assert torch.equal(drawn, drawn.sort().values)
    assert torch.equal(drawn % 5, first.labels)
    assert not (first.labels == 2).any()
    assert len(fixed_sample("p", Pictures(), 1000).labels) == 50


def test_wilson_intervals() -> None:
    low, high = wilson(200, 1000)
    assert low == pytest.approx(17.64, abs=0.02)  # by the formula, worked out apart
    assert high == pytest.approx(22.59, abs=0.02)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(100)
    assert wilson(0, 0) == (0.0, 100.0)


def made(attack: str, eps: float, outcomes: str, **more: Any) -> dict[str, Any]:
    threat = {"norm": "linf", "eps": eps / 255, "label": f"linf {eps}/255"}
    robust = 100 * outcomes.count(HELD) / len(outcomes)
    blank = {"attack": attack, "options": {}, "level": "", "threat": threat, "robust": robust, "unreliable": []}
    return {**blank, "outcomes": outcomes, **more}


def test_doubtful_numbers_are_marked() -> None:
    sound = [made("pgd", 2, "ooox" * 25), made("pgd", 4, "ooxx" * 25), made("autoattack", 4, "oxxx" * 25)]
    assert check(sound) == []
    assert worst_case(sound) == "oxxx" * 25
    assert check([*sound, made("pgd", 8, "ooox" * 25)]) == [
        "pgd at linf 8/255 leaves more standing than pgd at linf 4/255"
    ]
    assert check([made("pgd", 16, "oxxx" * 25)]) == ["pgd at linf 16/255: 25.0 % hold, more than 1 %"]
    assert check([sound[1], made("autoattack", 4, "xxoo" * 25)]) == [
        "autoattack at linf 4/255 left 50 pictures standing that pgd at linf 4/255 fells"
    ]
    more = made("pgd", 4, "ooxx" * 25, options={"iterations": 100})
    assert check([made("pgd", 4, "oxxx" * 25), more]) == [
        "pgd iterations=100 at linf 4/255 leaves more standing than pgd at linf 4/255"
    ]
    assert check([made("apgd-ce", 4, "ooxx" * 25), made("square", 4, "oxxx" * 25)]) == [
        "apgd-ce at linf 4/255 leaves more standing than square at linf 4/255, which sees no gradient"
    ]
    assert check([made("square", 4, "ooox" * 25), made("cw", 4, "ooxx" * 25)]) == []
    assert check([made("pgd", 2, "oo", unreliable=["blind"])]) == ["pgd at linf 2/255: blind"]


def test_masked_gradients_are_reported(classifier: Classifier, sample: Sample, tmp_path: Path) -> None:
    class Rounded(Classifier):
        def encode(self, pixels: Tensor) -> Tensor:
            return super().encode((pixels * 16).round() / 16 + 0 * pixels)

    masked = Rounded(classifier.encoder, classifier.label_set)
    labels = predict(masked, sample.pixels).logits.argmax(1)
    result = measure(masked, Sample("noise", sample.pixels, labels), PGD, tmp_path / "cell.json")
    assert "20 pictures had no gradient" in result["unreliable"][0]
    options = {"iterations": 2, "queries": 5, "classes": 2}
    whole = Cell("autoattack", ThreatModel("linf", 1 / 255), options)
    blind = measure(masked, Sample("noise", sample.pixels, labels), whole, tmp_path / "whole.json")["blind"]
    (parted,) = measure_all(
        masked, Sample("noise", sample.pixels, labels), tmp_path, ["autoattack"], [1], options=options
    )
    assert parted["blind"] == blind == list(range(20))


def test_the_command_attacks_resumes_and_names_what_it_did(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--encoder", "demo", "--data", str(demo_data), "--results", str(tmp_path), "--count", "4"]
    command += ["--attack", "pgd", "--eps", "1", "16", "--set", "iterations=3"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "linf 1/255" in table
    results = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("other-pgd-*.json")]
    assert len(results) == 2
    for result in results:
        assert result["options"] == {"iterations": 3}
        assert result["sample"]["pictures"] == 4
        assert 0 <= result["robust"] <= result["clean"]
    assert main(command) == 0
    again = capsys.readouterr().out
    assert "left" not in again  # no cell was computed anew
    assert again.splitlines() == [line for line in table.splitlines() if "min left" not in line]
    served = ["--level", "subgroup", "--mode", "prompts", "--head", "cosine", "--dtype", "bfloat16"]
    assert main([*command, *served]) == 0
    found = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("other-pgd-*.json")]
    of_level = [result for result in found if result["level"]]
    assert len(of_level) == 2
    for result in of_level:
        assert (result["level"], result["mode"]) == ("subgroup", "prompts")
        assert {part: result["encoder"][part] for part in ("dtype", "form", "head")} == {
            "dtype": "bfloat16",
            "form": "served",
            "head": "cosine",
        }
    capsys.readouterr()
    assert main([*command, "--level", "kingdom"]) == 1
    assert "the classifier has: name, subgroup, group" in capsys.readouterr().err
    assert main([*command[:-1], "iteration=3"]) == 1
    assert "options iterations" in capsys.readouterr().err


def test_the_probe_command_says_what_the_evaluation_found(
    demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same pictures, labels, attack and radii by both commands, as a user would hold one against the other."""
    encoder = load_encoder("demo-robust")
    manifest = read_manifest(demo_data)
    sample = emoji_sample(encoder, demo_data, "other", 6)
    classifier = emoji_classifier(encoder.served(), manifest_names(manifest))
    labels = classifier.label_set.names
    label_file = tmp_path / "labels.json"
    label_file.write_text(json.dumps({"labels": labels, "templates": TEMPLATES}), encoding="utf-8")
    radii = ["1", "16"]
    command = [
        "evaluate",
        "--encoder",
        "demo-robust",
        "--data",
        str(demo_data),
        "--results",
        str(tmp_path),
        "--count",
        "6",
    ]
    assert main([*command, "--vendors", "other", "--attack", "apgd-ce", "--eps", *radii]) == 0
    found = [json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.glob("other-apgd-ce-*.json")]
    outcomes = {round(cell["threat"]["eps"] * 255): cell["outcomes"] for cell in found}
    capsys.readouterr()
    differ = compared = broken = 0
    for number, (pixels, truth) in enumerate(zip(sample.pixels, sample.labels, strict=True)):
        picture = tmp_path / f"{number}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture)
        asked = [
            str(picture),
            "--encoder",
            "demo-robust",
            "--label-set",
            str(label_file),
            "--label",
            labels[int(truth)],
            "--eps",
            *radii,
            "--json",
        ]
        assert service_main(["probe", *asked, "--attack", "apgd-ce", "--effort", "standard"]) == 0
        answer = json.loads(capsys.readouterr().out)
        for point in answer["points"]:
            outcome = outcomes[round(point["eps"])][number]
            if outcome == WRONG:
                assert answer["clean"]["label"] != labels[int(truth)]
                continue
            compared += 1
            broken += point["broken"]
            # `evaluate` attacks floats, the probe rounds: the edge alone may tell them apart.
            differ += point["broken"] != (outcome == FOOLED)
    assert 0 < broken < compared
    assert differ <= 1
