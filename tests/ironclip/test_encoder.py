"""Encoder: pixels in [0,1] in, features out, the same as open_clip's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import normalize

from ironclip.artifact import save_artifact
from ironclip.encoder import Encoder
from ironclip.errors import ArtifactError, LabelError
from ironclip.head import Head
from tests.conftest import make_residual_encoder, make_tiny_encoder

TEXTS = ["a photo of a dog", "zxqv blorp", "the large cat in the garden behind the old house", "犬", "a"]


def test_normalisation_is_inside(tiny_encoder: Encoder) -> None:
    pixels = torch.rand(3, 3, 32, 32)
    expected = tiny_encoder.model.encode_image(normalize(pixels, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    torch.testing.assert_close(tiny_encoder.encode_image(pixels), expected)


def test_gradients_reach_the_pixels(tiny_encoder: Encoder) -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    tiny_encoder.encode_image(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()


def test_integer_pixels_are_refused(tiny_encoder: Encoder) -> None:
    """0..255 taken for 0..1 would answer nonsense without a word."""
    with pytest.raises(ValueError, match="uint8"):
        tiny_encoder.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 31, 32), (1, 1, 32, 32)])
def test_wrong_shape_is_refused(tiny_encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"float \[N, 3, 32, 32\]"):
        tiny_encoder.encode_image(torch.rand(shape))


def test_trimmed_text_equals_padded_text(tiny_encoder: Encoder) -> None:
    tokens = tiny_encoder.tokenizer(TEXTS)
    torch.testing.assert_close(tiny_encoder.encode_text(TEXTS), tiny_encoder.model.encode_text(tokens))
    # In batches of two the order is changed inside and must be put back.
    torch.testing.assert_close(
        tiny_encoder.encode_text(TEXTS, batch_size=2), tiny_encoder.model.encode_text(tokens), atol=1e-5, rtol=1e-4
    )


def test_over_long_text_is_refused_with_its_count(tiny_encoder: Encoder) -> None:
    text = "dog " * 22  # and start and end: exactly the context
    assert tiny_encoder.tokenize([text]).shape == (1, 24)
    with pytest.raises(LabelError, match="25 tokens") as refused:
        tiny_encoder.tokenize([text + "dog"])
    assert refused.value.may_be_cut
    assert "truncate" not in refused.value.detail  # whether there is such an option, the caller knows
    assert tiny_encoder.tokenize([text + "dog"], truncate=True).shape == (1, 24)


def test_astype_keeps_digest_and_temperature(tiny_encoder: Encoder) -> None:
    low = tiny_encoder.astype(torch.bfloat16)
    assert low.dtype == torch.bfloat16
    assert low.digest == tiny_encoder.digest
    assert low.logit_scale.item() == tiny_encoder.logit_scale.item()
    assert tiny_encoder.dtype == torch.float32
    pixels = torch.rand(4, 3, 32, 32)
    assert low.encode_image(pixels).dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(low.encode_image(pixels), tiny_encoder.encode_image(pixels))
    assert cosine.min() > 0.99
    assert low.encode_text(TEXTS).dtype == torch.float32


def _write_weight(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] += 1e-3


def _change_tokenizer(encoder: Encoder) -> None:
    encoder.tokenizer.clean_fn = lambda text: text


def _change_vocabulary(encoder: Encoder) -> None:
    words = encoder.tokenizer.encoder = dict(encoder.tokenizer.encoder)
    words["dog</w>"], words["cat</w>"] = words["cat</w>"], words["dog</w>"]


CHANGES: dict[str, Callable[[Encoder], object]] = {
    "a weight": _write_weight,
    "other weights": lambda e: e.model.load_state_dict(make_tiny_encoder(seed=1).model.state_dict()),
    "mean": lambda e: e.mean.add_(0.01),
    "std": lambda e: e.std.add_(0.01),
    "activation": lambda e: e.model_cfg.update(quick_gelu=True),
    "preprocessing": lambda e: setattr(e, "preprocessing", replace(e.preprocessing, interpolation="bilinear")),
    "head": lambda e: setattr(e, "head", Head(type="poincare")),
    "what the tokenizer does": _change_tokenizer,
    "vocabulary": _change_vocabulary,
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_changes_with_whatever_changes_the_answer(change: str) -> None:
    base, other = make_tiny_encoder(), make_tiny_encoder()
    assert base.digest == other.digest
    changed = make_tiny_encoder()
    CHANGES[change](changed)
    assert changed.digest != base.digest


def test_digest_follows_a_change_after_it_was_read() -> None:
    encoder = make_tiny_encoder()
    before = encoder.digest
    _write_weight(encoder)
    assert encoder.digest != before


def test_a_low_precision_copy_is_not_widened_again(tiny_encoder: Encoder) -> None:
    """It would have the name and the dtype of the original, and other features."""
    with pytest.raises(ValueError, match="float32"):
        tiny_encoder.astype(torch.bfloat16).astype(torch.float32)


def test_the_served_form_answers_and_bends_as_the_trained_one(tmp_path: Path) -> None:
    encoder = make_residual_encoder()
    served = encoder.served()
    assert served.digest == encoder.digest
    assert not [m for m in served.model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert [m for m in encoder.model.visual.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    results = []
    for form in (encoder, served):
        pixels = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2)).requires_grad_(True)
        features = form.encode_image(pixels)
        results.append((features, *torch.autograd.grad(features.square().sum(), pixels)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert torch.equal(served.encode_text(TEXTS), encoder.encode_text(TEXTS))
    low = encoder.served(torch.bfloat16)
    assert low.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(low.encode_image(pixels), results[0][0])
    assert cosine.min() > 0.999
    assert copy.deepcopy(low).digest == encoder.digest
    with pytest.raises(ArtifactError, match="served copy"):
        save_artifact(served, tmp_path / "artifact", {"name": "served"})


def test_an_encoder_that_gains_nothing_is_not_held_twice(tiny_encoder: Encoder) -> None:
    assert tiny_encoder.served() is tiny_encoder
    assert tiny_encoder.served(torch.bfloat16).form == "served"


def test_empty_lists_are_answered(tiny_encoder: Encoder) -> None:
    assert tiny_encoder.encode_text([]).shape == (0, 32)


def test_unknown_head_is_refused() -> None:
    for value in ({"type": "poincare", "curvature": 1.0}, {"type": "cosine", "scale": 2}, {}, "cosine", None, []):
        with pytest.raises(ArtifactError, match="cosine"):
            Head.parse(value)
    assert Head.parse({"type": "cosine"}) == Head()
    full = {"type": "poincare", "curvature": 0.5, "image_scale": 0.1, "text_scale": 0.2, "temperature": 30}
    assert Head.parse(full).to_json() == full
    for wrong in (0, -1.0, float("nan"), "1", None):
        with pytest.raises(ArtifactError, match="numbers above 0"):
            Head.parse({**full, "curvature": wrong})
