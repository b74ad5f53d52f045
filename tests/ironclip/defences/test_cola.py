"""COLA: where it must be plain CLIP, what its parts do, and that its scores are as sure as they may be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.classifier import Classifier, NativeRule, predict
from ironclip.defences.cola import Cola, Rest, subspace
from ironclip.defences.crops import boxes, crops
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.labels import Label, LabelSet
from ironclip.textbank import TextBank, build_text_bank
from tests.conftest import make_tiny_encoder

PLAIN: dict[str, Any] = {"views": 1, "texts": 1, "projection": "none"}


def label_set(count: int, texts: int = 1) -> LabelSet:
    more = tuple(f"it is thing {j}" for j in range(texts - 1))
    return LabelSet(tuple(Label(f"label {i}", (), more) for i in range(count)), ("a photo of a {}.",))


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_tiny_encoder()


def test_it_is_plain_clip_with_one_view_one_prompt_and_no_projection(encoder: Encoder) -> None:
    plain, bare = Classifier(encoder, label_set(20)), Classifier(encoder, label_set(20), defence=Cola(**PLAIN))
    torch.testing.assert_close(bare(pictures(6)), plain(pictures(6)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_full_subspace_changes_no_answer(encoder: Encoder, calibrated: bool) -> None:
    defence = Cola(views=1, texts=1, rank=encoder.dim, calibrated=calibrated)
    plain, full = (Classifier(encoder, label_set(20), defence=one)(pictures(32)) for one in (Cola(**PLAIN), defence))
    assert torch.equal(plain.argmax(1), full.argmax(1))
    # What the cosine divides by is given back: with few labels too the scores are those of plain CLIP.
    if calibrated:
        torch.testing.assert_close(full, plain, atol=1e-4, rtol=1e-4)


def test_only_the_image_is_projected(encoder: Encoder) -> None:
    defence = Cola(views=1, texts=1, rank=4, calibrated=False)
    classifier = Classifier(encoder, label_set(9), defence=defence)
    image = normalize(encoder.encode_image(pictures(5)), dim=-1)
    texts = classifier.bank.weights
    left = torch.linalg.svd(texts.T, full_matrices=False).U[:, :4]  # equation 3 as it is written, uncentred
    projected = image @ left @ left.T
    expected = encoder.logit_scale * normalize(projected, dim=-1) @ texts.T
    torch.testing.assert_close(classifier(pictures(5)), expected, atol=1e-4, rtol=1e-4)


def test_the_subspace_has_no_more_dimensions_than_the_texts() -> None:
    texts = normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    basis = subspace(texts[[0, 1, 2, 2, 1]], 8)
    assert basis.shape == (16, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(texts @ basis @ basis.T, texts, atol=1e-5, rtol=0)


def test_replaced_entropies_are_those_of_the_replaced_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    near = 10 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    own = near[..., None] + 30 * torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    expected = torch.empty_like(own)
    for k in range(6):
        for m in range(4):
            logits = near.clone()
            logits[:, k] = own[:, k, m]
            logs = logits.log_softmax(-1)
            expected[:, k, m] = -(logs.exp() * logs).sum(-1)
    torch.testing.assert_close(Rest.of(near).entropies(own, torch.arange(6)), expected, atol=1e-12, rtol=1e-9)
    single = Rest.of(near.float()).entropies(own.float(), torch.arange(6))
    torch.testing.assert_close(single.double(), expected, atol=2e-5, rtol=1e-4)
    assert bool(
        (Rest.of(near[:, :1]).entropies(own[:, :1], torch.tensor([0])).abs() < 1e-12).all()
    )  # one label is always sure


def test_the_surer_view_weighs_more() -> None:
    sure, unsure = torch.tensor([9.0, 0.0, 0.0]), torch.tensor([1.0, 0.9, 0.8])
    a = Cola()._view_weights(torch.stack([unsure, sure, unsure])[None])
    assert float(a[0, 1]) > float(a[0, 0])
    torch.testing.assert_close(a.sum(-1), torch.ones(1))


def test_labels_may_have_differing_numbers_of_texts(encoder: Encoder) -> None:
    rich = Label("dog", (), ("it barks", "four legs"))
    ragged = LabelSet((rich, Label("cat"), Label("cow", ("a cow", "my cow"))), ("a photo of a {}.",))
    defence = Cola(views=3)
    found = Classifier(encoder, ragged, defence=defence)(pictures(4))
    # The same by hand, label by label with its own texts alone.
    views = normalize(encoder.encode_image(defence.make_views(pictures(4), encoder.encode_image).flatten(0, 1)), dim=-1)
    views = views.unflatten(0, (4, 3))
    names = [
        ["a photo of a dog.", "a photo of a dog. it barks.", "a photo of a dog. four legs."],
        ["a photo of a cat."],
        ["a cow", "my cow"],
    ]
    texts = [normalize(encoder.encode_text(own), dim=-1) for own in names]
    basis = subspace(torch.cat(texts), encoder.dim // 2)
    centres = torch.stack([own.mean(0) for own in texts])
    near = encoder.logit_scale * views @ centres.T
    a = defence._view_weights(near)
    projected = views @ basis @ basis.T
    lengths = projected.norm(dim=-1)
    for k, own in enumerate(texts):
        swapped = near[:, 0, None].repeat(1, len(own), 1)
        swapped[..., k] = encoder.logit_scale * views[:, 0] @ own.T
        logs = swapped.log_softmax(-1)
        b = ((logs.exp() * logs).sum(-1) / 0.5).softmax(-1)
        cost = 1 - normalize(projected, dim=-1) @ own.T
        kernel = (-cost / 0.1).exp()
        v = torch.ones_like(b)
        for _ in range(100):
            u = 1 / (kernel @ (b * v)[..., None])[..., 0]
            v = 1 / (kernel.mT @ (a * u)[..., None])[..., 0]
        distance = 0.1 * ((a * u.log()).sum(-1) + (b * v.log()).sum(-1))
        expected = encoder.logit_scale * (a * lengths).sum(-1) * (1 - distance)
        torch.testing.assert_close(found[:, k], expected, atol=1e-3, rtol=1e-3)


def test_a_picture_is_decided_the_same_in_every_batch(encoder: Encoder) -> None:
    classifier = Classifier(encoder, label_set(30, 3), defence=Cola())
    together, alone = classifier(pictures(6)), classifier(pictures(6)[2:3])
    torch.testing.assert_close(together[2:3], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("coupling", ["sinkhorn", "product"])
def test_large_sets_are_decided_in_parts(encoder: Encoder, coupling: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [tuple(f"it is thing {j}" for j in range(i * 5 % 8)) for i in range(30)]
    uneven = LabelSet(tuple(Label(f"label {i}", (), texts) for i, texts in enumerate(more)), ("a photo of a {}.",))
    classifier = Classifier(encoder, uneven, defence=Cola(coupling=coupling))

    def decided() -> tuple[Tensor, Tensor]:
        images = pictures(6).requires_grad_()
        logits = classifier(images)
        (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), images)
        return predict(classifier, pictures(6)).logits, gradient

    whole = decided()
    monkeypatch.setattr("ironclip.defences.cola._CHUNK", 1000)
    monkeypatch.setattr("ironclip.defences.cola._MOST_PICTURES", 4)
    torch.testing.assert_close(decided(), whole, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr("ironclip.defences.cola._ALIKE", 100.0)
    together = Classifier(encoder, uneven, classifier.bank, defence=classifier.defence)
    torch.testing.assert_close(predict(together, pictures(6)).logits, whole[0], atol=1e-4, rtol=1e-4)


def test_view_zero_is_the_picture_and_crops_belong_to_the_seed() -> None:
    images = pictures(3)
    views = crops(images, 5, smallest=0.3, seed=4)
    assert torch.equal(views[:, 0], images)
    assert torch.equal(views[1:], crops(images[1:], 5, smallest=0.3, seed=4))
    assert not torch.equal(views[:, 1:], crops(images, 5, smallest=0.3, seed=5)[:, 1:])
    assert float(views.amin()) >= 0
    assert float(views.amax()) <= 1


def test_boxes_follow_their_law() -> None:
    found = [box for seed in range(300) for box in boxes(4, 224, 0.08, seed)]
    shares = torch.tensor([box.height * box.width / 224**2 for box in found])
    ratios = torch.tensor([box.width / box.height for box in found])
    assert all(0 <= box.top <= 224 - box.height and 0 <= box.left <= 224 - box.width for box in found)
    assert 0.07 < float(shares.min()) < 0.1
    assert float(shares.max()) <= 1
    assert float(ratios.min()) > 0.74
    assert float(ratios.max()) < 1.35
    assert 0.4 < sum(box.mirrored for box in found) / len(found) < 0.6
    # Areas are uniform but for the large ones that do not fit.
    assert 0.4 < float((shares < 0.5).float().mean()) < 0.6


def _bank(k: int, dim: int, generator: torch.Generator) -> tuple[TextBank, Tensor]:
    """CLIP-like: a modality gap, a falling spectrum of texts, and 2,000 pictures near them."""
    gap, other = normalize(torch.randn(2, dim, generator=generator), dim=-1)
    own = normalize(torch.randn(k, dim, generator=generator) / (1 + torch.arange(dim) / 24), dim=-1)
    texts = normalize(own + 1.2 * gap, dim=-1)
    labels = torch.randint(0, k, (2000,), generator=generator)
    noise = normalize(torch.randn(2000, dim, generator=generator), dim=-1)
    images = normalize(0.35 * own[labels] + 1.2 * other + 0.7 * noise, dim=-1)
    rows = torch.arange(k)
    counts = torch.stack([torch.ones(k, dtype=torch.int64), torch.zeros(k, dtype=torch.int64)], 1)
    return TextBank("", "", True, texts, torch.ones(k), texts, rows, counts, torch.zeros(dim)), images


def _calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error in ten bins (Guo et al. 2017)."""
    sure, said = probabilities.max(1)
    right = (said == labels).float()
    bins = (sure * 10).long().clamp_max(9)
    error = 0.0
    for i in range(10):
        rows = bins == i
        if rows.any():
            error += float(rows.float().mean() * (sure[rows].mean() - right[rows].mean()).abs())
    return error


