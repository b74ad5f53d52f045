"""Image towers of 8-bit products: close to float32's, each picture for itself, and seen through by attacks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear

from ironclip.attacks import PGD, ThreatModel, WhiteBox, classification, drive
from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.int8 import Int8Linear, product, quantize
from ironclip.labels import LabelSet
from ironclip.layers import TakenApart
from ironclip.loading import load_encoder


@pytest.fixture(scope="module")
def trained() -> Encoder:
    return load_encoder("demo-vit", device="cpu")


@pytest.fixture(scope="module")
def served(trained: Encoder) -> Encoder:
    return trained.served(torch.int8)


def pictures(encoder: Encoder, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, (encoder.resolution, encoder.resolution), mode="bilinear")


@pytest.mark.parametrize("rows", [1, 7, 200, 433])
def test_products_are_float32_products_to_the_rounding_of_each_side(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(48, 24).requires_grad_(False)
    # Rows of very different sizes, one of nothing but zeros, one with a single large number.
    x = torch.randn(rows, 48, generator=generator) * torch.logspace(-4, 4, rows)[:, None]
    x[0, 1:] = 0
    x[-1] = 0
    made = Int8Linear(layer)
    # Half a step of each side, worst case over the sum.
    step = x.abs().amax(1, keepdim=True) / 127
    bound = 48 * (0.51 * step * layer.weight.abs().max() + 0.51 * made.scale.max() * x.abs().amax(1, keepdim=True))
    answer = made(x)
    assert answer.dtype == torch.float32
    assert made(x[:0]).shape == (0, 24)
    assert ((answer - layer(x)).abs() <= bound + 1e-6).all()
    # And what it says it multiplies, it multiplies exactly.
    rounded = (x / step.clamp_min(1e-12)).round() * step
    exact = linear(rounded.double(), (made.weight * made.scale[:, None]).double(), layer.bias.double())
    torch.testing.assert_close(answer.double(), exact, rtol=1e-3, atol=1e-5 * float(x.abs().max()))
    without = product(x, made.weight, made.scale, None)
    torch.testing.assert_close(without + layer.bias, answer, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("instructions", ["", "AVX2", "AVX512_CORE"])
def test_products_are_exact_on_every_cpu(instructions: str) -> None:
    """CPUs without VNNI add pairs of products in 16 bits, which saturate: the worst there is must not."""
    code = (
        "import torch\n"
        "from torch import nn\n"
        "from ironclip.int8 import Int8Linear, product\n"
        "layer = nn.Linear(512, 8)\n"
        "nn.init.ones_(layer.weight)\n"
        "nn.init.zeros_(layer.bias)\n"
        "made = Int8Linear(layer)\n"
        "for sign in (1, -1):\n"
        "    x = torch.full((3, 512), float(sign))\n"
        "    torch.testing.assert_close(made(x), layer(x), rtol=1e-5, atol=0)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "weight = torch.randint(-64, 65, (64, 768), generator=generator).to(torch.int8)\n"
        "rows = torch.randint(-127, 128, (9, 768), generator=generator).float()\n"
        "rows[:, 0] = 127\n"
        "exact = rows.double() @ weight.double().T\n"
        "found = product(rows, weight, torch.ones(64), None)\n"
        "torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-2)\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions} if instructions else dict(os.environ)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_features_stay_and_the_text_tower_is_untouched(trained: Encoder, served: Encoder) -> None:
    assert (served.dtype, served.arithmetic, served.form) == (torch.int8, torch.int8, "served")
    assert served.digest == trained.digest
    kinds = {type(module) for module in served.model.visual.modules()}  # type: ignore[union-attr]
    assert {TakenApart, Int8Linear} <= kinds
    assert nn.Linear not in kinds
    pixels = pictures(trained, 8)
    with torch.inference_mode():
        assert cosine_similarity(served.encode_image(pixels), trained.encode_image(pixels)).min() > 0.999
        assert torch.equal(served.encode_text(["a dog"]), trained.encode_text(["a dog"]))
    with pytest.raises(ValueError, match="starts from the float32 encoder"):
        served.served(torch.bfloat16)
    with pytest.raises(ValueError, match="for `served` alone"):
        trained.astype(torch.int8)


def test_a_picture_is_answered_alike_whatever_is_beside_it(served: Encoder) -> None:
    pixels = pictures(served, 5)
    loud = torch.cat([pixels[:1], (pixels[1:] > 0.5).float()])
    with torch.inference_mode():
        alone, quiet, among = (served.encode_image(batch)[0] for batch in (pixels[:1], pixels, loud))
    torch.testing.assert_close(quiet, alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(among, alone, rtol=1e-3, atol=1e-4)


def test_an_attack_sees_through_the_rounding(trained: Encoder, served: Encoder) -> None:
    names = LabelSet.parse(["carrot", "dog", "rocket", "house", "cat", "tree"])
    pixels = pictures(trained, 12)
    exact, rounded = (Classifier(encoder, names) for encoder in (trained.served(), served))
    with torch.no_grad():
        labels = rounded(pixels).argmax(1)
    threat = ThreatModel("linf", 4 / 255)
    fooled = {}
    for name, attacked in (("rounded", rounded), ("exact", exact)):
        problem = classification(pixels, labels, threat, keys=torch.arange(len(pixels)))
        found = drive(PGD(iterations=10), problem, WhiteBox(attacked, problem, batch_size=len(pixels)))
        with torch.no_grad():
            fooled[name] = int((rounded(found.images).argmax(1) != labels).sum())
        if name == "rounded":
            assert not (found.zero_gradients > 0).any()
    # What is fooled through the rounding is at least what float32's gradients bring over.
    assert fooled["rounded"] >= max(1, fooled["exact"] - 1)


def test_gradients_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(16, 8))
    x = torch.randn(2, 3, 16, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    gradient = 2 * layer(x).detach() @ (layer.weight * layer.scale[:, None])
    torch.testing.assert_close(found, gradient)


def test_a_tower_without_linear_layers_is_refused() -> None:
    with pytest.raises(OptionError, match="has none: set the dtype to float32"):
        quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


class PastItsLayers(nn.Module):
    """As some towers' blocks do: reads the weight of its layer itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.inside = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer + 0 * linear(x[:, 0, :1, :4].flatten(1), self.inside.weight).sum()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_a_tower_that_reads_past_its_layers_is_refused_or_left_as_it_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ironclip.encoder.pays", lambda dtype: dtype == torch.bfloat16)
    encoder = load_encoder("demo-vit", device="cpu")
    encoder.model.visual = PastItsLayers(encoder.model.visual).eval()  # type: ignore[arg-type]
    if dtype == torch.int8:
        with pytest.raises(OptionError, match="cannot be int8"):
            encoder.served(dtype)
        return
    left = encoder.served(dtype)
    assert (left.dtype, left.arithmetic) == (dtype, dtype)
    assert left.encode_image(pictures(encoder, 1)).isfinite().all()
