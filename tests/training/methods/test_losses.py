"""Each method's loss and attack objective against its formula, and where gradients may and may not go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ironclip.attacks import PGD, Problem, ThreatModel, WhiteBox, drive
from ironclip.errors import OptionError
from training.methods import METHODS
from training.methods.base import Batch, Networks, Texts, divergence

CLASSES, DIM, COUNT = 5, 7, 6
# The hierarchical method needs a head of its own around a text tower; its tests stand beside these.
PLAIN = [name for name in METHODS if name != "hierarchical"]


def tower(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.Tanh(), nn.Linear(16, DIM)).double()


class World:
    """A student that has moved away from its original, a batch, and adversarial pictures."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.student, self.original = tower(1), tower(2)
        weights = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator).double(), dim=-1)
        self.images = torch.rand(COUNT, 3, 8, 8, generator=generator).double()
        self.adversarial = (self.images + 0.1 * torch.randn(self.images.shape, generator=generator)).clamp(0, 1)
        self.labels = torch.randint(CLASSES, (COUNT,), generator=generator)
        self.batch = Batch(self.images, self.labels, self.original(self.images).detach())
        self.proxy = tower(3)
        proxy_texts = Texts(weights.flip(0), 15.0)
        self.networks = Networks(self.student, Texts(weights, 20.0), self.original, self.proxy, proxy_texts)

    def gradients(self, method: Any) -> Tensor:
        self.student.zero_grad()
        self.original.zero_grad()
        torch.autograd.backward(method.loss(self.networks, self.batch, self.adversarial).total)
        return torch.cat([parameter.grad.flatten() for parameter in self.student.parameters()])


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


def test_the_formulas() -> None:
    world = World()
    moved, clean = world.student(world.adversarial), world.student(world.images)
    anchor, weights = world.batch.anchor, world.networks.texts.weights
    logits = [20 * cosine(f[:, None], weights[None]) for f in (moved, clean, world.original(world.adversarial))]
    own = logits[0].log_softmax(-1)[torch.arange(COUNT), world.labels]

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()

    soft = (20 * 1.8 * 0.4 * cosine(anchor[:, None], weights[None])).softmax(-1)
    expected = {
        "fare": ((moved - anchor) ** 2).sum(1).mean(),
        "tecoa": -own.mean(),
        "simclip": -cosine(moved, anchor).mean(),
        "pmg_aft": -own.mean() + kl(logits[2], logits[0]) + kl(logits[1], logits[0]),
        "agft": -(soft * (1.8 * logits[0]).log_softmax(-1)).sum(-1).mean(),
        "hpt_gpd": kl(15 * cosine(world.proxy(world.adversarial)[:, None], weights.flip(0)[None]), logits[0])
        + 0.001 * kl(20 * cosine(anchor[:, None], weights[None]), logits[0]),
    }
    assert expected.keys() == set(PLAIN)
    for name, value in expected.items():
        found = METHODS[name]().loss(world.networks, world.batch, world.adversarial)
        assert torch.allclose(found.total, value), name
        assert all(part.ndim == 0 for part in found.parts.values())
    bare = METHODS["pmg_aft"](published_code=True).loss(world.networks, world.batch, world.adversarial)
    parts = [kl(logits[2] / 20, logits[0] / 20), kl(logits[1] / 20, logits[0] / 20)]
    label = -(logits[0] / 20).log_softmax(-1)[torch.arange(COUNT), world.labels].mean()
    assert torch.allclose(bare.total, label + COUNT * (parts[0] + parts[1]))


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_reach_the_student_alone(name: str) -> None:
    world = World()
    assert world.gradients(METHODS[name]()).abs().sum() > 0
    for frozen in (world.original, world.proxy):
        assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("name", PLAIN)
def test_the_student_runs_as_often_as_declared(name: str) -> None:
    world, calls = World(), []
    world.student.register_forward_hook(lambda *_: calls.append(1))
    method = METHODS[name]()
    method.loss(world.networks, world.batch, world.adversarial)
    assert len(calls) == method.forwards


def test_a_symmetric_stop_gradient_is_half_a_cosine() -> None:
    world = World()
    shared = world.gradients(METHODS["simclip"](clean_branch="shared"))
    world.student.zero_grad()
    plain = -cosine(world.student(world.adversarial), world.student(world.images)).mean()
    torch.autograd.backward(plain)
    whole = torch.cat([parameter.grad.flatten() for parameter in world.student.parameters()])
    assert torch.allclose(shared, whole / 2)


def test_the_frozen_form_has_one_live_term() -> None:
    world = World()
    found = world.gradients(METHODS["simclip"]())
    world.student.zero_grad()
    torch.autograd.backward(-cosine(world.student(world.adversarial), world.batch.anchor).mean() / 2)
    assert torch.allclose(found, torch.cat([parameter.grad.flatten() for parameter in world.student.parameters()]))


