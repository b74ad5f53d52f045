"""Label sets: canonical form, digest, limits; text banks: the classifier weights that open_clip would make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch

from ironclip.classifier import level_label_sets
from ironclip.encoder import Encoder
from ironclip.errors import LabelError, TooManyLabels
from ironclip.hierarchy import LabelTree
from ironclip.labels import TEMPLATES, LabelLimits, LabelSet
from ironclip.textbank import build_text_bank


def test_canonical_form_is_nfc_stripped_and_ordered() -> None:
    a = LabelSet.parse([" cafe\u0301 ", "dog"])
    b = LabelSet.parse(["caf\u00e9", "dog"])
    assert a == b
    assert a.digest == b.digest
    assert LabelSet.parse(["dog", "caf\u00e9"]).digest != a.digest


def test_canonical_form_parses_back() -> None:
    one = LabelSet.parse(
        [{"name": "dog", "prompts": ["my dog"], "descriptions": ["it barks"]}, "cat", {"name": "cow"}],
        ["a {}", "the {}"],
    )
    again = LabelSet.from_json(one.canonical())
    assert again == one
    assert again.digest == one.digest
    assert one.canonical()["labels"][1:] == ["cat", "cow"]


def test_digest_sees_every_part() -> None:
    sets = [
        LabelSet.parse(["a"]),
        LabelSet.parse(["a"], ["x {}"]),
        LabelSet.parse([{"name": "a", "prompts": ["x"]}]),
        LabelSet.parse([{"name": "a", "descriptions": ["x"]}]),
    ]
    assert len({s.digest for s in sets}) == 4


@pytest.mark.parametrize(
    ("labels", "templates", "pointer"),
    [
        ([], None, "/labels"),
        ("dog", None, "/labels"),
        (None, None, "/labels"),
        (["dog", ""], None, "/labels/1"),
        (["dog", "   "], None, "/labels/1"),
        (["dog", 3], None, "/labels/1"),
        (["dog", None], None, "/labels/1"),
        (["dog", "cat", " dog"], None, "/labels/2"),
        (["caf\u00e9", "cafe\u0301"], None, "/labels/1"),
        (["nul\x00"], None, "/labels/0"),
        (["\u200b\ufeff"], None, "/labels/0"),
        (["lone\ud800"], None, "/labels/0"),
        ([{"prompts": ["x"]}], None, "/labels/0"),
        ([{"name": "x", "prompt": ["y"]}], None, "/labels/0"),
        ([{"name": "x", "prompts": "y"}], None, "/labels/0/prompts"),
        ([{"name": "x", "prompts": [""]}], None, "/labels/0/prompts/0"),
        (["x" * 1001], None, "/labels/0"),
        (["dog"], ["no place"], "/templates/0"),
        (["dog"], "no-such-list", "/templates"),
        (["dog"], 7, "/templates"),
    ],
)
def test_bad_labels_are_refused_with_a_pointer(labels: object, templates: object, pointer: str) -> None:
    with pytest.raises(LabelError) as caught:
        LabelSet.parse(labels, templates)
    assert caught.value.pointer == pointer


def test_limits() -> None:
    limits = LabelLimits(labels=3, texts_per_label=2, templates=2, texts=5)
    LabelSet.parse(["a", "b", "c"], limits=limits)
    for labels, templates in (
        (["a", "b", "c", "d"], None),
        ([{"name": "a", "prompts": ["1", "2", "3"]}], None),
        (["a"], ["1 {}", "2 {}", "3 {}"]),
        (["a", "b", "c"], ["1 {}", "2 {}"]),
    ):
        with pytest.raises(TooManyLabels) as caught:
            LabelSet.parse(labels, templates, limits=limits)
        assert caught.value.limit in (2, 3, 5)
    small = LabelSet.parse(["a", "b", "c"], limits=limits)
    with pytest.raises(TooManyLabels):
        small.with_templates(["1 {}", "2 {}"])
    with pytest.raises(TooManyLabels):
        level_label_sets(LabelTree.parse({"parents": {"a": "x"}, "prompts": {"x": list("123456")}}), _only(small, 1))


def _only(label_set: LabelSet, count: int) -> LabelSet:
    return LabelSet(label_set.labels[:count], label_set.templates, label_set.limits)


def test_prompts_come_from_the_label_the_set_or_the_encoder(tiny_encoder: Encoder) -> None:
    label_set = LabelSet.parse(["dog", {"name": "cat", "prompts": ["my cat {}"]}])
    resolved = label_set.resolve(tiny_encoder)
    assert resolved.prompts(resolved.labels[0]) == ("a photo of a dog.",)
    assert resolved.prompts(resolved.labels[1]) == ("my cat {}",)
    assert LabelSet.parse(["dog"], "emoji").prompts(LabelSet.parse(["dog"]).labels[0]) == ("an emoji of dog",)
    # A name with braces is filled in as it is, never interpreted.
    odd = LabelSet.parse(["{0.__class__}"], ["a {} b"])
    assert odd.prompts(odd.labels[0]) == ("a {0.__class__} b",)


def test_weights_are_the_usual_prompt_ensemble(tiny_encoder: Encoder) -> None:
    names = ["dog", "cat", "small house"]
    bank = build_text_bank(tiny_encoder, LabelSet.parse(names, "imagenet-7"))
    expected = open_clip.build_zero_shot_classifier(
        tiny_encoder.model,
        tiny_encoder.tokenizer,
        names,
        [lambda name, t=t: t.replace("{}", name) for t in TEMPLATES["imagenet-7"]],
    ).T
    torch.testing.assert_close(bank.weights, expected, atol=1e-5, rtol=1e-4)
    features, mask = bank.padded()
    assert features.shape == (3, 7, 32)
    assert mask.all()
    assert (bank.encoder, bank.label_set) == (tiny_encoder.digest, LabelSet.parse(names, "imagenet-7").digest)


def test_descriptions_join_the_bank_but_not_the_weights(tiny_encoder: Encoder) -> None:
    label_set = LabelSet.parse(
        [{"name": "dog", "descriptions": ["it barks", "four legs"]}, {"name": "cat", "prompts": ["a", "b"]}]
    )
    plain = build_text_bank(tiny_encoder, label_set)
    rich = build_text_bank(tiny_encoder, label_set, descriptions=True)
    torch.testing.assert_close(plain.weights, rich.weights)
    features, mask = rich.padded()
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert rich.counts.tolist() == [[1, 2], [2, 0]]
    assert features[1, 2].abs().sum() == 0
    texts = ["a photo of a dog.", "a photo of a dog. it barks.", "a photo of a dog. four legs.", "a", "b"]
    blank = torch.nn.functional.normalize(tiny_encoder.encode_text(["a photo of a ."]), dim=-1)
    torch.testing.assert_close(rich.blank[None], blank, atol=1e-5, rtol=1e-4)
    expected = torch.nn.functional.normalize(tiny_encoder.encode_text(texts), dim=-1)
    torch.testing.assert_close(features[mask], expected, atol=1e-5, rtol=1e-4)


def test_one_label_with_many_prompts_costs_no_memory_for_the_others(tiny_encoder: Encoder) -> None:
    many = {"name": "busy", "prompts": [f"prompt {i}" for i in range(200)]}
    bank = build_text_bank(tiny_encoder, LabelSet.parse([many, *(f"label {i}" for i in range(300))]))
    assert bank.texts.shape == (500, 32)
    assert bank.weights.shape == (301, 32)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_bank_can_take_part_in_a_backward_pass(tiny_encoder: Encoder, mode: Callable[[], Any]) -> None:
    with mode():
        bank = build_text_bank(tiny_encoder, LabelSet.parse(["dog", "cat"]))
    pixels = torch.rand(1, 3, 32, 32, requires_grad=True)
    (tiny_encoder.encode_image(pixels) @ bank.weights.T).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
