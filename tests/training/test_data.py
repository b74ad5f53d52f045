"""The data-set interface over folders, torchvision-like sets and the demo's vendors."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ironclip.errors import InputError
from ironclip.preprocessing import Preprocessing
from training.data import FolderImages, LabelledImages, TorchvisionImages
from training.emoji.pictures import VendorImages, load_vendor, manifest_names, read_manifest

PREPROCESSING = Preprocessing(16, resize_mode="longest", fill_color=255)


def _check(images: LabelledImages, classes: list[str], labels: list[int]) -> None:
    assert list(images.classes) == classes
    assert images.labels.tolist() == labels
    assert len(images) == len(labels)
    pixels = images.images([0, len(labels) - 1])
    assert pixels.shape == (2, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_folders(tmp_path: Path) -> None:
    for name, colour in (("cat", "red"), ("dog", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10), colour).save(tmp_path / name / "a.png")
    (tmp_path / "dog" / "notes.txt").write_text("no picture", encoding="utf-8")
    _check(FolderImages(tmp_path, PREPROCESSING), ["cat", "dog"], [0, 1])
    with pytest.raises(InputError, match="no picture"):
        FolderImages(tmp_path / "cat", PREPROCESSING)


def test_torchvision_sets() -> None:
    pairs = [(Image.new("L", (20, 20), 80), 1), (Image.new("RGB", (8, 20)), 0)]

    class Pictures(list):  # type: ignore[type-arg]
        classes = ("one", "two")
        targets = (1, 0)

    _check(TorchvisionImages(Pictures(pairs), PREPROCESSING), ["one", "two"], [1, 0])
    del Pictures.targets
    assert TorchvisionImages(Pictures(pairs), PREPROCESSING).labels.tolist() == [1, 0]


def test_vendors_composite_on_white(demo_data: Path) -> None:
    manifest = read_manifest(demo_data)
    names = manifest_names(manifest)
    images = VendorImages(load_vendor(demo_data, manifest, "art")[0], names, PREPROCESSING)
    labels = images.labels.tolist()
    _check(images, [name.label for name in names], labels)
    assert sorted(labels) == list(range(7))
    circle = images.images([labels.index(0)])
    assert torch.allclose(circle[0, :, 0, 15], torch.ones(3))


def test_pictures_come_as_the_service_sees_them(tmp_path: Path) -> None:
    """16 bits of grey are scaled, not cut off, and a palette keeps its transparency."""
    (tmp_path / "a").mkdir()
    ramp = (torch.arange(32 * 32).reshape(32, 32) * 64).numpy().astype("uint16")
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30] + [0] * 762)
    palette.save(tmp_path / "a" / "1.png", transparency=0)
    Image.new("CMYK", (32, 32), (10, 200, 90, 40)).save(tmp_path / "a" / "2.jpg")
    preprocessing = Preprocessing(32)
    found = FolderImages(tmp_path, preprocessing).images([0, 1, 2])
    for at, name in enumerate(("0.png", "1.png", "2.jpg")):
        with Image.open(tmp_path / "a" / name) as picture:
            expected, _ = preprocessing(picture)
        assert torch.equal((found[at] * 255).round().to(torch.uint8), expected), name
    assert 0.4 < float(found[0].mean()) < 0.6
