"""An exported folder, read by transformers itself."""

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.loading import load_encoder
from tests.conftest import TINY_CFG, make_tiny_encoder
from tests.training.robust_world import CONV, make_artifact
from training.__main__ import main
from training.transformers_export import export_transformers

TEXTS = ["a photo of a dog.", "Naïve café 42!", "zeppelin"]


def _features(output: object) -> torch.Tensor:
    """transformers 5 wraps what earlier versions returned bare."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("quick", [False, True])
def test_clip_model_has_the_same_features(quick: bool, tmp_path: Path) -> None:
    plain = make_tiny_encoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_clip.model.CLIP(**TINY_CFG, quick_gelu=quick)
        for parameter in model.parameters():  # biases and norms away from zero and one, which would hide a mix-up
            parameter.data += 0.02 * torch.randn_like(parameter)
    encoder = Encoder(
        model,
        plain.tokenizer,
        model_cfg={**TINY_CFG, "quick_gelu": quick},
        preprocess_cfg=plain.preprocess_cfg,
    )
    assert export_transformers(encoder, tmp_path) == []
    theirs, tokenizer = CLIPModel.from_pretrained(tmp_path).eval(), CLIPTokenizer.from_pretrained(tmp_path)
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        normalised = (pixels - encoder.mean) / encoder.std
        images = _features(theirs.get_image_features(pixel_values=normalised))
        assert torch.allclose(images, encoder.encode_image(pixels), atol=1e-5)
        vision = CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
        assert torch.allclose(vision(pixel_values=normalised).image_embeds, encoder.encode_image(pixels), atol=1e-5)
        tokens = tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt")
        assert torch.allclose(_features(theirs.get_text_features(**tokens)), encoder.encode_text(TEXTS), atol=1e-5)
        assert theirs.logit_scale.exp().item() == pytest.approx(encoder.logit_scale.item())


def test_another_head_than_clips_is_told(tmp_path: Path) -> None:
    encoder = make_tiny_encoder()
    encoder.head = Head("poincare", curvature=0.5)
    (note,) = export_transformers(encoder, tmp_path)
    assert "poincare" in note


def test_pictures_are_prepared_alike(tmp_path: Path) -> None:
    encoder = make_tiny_encoder()
    export_transformers(encoder, tmp_path)
    picture = Image.effect_noise((90, 60), 60).convert("RGB")
    found = CLIPImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    ours = torch.from_numpy(encoder.preprocessing(picture)[0].numpy()) / 255
    expected = (ours - encoder.mean[0]) / encoder.std[0]
    assert (found - expected).abs().max() < 3 / 255 / 0.2  # resamplers may differ by rounding


def test_what_does_not_fit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conv = load_encoder(str(make_artifact(tmp_path / "conv", CONV)))
    with pytest.raises(OptionError, match="image tower is a ModifiedResNet"):
        export_transformers(conv, tmp_path / "out")
    assert main(["export", "--encoder", "demo-vit", "--to", "transformers", "--out", str(tmp_path / "vit")]) == 0
    said = capsys.readouterr().out
    assert "does not pad pictures to a square" in said
    assert said.splitlines()[-1] == str(tmp_path / "vit")
    encoder = load_encoder("demo-vit")
    theirs = CLIPModel.from_pretrained(tmp_path / "vit").eval()
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        images = _features(theirs.get_image_features(pixel_values=(pixels - encoder.mean) / encoder.std))
        assert torch.allclose(images, encoder.encode_image(pixels), atol=1e-5)
