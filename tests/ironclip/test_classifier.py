"""Classifier: CLIP's zero-shot decision, differentiable at every level."""

from __future__ import annotations

import pytest
import torch

from ironclip.classifier import Classifier, predict
from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError, TreeError
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet, build_text_bank

TREE = {"levels": ["name", "kind"], "parents": {"dog": "animal", "cat": "animal", "oak": "plant", "fern": "plant"}}
LABELS = LabelSet.parse(["dog", "oak", "cat", "fern"])
OTHER = {"parents": {"dog": "big", "oak": "big", "cat": "small", "fern": "small"}, "levels": ["name", "size"]}


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_equals_plain_clip(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    classifier = Classifier(tiny_encoder, LABELS)
    model = tiny_encoder.model
    text = model.encode_text(tiny_encoder.tokenizer([f"a photo of a {n}." for n in LABELS.names]), normalize=True)
    normalised = (pixels - tiny_encoder.mean) / tiny_encoder.std
    image = model.encode_image(normalised, normalize=True)
    torch.testing.assert_close(classifier(pixels), model.logit_scale.exp() * image @ text.T, atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_pixels_through_every_level(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    for mode in ("rollup", "prompts"):
        classifier = Classifier(tiny_encoder, LABELS, tree=LabelTree.parse(TREE), levels=mode)
        for name in ("name", "kind"):
            point = pixels.clone().requires_grad_(True)
            decision = classifier.judge(classifier.encode(point))
            decision.levels[name].log_softmax(-1)[:, 0].sum().backward()
            assert point.grad is not None
            assert (point.grad.flatten(1).abs().sum(1) > 0).all()


def test_rollup_and_prompts_score_the_same_nodes(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    tree = LabelTree.parse(TREE)
    rollup = predict(Classifier(tiny_encoder, LABELS, tree=tree), pixels)
    prompts = predict(Classifier(tiny_encoder, LABELS, tree=tree, levels="prompts"), pixels)
    assert rollup.levels["kind"].shape == prompts.levels["kind"].shape == (6, 2)
    torch.testing.assert_close(
        rollup.levels["kind"].softmax(-1)[:, 0], rollup.logits.softmax(-1)[:, [0, 2]].sum(-1), atol=1e-5, rtol=1e-4
    )
    kinds = Classifier(tiny_encoder, LabelSet.parse(["animal", "plant"]))
    torch.testing.assert_close(prompts.levels["kind"], predict(kinds, pixels).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prompts.levels["name"], prompts.logits)


def test_nodes_may_bring_their_own_prompts(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    tree = LabelTree.parse({**TREE, "prompts": {"animal": ["a living beast"]}})
    got = predict(Classifier(tiny_encoder, LABELS, tree=tree, levels="prompts"), pixels).levels["kind"]
    expected = Classifier(tiny_encoder, LabelSet.parse([{"name": "animal", "prompts": ["a living beast"]}, "plant"]))
    torch.testing.assert_close(got, predict(expected, pixels).logits, atol=1e-4, rtol=1e-4)


def test_several_trees_over_the_same_labels(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    trees = {"kinds": LabelTree.parse(TREE), "sizes": LabelTree.parse(OTHER)}
    decision = predict(Classifier(tiny_encoder, LABELS, tree=trees), pixels)
    assert list(decision.levels) == ["kinds/name", "kinds/kind", "sizes/name", "sizes/size"]
    p = decision.logits.softmax(-1)
    torch.testing.assert_close(
        decision.levels["sizes/size"].softmax(-1)[:, 0], p[:, [0, 1]].sum(-1), atol=1e-5, rtol=1e-4
    )


def test_given_banks_are_used(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    bank = build_text_bank(tiny_encoder, LABELS)
    torch.testing.assert_close(Classifier(tiny_encoder, LABELS, bank)(pixels), Classifier(tiny_encoder, LABELS)(pixels))


def test_batching_does_not_change_the_answer(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    classifier = Classifier(tiny_encoder, LABELS, tree=LabelTree.parse(TREE))
    one, two = predict(classifier, pixels), predict(classifier, pixels, batch_size=2)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-4, rtol=1e-4)
    as_bytes = (pixels * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        predict(classifier, as_bytes).logits, predict(classifier, as_bytes.float() / 255).logits, atol=1e-4, rtol=1e-4
    )


def test_wrong_options_list_what_exists(tiny_encoder: Encoder) -> None:
    with pytest.raises(OptionError, match="none"):
        make_defence("magic")
    with pytest.raises(OptionError, match="strength"):
        make_defence("none", {"strength": 3})
    with pytest.raises(OptionError, match="rollup, prompts"):
        Classifier(tiny_encoder, LABELS, tree=LabelTree.parse(TREE), levels="sideways")  # type: ignore[arg-type]
    with pytest.raises(TreeError, match="'oak'"):
        Classifier(tiny_encoder, LABELS, tree=LabelTree.parse("dog animal\ncat animal"))
