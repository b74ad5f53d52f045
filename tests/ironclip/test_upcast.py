"""Products of a 16-bit dtype made in float32: the same answers as the dtype's own kernels, to rounding."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ironclip import encoder as encoders
from ironclip.layers import TakenApart
from ironclip.loading import load_encoder
from ironclip.upcast import UpcastConv2d, UpcastLinear, pays, upcast

TEXTS = ["a photo of a dog.", "a photo of a red bicycle in the rain.", "🥕"]


@pytest.fixture(params=["demo", "demo-robust"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[bool, encoders.Encoder]]:
    """An encoder served in bfloat16, with its products as they are and turned up."""
    trained = load_encoder(request.param, device="cpu")
    made = {}
    for turned_up in (False, True):
        monkeypatch.setattr(encoders, "pays", lambda dtype, answer=turned_up: answer and dtype == torch.bfloat16)
        made[turned_up] = trained.served(torch.bfloat16)
    return iter([made])


def test_a_turned_up_encoder_answers_like_the_one_it_stands_for(both: Iterator[dict[bool, encoders.Encoder]]) -> None:
    made = next(both)
    native, wide = made[False], made[True]
    assert (wide.dtype, wide.arithmetic) == (torch.bfloat16, torch.float32)
    assert (native.dtype, native.arithmetic) == (torch.bfloat16, torch.bfloat16)
    assert wide.digest == native.digest
    with pytest.raises(ValueError, match="starts from the float32 encoder"):
        wide.astype(torch.bfloat16)
    assert any(isinstance(module, UpcastLinear | UpcastConv2d) for module in wide.model.modules())
    pixels = torch.rand(4, 3, wide.resolution, wide.resolution, generator=torch.Generator().manual_seed(1))
    seen: dict[bool, tuple[Tensor, Tensor, Tensor]] = {}
    for turned_up, encoder in made.items():
        images = pixels.clone().requires_grad_()
        features = encoder.encode_image(images)
        (gradient,) = torch.autograd.grad(features[:, 0].sum(), images)
        seen[turned_up] = features.detach(), gradient.flatten(1), encoder.encode_text(TEXTS).detach()
    for ours, theirs, least in zip(seen[True], seen[False], (0.999, 0.5, 0.999), strict=True):
        assert ours.dtype == torch.float32
        assert cosine_similarity(ours, theirs).min() > least


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "added", "bool", "by head"])
@pytest.mark.parametrize("crossed", [True, False])
def test_attention_is_that_of_torch(*, batch_first: bool, mask: str, crossed: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=batch_first).eval().requires_grad_(False)
    x = torch.randn(3, 5, 32) if batch_first else torch.randn(5, 3, 32)
    other = torch.randn_like(x) if crossed else x
    future = torch.ones(5, 5).triu(1).bool()
    masks = {
        "none": None,
        "added": torch.zeros(5, 5).masked_fill(future, -torch.inf),
        "bool": future,
        "by head": torch.randn(12, 5, 5),
    }
    attn_mask = masks[mask]
    rounded = attention.to(torch.bfloat16).float()
    low, low_other = x.bfloat16(), other.bfloat16()
    expected = rounded(
        low.float(),
        low_other.float() if crossed else low.float(),
        low_other.float(),
        need_weights=False,
        attn_mask=attn_mask,
    )[0]
    block = nn.Sequential(attention.to(torch.bfloat16))
    upcast(block)
    assert isinstance(block[0], TakenApart)
    keys = low_other if crossed else low
    answer, _ = block[0](low, keys, keys, need_weights=False, attn_mask=attn_mask)
    with pytest.raises(TypeError, match="no weights"):
        block[0](low, keys, keys)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), expected, atol=0.02, rtol=0.02)


def test_an_attention_of_another_form_stays_as_it_is() -> None:
    attention = nn.MultiheadAttention(32, 4, kdim=16, vdim=16).bfloat16().eval()
    upcast(nn.Sequential(attention))
    assert type(attention) is nn.MultiheadAttention
    assert attention.q_proj_weight.dtype == torch.bfloat16


def test_a_tower_that_asks_its_projection_what_it_is_is_turned_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's text tower ends in a linear layer where others have a matrix, and looks which of them it is."""
    trained = load_encoder("demo-vit", device="cpu")
    projection = nn.Linear(*trained.model.text_projection.shape)  # type: ignore[misc, union-attr]
    del trained.model.text_projection
    trained.model.text_projection = projection.requires_grad_(False)
    monkeypatch.setattr(encoders, "pays", lambda dtype: dtype == torch.bfloat16)
    wide = trained.served(torch.bfloat16)
    assert wide.arithmetic == torch.float32
    with torch.inference_mode():
        assert cosine_similarity(wide.encode_text(TEXTS), trained.encode_text(TEXTS)).min() > 0.999


def test_float32_is_never_turned_up() -> None:
    assert not pays(torch.float32)
