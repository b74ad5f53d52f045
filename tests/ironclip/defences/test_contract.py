"""Every defence keeps what it says of itself: draws, gradients, loops, costs, heads, and batch mates."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.attacks import ThreatModel, WhiteBox, classification, drive, make_attack
from ironclip.classifier import Classifier
from ironclip.defences import DEFENCES, Defence, make_defence
from ironclip.defences.clipure import ClipureCos
from ironclip.defences.ttc import TestTimeCounterattack
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.labels import LabelSet
from tests.conftest import make_tiny_encoder

LABELS = LabelSet.parse(["dog", {"name": "cat", "descriptions": ["it purrs", "whiskers"]}, "cow", "horse"])


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return make_tiny_encoder().served()


class Counted:
    """An encoder's image tower that counts what it is asked for, backwards as two."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.forwards = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.forwards += len(pixels)
        features = self._encoder.encode_image(pixels)
        if features.requires_grad:
            features.register_hook(self._backward)
        return features

    def _backward(self, gradient: Tensor) -> None:
        self.forwards += 2 * len(gradient)


@pytest.mark.parametrize("name", DEFENCES)
def test_what_it_says_of_its_draws(encoder: Encoder, name: str) -> None:
    defence = make_defence(name)
    images = pictures(2)
    classifiers = [Classifier(encoder, LABELS, defence=one) for one in (defence, defence, defence.reseeded(1))]
    before = torch.get_rng_state()
    first, again, other = (classifier(images) for classifier in classifiers)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert torch.equal(first, other) != defence.random
    assert defence.random == ("seed" in defence.options())


@pytest.mark.parametrize("name", DEFENCES)
def test_batch_mates_do_not_matter(encoder: Encoder, name: str) -> None:
    classifier = Classifier(encoder, LABELS, defence=make_defence(name))
    torch.testing.assert_close(classifier(pictures(5))[3:4], classifier(pictures(5)[3:4]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", DEFENCES)
def test_what_it_says_of_its_gradients(encoder: Encoder, name: str) -> None:
    """Exact ones agree with finite differences; others (BPDA) at least exist."""
    double = make_tiny_encoder().double()
    classifier = Classifier(double, LABELS, defence=make_defence(name))
    images = pictures(1)
    score = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((classifier(leaf) * score).sum(), leaf)
    assert float(gradient.abs().max()) > 0
    if classifier.defence.differentiable:
        direction = gradient / gradient.norm()
        step = 3e-2
        with torch.no_grad():
            above, below = ((classifier(images + sign * step * direction) * score).sum() for sign in (1, -1))
        assert float((above - below) / (2 * step)) == pytest.approx(float(gradient.norm()), rel=0.05)


@pytest.mark.parametrize("name", DEFENCES)
def test_what_it_says_of_its_loop_and_its_cost(encoder: Encoder, name: str) -> None:
    defence, count = make_defence(name), Counted(encoder)
    if defence.optimising:
        with pytest.raises(RuntimeError), torch.inference_mode():
            defence.make_views(pictures(2), count)
    count.forwards = 0
    with torch.no_grad():
        views = defence.make_views(pictures(2), count)
    assert views.shape == (2, defence.view_count, 3, 32, 32)
    assert count.forwards / 2 + defence.view_count == defence.cost
    assert float(views.amin()) >= 0
    assert float(views.amax()) <= 1


@pytest.mark.parametrize("name", DEFENCES)
def test_what_it_says_of_heads(name: str) -> None:
    encoder = make_tiny_encoder()
    encoder.head = Head("poincare", 1.0, 0.5, 0.5, 10.0)
    if "poincare" in make_defence(name).heads:
        assert Classifier(encoder, LABELS, defence=make_defence(name))(pictures(1)).shape == (1, 4)
    else:
        with pytest.raises(OptionError, match="poincare"):
            Classifier(encoder, LABELS, defence=make_defence(name))


@pytest.mark.parametrize("name", DEFENCES)
def test_its_vectors_are_of_length_one(encoder: Encoder, name: str) -> None:
    classifier = Classifier(encoder, LABELS, defence=make_defence(name))
    vectors = classifier.vectors(classifier.encode(pictures(3)))
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3), atol=1e-5, rtol=0)
    if not classifier.defence.reads_labels:
        defence = classifier.defence
        alone = defence.vector(classifier.encode(pictures(3)), None, None, classifier._rule)
        torch.testing.assert_close(alone, vectors)


@pytest.mark.parametrize("name", DEFENCES)
def test_attacks_pass_through_it(encoder: Encoder, name: str) -> None:
    classifier = Classifier(encoder, LABELS, defence=make_defence(name))
    images = pictures(6)
    with torch.no_grad():
        labels = classifier(images).argmax(1)
    problem = classification(images, labels, ThreatModel("linf", 16 / 255))
    result = drive(make_attack("apgd-ce", {"iterations": 20}), problem, WhiteBox(classifier, problem))
    assert int(result.zero_gradients.sum()) == 0
    with torch.no_grad():
        assert bool((classifier(result.images).argmax(1) != labels)[result.fooled].all())
    assert int(result.fooled.sum()) >= 3  # a random tower is easily fooled