@pytest.mark.parametrize(("k", "temperature"), [(5, 10.0), (100, 30.0), (1000, 40.0)])
def test_served_scores_are_as_calibrated_as_plain_clips(encoder: Encoder, k: int, temperature: float) -> None:
    """With the views, texts, weights and transport of the default; truths are drawn from plain CLIP's own softmax, so
    plain CLIP is calibrated by construction."""

    class Rule(NativeRule):
        scale = torch.tensor(temperature)

        def __call__(self, features: Tensor, bank: TextBank) -> Tensor:
            return self.scale * normalize(features, dim=-1) @ bank.weights.T

    generator = torch.Generator().manual_seed(k)
    bank, images = _bank(k, 512, generator)
    bank = _described(bank, 8, generator)
    views = torch.stack([images, *(_near(images, generator) for _ in range(Cola().views - 1))], 1)
    head = Rule(encoder)
    plain = head(images, bank).softmax(1)
    truths = torch.multinomial(plain, 1, generator=generator)[:, 0]
    errors = {}
    for calibrated in (True, False):
        defence = Cola(calibrated=calibrated)
        logits = defence.logits(views, bank, defence.prepare(bank), head)
        errors[calibrated] = _calibration_error(logits.softmax(1), truths)
    assert _calibration_error(plain, truths) < 0.05
    assert errors[True] < _calibration_error(plain, truths) + 0.03
    assert errors[False] > 0.1  # what the factor is for


