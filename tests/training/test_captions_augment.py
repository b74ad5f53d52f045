"""Captions and their known truths; augmentation."""

from pathlib import Path

import pytest
import torch

from training.augment import AugmentConfig, augment
from training.captions import CaptionTable, singular
from training.emoji.pictures import manifest_names, read_manifest
from training.pretrain import masked_clip_loss


@pytest.fixture
def table(demo_data: Path) -> CaptionTable:
    return CaptionTable(manifest_names(read_manifest(demo_data)))


def test_a_concept_is_true_of_all_its_members(table: CaptionTable) -> None:
    members = {word: table.members[i].nonzero().flatten().tolist() for i, word in enumerate(table.words)}
    assert members["vegetable"] == [0, 1]
    assert members["vegetables"] == [0, 1]
    assert members["pet"] == [4, 5]
    assert members["carrot"] == [0]
    assert members["food and drink"] == [0, 1, 2, 3]


def test_every_caption_is_true_of_its_own_picture(table: CaptionTable) -> None:
    names = torch.arange(7).repeat(8)
    for kind in range(5):
        weights = [float(kind == k) for k in range(5)]
        captions = table.draw(names, weights, torch.Generator().manual_seed(kind))
        truths = table.truths(captions, names)
        assert truths.shape == (56, 56)
        assert truths.diagonal().all()


def test_captions_depend_on_the_generator_alone(table: CaptionTable) -> None:
    draws = [table.draw(torch.arange(7), (1, 1, 1, 1, 1), torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_known_truths_beside_the_diagonal_cost_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 4, requires_grad=True)
    truths = torch.eye(4, dtype=torch.bool)
    truths[0, 1] = True
    masked_clip_loss(logits, truths).backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert (logits.grad != 0).sum() == 15


def test_without_known_truths_it_is_the_clip_loss() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(5, 5), torch.arange(5)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    assert torch.allclose(masked_clip_loss(logits, torch.eye(5, dtype=torch.bool)), expected)


def test_singular() -> None:
    assert [singular(word) for word in ("bugs", "families", "dress", "boats and ships")] == [
        "bug",
        "family",
        "dress",
        "boats and ship",
    ]


def test_augmentation_stays_in_range_and_follows_its_generator() -> None:
    rgba = torch.randint(0, 256, (16, 32, 32, 4), dtype=torch.uint8)
    everything = AugmentConfig(gray=1.0, lines=1.0, background=1.0, noise=1.0, blur=1.0, erase=1.0)
    for config in (AugmentConfig(), everything):
        views = [augment(rgba, 24, config, torch.Generator().manual_seed(1)) for _ in range(2)]
        assert views[0].shape == (16, 3, 24, 24)
        assert views[0].min() >= 0
        assert views[0].max() <= 1
        assert torch.equal(*views)


def test_no_augmentation_is_the_art_on_white() -> None:
    nothing = AugmentConfig((1.0, 1.0), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rgba = torch.zeros(2, 32, 32, 4, dtype=torch.uint8)
    rgba[1] = torch.tensor([255, 0, 0, 255])
    view = augment(rgba, 32, nothing, torch.Generator().manual_seed(0))
    assert torch.allclose(view[0], torch.ones(3, 32, 32))
    assert torch.allclose(view[1, :, 16, 16], torch.tensor([1.0, 0.0, 0.0]))
