"""What a robust-training run sees: orders of indices, shares of ranks, folders, torchvision sets and shards."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from PIL import Image

from ironclip.errors import InputError, OptionError
from ironclip.labels import LabelSet
from ironclip.preprocessing import Preprocessing
from tests.training.robust_world import PREPROCESS
from training.augment import AugmentConfig
from training.shards import ShardImages
from training.sources import (
    DataConfig,
    EmojiSource,
    PlainSource,
    batch_indices,
    make_source,
    parent_batch,
    parents_of,
    step_batches,
)

PREPROCESSING = Preprocessing.from_open_clip(PREPROCESS)


def _jpeg(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three pictures, each of its own shade."""
    for number in range(6):
        path = tmp_path / "images" / ("cat" if number % 2 else "big_dog") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_jpeg((40 * number, 10, 10)))
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards as the webdataset library writes them."""
    out = tmp_path / "shards"
    out.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(out / f"{shard:04}.tar")) as writer:
            for number in range(3 * shard, 3 * shard + 3):
                label = {"json": {"label": number % 2}} if shard else {"cls": number % 2}
                writer.write({"__key__": f"a.b/{number:03}", "jpg": _jpeg((40 * number, 10, 10)), **label})
    (out / "classes.json").write_text(json.dumps(["big dog", "cat"]), encoding="utf-8")
    return out


def test_an_epoch_shows_every_picture_once_and_another_order_follows(folder: Path) -> None:
    source = make_source(DataConfig("folder", str(folder)), PREPROCESSING)
    assert source.classes == ["big dog", "cat"]
    assert source.fixed
    first = torch.cat([batch_indices(source, step, 2, 0) for step in range(3)])
    second = torch.cat([batch_indices(source, step, 2, 0) for step in range(3, 6)])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(6))
    assert first.tolist() != second.tolist()
    # A batch across the end of an epoch takes the rest from the next one.
    assert batch_indices(source, 1, 4, 0).tolist() == [*first[4:].tolist(), *second[:2].tolist()]
    assert len(batch_indices(source, 0, 15, 0)) == 15


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_at_any_step_and_ranks_share_a_batch(folder: Path, workers: int) -> None:
    source = make_source(DataConfig("folder", str(folder)), PREPROCESSING)
    straight = list(step_batches(source, range(4), 4, seed=3))
    resumed = list(step_batches(source, range(2, 4), 4, seed=3, config=DataConfig(workers=workers)))
    for ours, theirs in zip(straight[2:], resumed, strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.labels, theirs.labels)
    halves = [next(iter(step_batches(source, range(1), 4, seed=3, rank=rank, ranks=2))) for rank in range(2)]
    assert torch.equal(torch.cat([half.pixels for half in halves]), straight[0].pixels)
    assert torch.cat([half.positions for half in halves]).tolist() == [0, 1, 2, 3]
    with pytest.raises(OptionError, match="cannot be split among 3"):
        step_batches(source, range(1), 4, seed=0, ranks=3)


def test_shards_hold_what_the_folder_holds(folder: Path, shards: Path) -> None:
    plain = make_source(DataConfig("folder", str(folder)), PREPROCESSING)
    packed = make_source(DataConfig("shards", str(shards)), PREPROCESSING)
    assert list(packed.classes) == list(plain.classes)
    assert packed.labels.tolist() == [0, 1, 0, 1, 0, 1]
    generator = torch.Generator()
    one = packed.pixels(torch.tensor([4, 1]), generator)
    two = plain.pixels(torch.tensor([2, 3]), generator)  # by class: dogs 0, 2, 4, then cats 1, 3, 5
    assert torch.equal(one, two)


def test_broken_shards_say_where(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no shard"):
        ShardImages(tmp_path, PREPROCESSING)
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        entry = tarfile.TarInfo("x.jpg")
        entry.size = len(_jpeg((1, 2, 3)))
        archive.addfile(entry, io.BytesIO(_jpeg((1, 2, 3))))
    with pytest.raises(InputError, match=r"0\.tar: the sample '/x' has no label"):
        ShardImages(tmp_path, PREPROCESSING)


def test_torchvision_sets_and_class_names(tmp_path: Path, folder: Path) -> None:
    options = {"size": 4, "num_classes": 3, "image_size": [3, 40, 40]}
    source = make_source(DataConfig("torchvision", str(folder), dataset="ImageFolder"), PREPROCESSING)
    assert isinstance(source, PlainSource)
    assert source.pixels(torch.tensor([0]), torch.Generator()).shape == (1, 3, 32, 32)
    with pytest.raises(OptionError, match="torchvision has no data set 'CIFAR11'"):
        make_source(DataConfig("torchvision", "x", dataset="CIFAR11", options=options), PREPROCESSING)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"cat": "a cat", "big_dog": "a dog"}), encoding="utf-8")
    named = make_source(DataConfig("folder", str(folder), classes=str(names)), PREPROCESSING)
    assert named.classes == ["a dog", "a cat"]
    names.write_text(json.dumps({"cat": "a cat"}), encoding="utf-8")
    with pytest.raises(InputError, match="names no class 'big_dog'"):
        make_source(DataConfig("folder", str(folder), classes=str(names)), PREPROCESSING)
    with pytest.raises(InputError, match="names 1000 classes, the data has 2"):
        make_source(DataConfig("folder", str(folder), classes="imagenet"), PREPROCESSING)


def test_emoji_art_is_fixed_only_without_augmentation(demo_data: Path) -> None:
    plain = EmojiSource(DataConfig(path=str(demo_data)), PREPROCESSING)
    views = EmojiSource(DataConfig(path=str(demo_data), augment=AugmentConfig()), PREPROCESSING)
    assert plain.fixed
    assert not views.fixed
    chosen = torch.tensor([0, 3])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1, 2)]
    assert torch.equal(plain.pixels(chosen, generators[0]), plain.pixels(chosen, generators[1]))
    assert not torch.equal(views.pixels(chosen, generators[2]), views.pixels(chosen, generators[3]))
    pixels, labels = views.probe(4, 0)
    assert pixels.shape == (4, 3, 32, 32)
    assert len(labels) == 4


def test_batches_of_families_hold_several_pictures_of_each_parent(demo_data: Path, tmp_path: Path) -> None:
    names = json.loads((demo_data / "manifest.json").read_text(encoding="utf-8"))["names"]
    tree = tmp_path / "tree.json"
    tree.write_text(json.dumps({"parents": {name["label"]: name["subgroup"] for name in names}}), encoding="utf-8")
    config = DataConfig(path=str(demo_data), tree=str(tree), per_parent=2)
    source = make_source(config, PREPROCESSING)
    families = parents_of(config, source)
    assert families is not None
    seen = set()
    for batch in step_batches(source, range(20), 4, seed=1, config=config):
        counts = torch.bincount(families[batch.indices])
        assert sorted(counts[counts > 0].tolist()) == [2, 2]
        assert len(set(batch.indices.tolist())) == 4
        seen |= set(families[batch.indices].tolist())
    assert seen == set(families.tolist())
    with pytest.raises(InputError, match=r"data\.per_parent needs data\.tree"):
        parents_of(DataConfig(per_parent=2), source)


def test_imagenet_calls_no_two_classes_alike(tmp_path: Path) -> None:
    """Its names hold two pairs of the same words, and a label set has each once."""
    for number in range(1000):
        folder = tmp_path / f"n{number:08d}"
        folder.mkdir()
        Image.new("RGB", (4, 4), (number % 256, 0, 0)).save(folder / "0.png")
    source = make_source(DataConfig(kind="folder", path=str(tmp_path), classes="imagenet"), Preprocessing(8))
    assert len(set(source.classes)) == 1000
    assert [source.classes[at] for at in (657, 744)] == ["missile", "missile 2"]
    LabelSet.parse(list(source.classes))


def test_a_batch_of_families_is_full() -> None:
    """Also where there are fewer parents than it takes at so many pictures each."""

    class Some:
        labels = torch.arange(60)
        weights = None

    source: Any = Some()
    parents = torch.arange(60) % 3
    for batch_size, most in ((6, 2), (32, 12), (60, 20)):
        batch = parent_batch(source, parents, 2, 0, batch_size, 0)
        assert len(batch) == len(set(batch.tolist())) == batch_size
        assert int(parents[batch].bincount().max()) <= most
