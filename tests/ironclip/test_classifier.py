"""Classifier: CLIP's zero-shot decision, differentiable at every level."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ironclip.artifact import save_artifact
from ironclip.classifier import Classifier, level_label_sets, predict
from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError, TooManyLabels, TreeError
from ironclip.head import Head
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelLimits, LabelSet
from ironclip.loading import load_encoder
from ironclip.textbank import build_text_bank
from tests.conftest import make_tiny_encoder

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
    """Built once and passed on: a bank with other weights must show in the answer."""
    tree = LabelTree.parse(TREE)
    turned = replace(bank := build_text_bank(tiny_encoder, LABELS), weights=bank.weights.flip(0))
    plain = predict(Classifier(tiny_encoder, LABELS), pixels)
    torch.testing.assert_close(Classifier(tiny_encoder, LABELS, turned)(pixels), plain.logits.flip(1))
    kinds = build_text_bank(tiny_encoder, LabelSet.parse(["animal", "plant"]))
    levels = {"kind": replace(kinds, weights=kinds.weights.flip(0))}
    given = predict(Classifier(tiny_encoder, LABELS, tree=tree, levels="prompts", level_banks=levels), pixels)
    own = predict(Classifier(tiny_encoder, LABELS, tree=tree, levels="prompts"), pixels)
    torch.testing.assert_close(given.levels["kind"], own.levels["kind"].flip(1))


def test_a_bank_of_something_else_is_refused(tiny_encoder: Encoder) -> None:
    for bank in (
        build_text_bank(tiny_encoder, LabelSet.parse(["dog", "oak", "cat", "moss"])),
        build_text_bank(make_tiny_encoder(seed=1), LABELS),
    ):
        with pytest.raises(ValueError, match="another encoder or label set"):
            Classifier(tiny_encoder, LABELS, bank)


def test_cosine_is_that_of_picture_and_label(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    decision = predict(Classifier(tiny_encoder, LABELS), pixels)
    image = tiny_encoder.encode_image(pixels)
    text = tiny_encoder.encode_text([f"a photo of a {name}." for name in LABELS.names])
    expected = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(decision.cosine, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(decision.logits, tiny_encoder.logit_scale * expected, atol=1e-4, rtol=1e-4)


def test_a_label_that_stands_for_itself_keeps_its_prompts(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    labels = LabelSet.parse(["dog", {"name": "rock", "prompts": ["a grey stone"]}])
    tree = LabelTree.parse({"parents": {"dog": "animal", "animal": "thing", "rock": "thing"}})
    got = predict(Classifier(tiny_encoder, labels, tree=tree, levels="prompts"), pixels).levels["1"]
    expected = Classifier(tiny_encoder, LabelSet.parse(["animal", {"name": "rock", "prompts": ["a grey stone"]}]))
    torch.testing.assert_close(got, predict(expected, pixels).logits, atol=1e-4, rtol=1e-4)


def test_batching_does_not_change_the_answer(tiny_encoder: Encoder, pixels: torch.Tensor) -> None:
    classifier = Classifier(tiny_encoder, LABELS, tree=LabelTree.parse(TREE))
    one, two = predict(classifier, pixels), predict(classifier, pixels, batch_size=2)
    torch.testing.assert_close(one.logits, two.logits, atol=1e-4, rtol=1e-4)
    as_bytes = (pixels * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        predict(classifier, as_bytes).logits, predict(classifier, as_bytes.float() / 255).logits, atol=1e-4, rtol=1e-4
    )


def test_wrong_options_list_what_exists(tiny_encoder: Encoder) -> None:
    for name in ("magic", 5, ["x"], None):
        with pytest.raises(OptionError, match="there are: none"):
            make_defence(name)
    for options in ({"strength": 3}, {1: 2}, [1], "abc"):
        with pytest.raises(OptionError, match="has the options"):
            make_defence("none", options)
    with pytest.raises(OptionError, match="rollup, prompts"):
        Classifier(tiny_encoder, LABELS, tree=LabelTree.parse(TREE), levels="sideways")  # type: ignore[arg-type]
    with pytest.raises(TreeError, match="'oak'"):
        Classifier(tiny_encoder, LABELS, tree=LabelTree.parse("dog animal\ncat animal"))


def test_the_prompts_of_all_levels_count_together() -> None:
    """Many trees, each within the limit, would otherwise multiply what one request has to encode."""
    names = [f"label {i}" for i in range(10)]
    labels = LabelSet.parse(names, "imagenet-7", limits=LabelLimits(texts=70))
    trees = {f"tree {i}": LabelTree.parse({"parents": {n: f"kind {n}" for n in names}}) for i in range(2)}
    assert len(level_label_sets({"one": trees["tree 0"]}, labels)) == 1
    with pytest.raises(TooManyLabels) as caught:
        level_label_sets(trees, labels)
    assert (caught.value.pointer, caught.value.limit) == ("/tree", 70)


def test_the_hyperbolic_head_decides_by_distance_in_the_ball(pixels: torch.Tensor) -> None:
    encoder = make_tiny_encoder().requires_grad_(False)
    encoder.head = Head("poincare", curvature=0.7, image_scale=0.3, text_scale=0.25, temperature=9.0)
    labels = LabelSet.parse([{"name": "dog", "prompts": ["a dog", "the hound"]}, "oak"])
    classifier = Classifier(encoder, labels, tree=LabelTree.parse({"parents": {"dog": "thing", "oak": "thing"}}))
    texts = [encoder.encode_text(prompts) for prompts in (["a dog", "the hound"], ["a photo of a oak."])]
    points = [
        torch.nn.functional.normalize(torch.nn.functional.normalize(text, dim=-1).mean(0), dim=-1)
        * text.norm(dim=-1).mean()
        for text in texts
    ]

    def ball(tangent: torch.Tensor) -> torch.Tensor:
        length = tangent.norm(dim=-1, keepdim=True)
        return torch.tanh(0.7**0.5 * length) * tangent / (0.7**0.5 * length)

    u, v = ball(0.3 * encoder.encode_image(pixels))[:, None], ball(0.25 * torch.stack(points))[None]
    rim = (1 - 0.7 * u.square().sum(-1)) * (1 - 0.7 * v.square().sum(-1))
    distance = torch.arccosh(1 + 2 * 0.7 * (u - v).square().sum(-1) / rim) / 0.7**0.5
    torch.testing.assert_close(classifier(pixels), -9.0 * distance, atol=1e-3, rtol=1e-3)
    leaf = pixels.clone().requires_grad_(True)
    decision = classifier.judge(classifier.encode(leaf))
    (gradient,) = torch.autograd.grad(decision.logits[:, 0].sum(), leaf)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert set(decision.levels) == {"0", "1"}


def test_the_head_travels_with_the_artifact(tmp_path: Path, pixels: torch.Tensor) -> None:
    encoder = make_tiny_encoder().requires_grad_(False)
    encoder.head = Head("poincare", 1.0, 0.2, 0.2, 20.0)
    again = load_encoder(str(save_artifact(encoder, tmp_path / "a", {"name": "a"}, dtype=torch.float32)))
    assert again.head == encoder.head
    torch.testing.assert_close(Classifier(again, LABELS)(pixels), Classifier(encoder, LABELS)(pixels))
