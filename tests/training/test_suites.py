"""The papers' benchmark sets, on generated folders: names, prompts, native sizes, what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
from PIL import Image

from ironclip.encoder import Encoder
from ironclip.errors import InputError, OptionError
from training.__main__ import main
from training.robustness import fixed_sample
from training.suites import NativeClassifier, SetConfig, averages, imagenet_names, load_set, load_suite, readable


def _fill(folder: Path, classes: list[str], side: int = 40) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for picture in range(2):
            noise = Image.effect_noise((side, side), 40 + 20 * number + picture).convert("RGB")
            noise.save(folder / name / f"{picture}.png")


def test_the_papers_sets_are_listed() -> None:
    fifteen = {entry.name: entry for entry in load_suite("zeroshot15")}
    fourteen = {entry.name: entry for entry in load_suite("cola14")}
    assert len(fifteen) == 15
    assert len(fourteen) == 14
    assert {"imagenet-v2", "imagenet-sketch", "imagenet-a", "imagenet-r", "imagenet"} <= set(fourteen)
    assert fifteen["oxford_pets"].template == "A photo of a {}, a type of pet."
    assert fifteen["cifar10"].native == 32
    assert len(fifteen["pcam"].prompts) == 2
    import torchvision.datasets

    for entry in (*fifteen.values(), *fourteen.values()):
        assert entry.folder or hasattr(torchvision.datasets, entry.torchvision), entry.name
    with pytest.raises(OptionError, match="known: cola14, zeroshot15"):
        load_suite("zeroshot16")


def test_class_names_are_the_papers() -> None:
    assert readable("001.ak47") == "ak47"
    assert readable("Yorkshire_Terrier") == "yorkshire terrier"
    assert readable("/a/abbey") == "a abbey"
    assert imagenet_names(["n01440764", "n02106662"]) == ["tench", IMAGENET_CLASSNAMES[235]]
    assert imagenet_names(["0", "10", "2"]) == [IMAGENET_CLASSNAMES[number] for number in (0, 10, 2)]
    with pytest.raises(InputError, match="'n99999999' is neither"):
        imagenet_names(["n99999999"])


def test_torchvisions_own_folders_are_not_taken_for_classes(tiny_encoder: Encoder, tmp_path: Path) -> None:
    """It keeps some sets in folders of the sets' own names, with other folders in them than classes."""
    entry = next(entry for entry in load_suite("zeroshot15") if entry.name == "eurosat")
    _fill(tmp_path / "eurosat" / "2750", ["AnnualCrop", "Forest", "SeaLake"])
    found = load_set(entry, tmp_path, tiny_encoder.preprocessing)
    assert found is not None
    images, names = found
    assert names == ["annualcrop", "forest", "sealake"]
    assert len(images) == 6


def test_folders_come_first_and_absent_sets_are_none(tiny_encoder: Encoder, tmp_path: Path) -> None:
    entry = SetConfig("dtd", torchvision="DTD", options={"split": "test"})
    assert load_set(entry, tmp_path, tiny_encoder.preprocessing) is None
    _fill(tmp_path / "dtd", ["honey_combed", "lined"])
    found = load_set(entry, tmp_path, tiny_encoder.preprocessing)
    assert found is not None
    images, names = found
    assert names == ["honey combed", "lined"]
    assert len(images) == 4
    with pytest.raises(OptionError, match="no data set 'Nothing'"):
        load_set(SetConfig("x", torchvision="Nothing"), tmp_path, tiny_encoder.preprocessing)


def test_pictures_of_a_native_size_are_enlarged_inside(tiny_encoder: Encoder) -> None:
    from ironclip.labels import LabelSet

    classifier = NativeClassifier(tiny_encoder, LabelSet.parse(["cat", "dog"]))
    small = torch.rand(2, 3, 16, 16, requires_grad=True)
    logits = classifier(small)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), small)
    assert gradient.shape == small.shape
    assert (gradient.abs().flatten(1).sum(1) > 0).all()
    large = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic").clamp(0, 1)
    torch.testing.assert_close(logits, classifier(large))


def test_a_suite_from_the_command_line(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fill(tmp_path / "data" / "cifar10", ["cat", "dog", "ship"], side=16)
    _fill(tmp_path / "data" / "pcam", ["0", "1"])
    _fill(tmp_path / "data" / "imagenet" / "val", ["n01440764", "n02106662"])
    command = ["evaluate", "--encoder", str(tiny_artifact), "--suite", "zeroshot15", "--root", str(tmp_path / "data")]
    command += ["--results", str(tmp_path / "r"), "--eps", "1", "--count", "3", "--set", "iterations=2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "left out: cifar100, stl10, sun397" in out
    assert "mean of 3 sets (all), pgd linf 1/255" in out
    assert "mean of 2 sets (less pcam, eurosat)" in out
    assert len(list((tmp_path / "r").glob("*.json"))) == 3
    assert main(command) == 0
    assert "min left" not in capsys.readouterr().out  # nothing is computed twice


def test_means_leave_out_what_is_near_chance() -> None:
    results = [
        {"attack": "pgd", "threat": {"label": "linf 1/255"}, "sample": {"name": name}, "clean": clean, "robust": robust}
        for name, clean, robust in (("pcam", 50.0, 48.0), ("dtd", 40.0, 20.0), ("cifar10", 80.0, 40.0))
    ]
    assert averages(results)[0].endswith(f"{170 / 3:.1f} / {108 / 3:.1f}")
    assert averages(results)[1].endswith("60.0 / 30.0")


def test_the_sample_is_the_same_for_every_encoder(tiny_encoder: Encoder, tmp_path: Path) -> None:
    _fill(tmp_path / "dtd", ["a", "b", "c"])
    found = load_set(SetConfig("dtd"), tmp_path, tiny_encoder.preprocessing)
    assert found is not None
    one, two = (fixed_sample("dtd", found[0], 3) for _ in range(2))
    assert one.digest == two.digest