@pytest.mark.parametrize("name", DEFENCES)
def test_its_options_make_it_again(name: str) -> None:
    defence: Any = make_defence(name)
    assert make_defence(name, defence.options()) == defence
    assert set(defence.options()) == {field.name for field in fields(defence)}


def test_a_counterattack_moves_the_feature_of_a_stable_picture_and_stays_in_its_ball(encoder: Encoder) -> None:
    images = pictures(4)
    start = encoder.encode_image(images)
    stable, never = TestTimeCounterattack(threshold=10), TestTimeCounterattack(threshold=0)
    shifts = []
    for defence in (stable, never):
        views = defence.make_views(images, encoder.encode_image)[:, 0]
        assert float((views - images).abs().max()) <= 4 / 255 + 1e-6
        shifts.append((encoder.encode_image(views) - start).norm(dim=-1))
    assert bool((shifts[0] > shifts[1]).all())


def test_published_clipure_leaves_the_answer_as_it_was(encoder: Encoder) -> None:
    """Ten steps that turn by arctan(30) swing there and back; what its gradients hid was no defence."""
    plain = Classifier(encoder, LABELS)
    features = plain.encode(pictures(8))
    blank = Classifier(encoder, LABELS, defence=ClipureCos()).bank.blank
    # A feature far from the text, as CLIP's are; the random tower's own may stand nearer.
    far = normalize(features - (features @ blank)[..., None] * blank, dim=-1) + 0.25 * blank
    published, small = (
        Classifier(encoder, LABELS, defence=defence).decide(far)
        for defence in (ClipureCos(), ClipureCos(step_size=0.1))
    )
    torch.testing.assert_close(published, plain.decide(far), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(small, plain.decide(far), atol=1e-2)


def test_a_reseeded_defence_keeps_its_other_options() -> None:
    cola: Defence = make_defence("cola", {"views": 3, "rank": 7})
    assert cola.reseeded(9) == replace(cola, seed=9)  # type: ignore[type-var]


# Of each option another value than its default's.
OTHER: dict[str, dict[str, Any]] = {
    "none": {},
    "cola": {
        "views": 3,
        "texts": 2,
        "projection": "none",
        "rank": 3,
        "weights": "uniform",
        "temperature": 1.0,
        "coupling": "product",
        "epsilon": 0.2,
        "iterations": 3,
        "smallest_crop": 0.9,
        "calibrated": False,
        "seed": 7,
    },
    "ttc": {"radius": 2.0, "steps": 1, "step_size": 2.0, "threshold": 0.1, "beta": 1.0, "seed": 7},
    "clipure": {"steps": 3, "step_size": 1.0},
}


def held(state: Any) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else state.tensors() if hasattr(state, "tensors") else []


@pytest.mark.parametrize("name", DEFENCES)
def test_two_that_are_prepared_alike_share_their_state(encoder: Encoder, name: str) -> None:
    """Nothing that `prepare` looks at may be missing in `preparation`: a served state would be another label's."""
    plain = make_defence(name)
    bank = Classifier(encoder, LABELS, defence=plain).bank
    wanted = held(plain.prepare(bank))
    changed = set()
    for option in plain.options():
        other = make_defence(name, {option: OTHER[name][option]})
        found = held(other.prepare(bank))
        alike = len(found) == len(wanted) and all(map(torch.equal, found, wanted))
        if other.preparation() == plain.preparation():
            assert alike, option
        else:
            changed.add(option)
    assert plain.preparation() == plain.reseeded(5).preparation()
    assert changed == ({"texts", "projection", "rank"} if name == "cola" else set())


def test_a_decision_under_another_defence_is_that_defences(encoder: Encoder) -> None:
    base = Classifier(encoder, LABELS, defence=make_defence("cola"))
    other = make_defence("cola", {"views": 2, "coupling": "product", "seed": 3})
    images = pictures(2)
    assert torch.equal(base.under(other)(images), Classifier(encoder, LABELS, defence=other)(images))
    with pytest.raises(ValueError, match="otherwise"):
        base.under(make_defence("cola", {"rank": 2}))


def test_another_form_of_the_encoder_shares_what_was_made_of_the_labels(encoder: Encoder) -> None:
    base, narrow = Classifier(encoder, LABELS, defence=make_defence("cola")), encoder.served(torch.bfloat16)
    before = base(pictures(2))
    over = base.over(narrow)
    again = Classifier(narrow, LABELS, base.bank, defence=base.defence)
    assert torch.equal(over(pictures(2)), again(pictures(2)))
    assert over.bank.texts.data_ptr() == base.bank.texts.data_ptr()
    assert torch.equal(base(pictures(2)), before)  # which is as it was
    assert over.encoder is narrow
    assert base.encoder is encoder
