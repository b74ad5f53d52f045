"""Encoder: pixels in [0,1] in, features out, the same as open_clip's own."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms.functional import normalize

from ironclip.encoder import Encoder, Head
from ironclip.errors import ArtifactError, LabelError

TEXTS = ["a photo of a dog", "zxqv blorp", "the large cat in the garden behind the old house", "犬", "a"]


def test_normalisation_is_inside(tiny_encoder: Encoder) -> None:
    pixels = torch.rand(3, 3, 32, 32)
    expected = tiny_encoder.model.encode_image(normalize(pixels, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    torch.testing.assert_close(tiny_encoder.encode_image(pixels), expected)


def test_gradients_reach_the_pixels_and_not_the_weights(tiny_encoder: Encoder) -> None:
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    tiny_encoder.encode_image(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in tiny_encoder.parameters())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 31, 32), (1, 1, 32, 32)])
def test_wrong_shape_is_refused(tiny_encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\]"):
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
    with pytest.raises(LabelError, match="25 tokens"):
        tiny_encoder.tokenize([text + "dog"])
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


def test_digest_changes_with_whatever_changes_the_answer() -> None:
    from tests.conftest import make_tiny_encoder

    base = make_tiny_encoder()
    assert make_tiny_encoder().digest == base.digest
    assert make_tiny_encoder(seed=1).digest != base.digest
    weights = make_tiny_encoder()
    with torch.no_grad():
        weights.model.visual.proj[0, 0] += 1e-3
    other_mean = make_tiny_encoder()
    other_mean.mean += 0.01
    other_tokens = make_tiny_encoder()
    other_tokens.tokenizer.clean_fn = lambda text: text
    assert len({e.digest for e in (base, weights, other_mean, other_tokens)}) == 4


def test_unknown_head_is_refused() -> None:
    with pytest.raises(ArtifactError, match="cosine"):
        Head.parse({"type": "poincare", "curvature": 1.0})
    assert Head.parse({"type": "cosine"}) == Head()