def test_the_teacher_comes_first_in_a_divergence() -> None:
    teacher = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    student = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(divergence(teacher, student), (p * (p / q).log()).sum(-1))
    assert not torch.allclose(divergence(teacher, student), divergence(student, teacher))
    batchmean = torch.nn.functional.kl_div(q.log(), p, reduction="batchmean")
    assert torch.allclose(divergence(teacher, student).mean(), batchmean)


@pytest.mark.parametrize("name", PLAIN)
def test_the_attack_raises_the_objective_and_spares_the_weights(name: str) -> None:
    world = World()
    world.student.float()
    texts = replace(world.networks.texts, weights=world.networks.texts.weights.float())
    networks = replace(world.networks, texts=texts)
    batch = Batch(world.images.float(), world.labels, world.batch.anchor.float())
    objective = METHODS[name]().objective(networks, batch)
    threat = ThreatModel("linf", 8 / 255)
    never = torch.zeros(COUNT, dtype=torch.bool)
    problem = Problem(batch.images, threat, objective, lambda outputs, items: never[items], torch.arange(COUNT))
    oracle = WhiteBox(world.student, problem)
    forwards: list[int] = []
    world.student.register_forward_hook(lambda *_: forwards.append(1))
    result = drive(PGD(iterations=10, keep="last", stop_fooled=False), problem, oracle, keep_fooled=False)
    assert len(forwards) == 10
    assert all(parameter.grad is None and parameter.requires_grad for parameter in world.student.parameters())
    items = torch.arange(COUNT)
    with torch.no_grad():
        before, after = (objective(world.student(pixels), items) for pixels in (batch.images, result.images))
    assert (after > before).all()


def test_bare_cosines_make_another_attack() -> None:
    world = World()
    world.student.float()
    gradients = []
    for code in (False, True):
        networks = replace(world.networks, texts=Texts(world.networks.texts.weights.float(), 100.0))
        batch = Batch(world.images.float(), world.labels, world.batch.anchor.float())
        objective = METHODS["pmg_aft"](published_code=code).objective(networks, batch)
        pixels = batch.images.clone().requires_grad_()
        loss = objective(world.student(pixels), torch.arange(COUNT)).sum()
        gradients.append(torch.autograd.grad(loss, pixels)[0].sign())
    assert (gradients[0] != gradients[1]).float().mean() > 0.05


def test_hpt_gpd_warms_up_averages_and_is_pulled_back() -> None:
    world, method = World(), METHODS["hpt_gpd"](anchored_share=0.25, pull=0.5, average=0.9)
    assert [(phase.name, phase.share, phase.rate) for phase in method.phases] == [
        ("anchored", 0.25, 0.1),
        ("distil", 0.75, 1.0),
    ]
    texts = world.networks.texts
    warm = method.loss(world.networks, world.batch, world.adversarial, "anchored").total
    student = texts.logits(world.student(world.adversarial))
    assert torch.allclose(warm, divergence(texts.logits(world.batch.anchor), student).mean())
    alone = replace(world.networks, proxy=None, proxy_texts=None)
    assert torch.allclose(method.loss(alone, world.batch, world.adversarial, "anchored").total, warm)
    with pytest.raises(ValueError, match="another architecture"):
        method.loss(alone, world.batch, world.adversarial, "distil")
    summed = METHODS["hpt_gpd"](batch_sum=True).loss(world.networks, world.batch, world.adversarial, "anchored").total
    assert torch.allclose(summed, COUNT * warm)

    def at(value: float) -> dict[str, Tensor]:
        return {"w": torch.full((2,), value), "n": torch.tensor(int(value))}

    weights, kept = method.after_epoch("anchored", at(1.0), None)
    weights, kept = method.after_epoch("anchored", at(2.0), kept)
    assert torch.equal(weights["w"], at(2.0)["w"])
    assert torch.allclose(kept["w"], torch.tensor(0.9 * 1 + 0.1 * 2))
    weights, kept = method.after_phase("anchored", weights, kept)
    assert torch.allclose(weights["w"], torch.tensor(1.1))
    weights, _ = method.after_epoch("distil", at(3.0), kept)
    assert torch.allclose(weights["w"], torch.tensor((3 + 1.1) / 2))
    assert weights["n"] == 3
    for pull, value in ((0.0, 3.0), (1.0, 1.1)):
        end, _ = METHODS["hpt_gpd"](pull=pull).after_epoch("distil", at(3.0), kept)
        assert torch.allclose(end["w"], torch.tensor(value))
    assert [phase.name for phase in METHODS["hpt_gpd"](anchored_share=0.0).phases] == ["distil"]


def test_options_are_checked() -> None:
    for name, options in (
        ("simclip", {"clean_branch": "both"}),
        ("pmg_aft", {"general": -1.0}),
        ("agft", {"softening": 0.0}),
        ("hpt_gpd", {"pull": 1.5}),
    ):
        with pytest.raises(OptionError):
            METHODS[name](**options)