def _near(features: Tensor, generator: torch.Generator) -> Tensor:
    """Other views of the same, or other texts: about 17 degrees away."""
    away = normalize(torch.randn(features.shape, generator=generator), dim=-1)
    return normalize(features + 0.3 * away, dim=-1)


def _described(bank: TextBank, texts: int, generator: torch.Generator) -> TextBank:
    """The same labels with so many texts each, all of them in the prompts' mean."""
    k, dim = bank.weights.shape
    features = _near(bank.weights.repeat_interleave(texts, 0), generator)
    counts = torch.stack([torch.ones(k), torch.full((k,), texts - 1.0)], 1).long()
    weights = normalize(features.view(k, texts, dim).mean(1), dim=-1)
    return replace(bank, weights=weights, texts=features, rows=torch.arange(k * texts), counts=counts)


@pytest.mark.parametrize(
    ("options", "pointer"),
    [
        ({"views": 0}, "/defence/views"),
        ({"views": True}, "/defence/views"),
        ({"views": 2.5}, "/defence/views"),
        ({"texts": "many"}, "/defence/texts"),
        ({"epsilon": 0.01}, "/defence/epsilon"),
        ({"epsilon": float("nan")}, "/defence/epsilon"),
        ({"coupling": "none"}, "/defence/coupling"),
        ({"coupling": ["sinkhorn"]}, "/defence/coupling"),
        ({"calibrated": 1}, "/defence/calibrated"),
        ({"seed": -1}, "/defence/seed"),
    ],
)
def test_bad_options_say_what_to_do(options: dict[str, Any], pointer: str) -> None:
    with pytest.raises(OptionError) as caught:
        Cola(**options)
    assert caught.value.pointer == pointer


def test_the_exact_coupling_refuses_label_sets_that_would_take_minutes(encoder: Encoder) -> None:
    bank = build_text_bank(encoder, label_set(3), descriptions=True)
    huge = replace(bank, counts=bank.counts[:1].expand(2001, -1))
    with pytest.raises(OptionError, match="at most 2000"):
        Cola(coupling="exact").prepare(huge)
