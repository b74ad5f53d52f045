"""What every attack in ATTACKS must hold to, whatever it does in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ironclip.attacks import (
    ATTACKS,
    Attack,
    Problem,
    Query,
    Run,
    ThreatModel,
    WhiteBox,
    classification,
    drive,
    make_attack,
)
from ironclip.errors import OptionError
from ironclip.noise import integers, normal, signs, uniform

QUICK: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "pgd": {"iterations": 5},
    "cw": {"iterations": 5},
    "apgd": {"iterations": 12},
    "apgd-ce": {"iterations": 12},
    "apgd-dlr": {"iterations": 12},
    "apgd-t": {"iterations": 12, "classes": 3},
    "fab-t": {"iterations": 12, "classes": 3},
    "square": {"queries": 400},
    "autoattack": {"iterations": 6, "queries": 40, "classes": 3},
    "autoattack-ensemble": {"iterations": 8, "classes": 3},
    "autoattack-rand": {"iterations": 8},
}
THREATS = [ThreatModel("linf", 8 / 255), ThreatModel("l2", 0.9)]


class Small(nn.Module):
    """A small convolutional net with batch norm, ten classes unless said otherwise."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.Flatten()
            )
            self.head = nn.Linear(8 * 16, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return 8 * self.head(self.body(pixels - 0.5))


def a_problem(model: nn.Module, threat: ThreatModel, count: int = 12, targeted: bool = False, **more: Any) -> Problem:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    images[0, :, :4] = 0.0  # on the rim of the cube
    images[1, :, :4] = 1.0
    with torch.no_grad():
        labels = model.eval()(images).argmax(1)
    targets = (labels + 1) % 10 if targeted else None
    return classification(images, labels, threat, targets=targets, **more)


def subset(problem: Problem, rows: Tensor) -> Problem:
    assert problem.labels is not None
    targets = problem.targets[rows] if problem.targets is not None else None
    return classification(
        problem.images[rows], problem.labels[rows], problem.threat, targets=targets, keys=problem.keys[rows]
    )


def test_every_attack_is_tested() -> None:
    assert QUICK.keys() == ATTACKS.keys()


@pytest.fixture(params=list(QUICK))
def attack(request: pytest.FixtureRequest) -> Attack:
    made = make_attack(request.param, QUICK[request.param])
    assert made.name == request.param
    return made


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_pixels_stay_inside_and_the_weights_alone(attack: Attack, threat: ThreatModel) -> None:
    model = Small().train()
    model.head.weight.requires_grad_(False)
    for parameter in model.body.parameters():
        parameter.grad = torch.ones_like(parameter)
    problem = a_problem(model, threat)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    oracle = WhiteBox(model, problem, batch_size=5)
    asked: list[Query] = []

    def watched(query: Query) -> Any:
        asked.append(query)
        assert query.pixels.dtype == torch.float32
        assert not query.pixels.requires_grad
        assert len(query.items.unique()) == len(query.items) == len(query.pixels)
        assert query.gradient <= attack.gradients
        answer = oracle(query)
        assert (answer.gradient is not None) == query.gradient
        return answer

    with torch.no_grad():  # as an evaluation loop does
        result = drive(attack, problem, watched)
    for query in asked:
        assert query.pixels.min() >= 0
        assert query.pixels.max() <= 1
        if attack.name not in ("fab-t", "autoattack"):
            assert problem.threat.distances(problem.images[query.items], query.pixels).max() <= threat.eps + 1e-6
    assert problem.threat.distances(problem.images, result.images).max() <= threat.eps + 1e-6
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert model.training
    assert not model.head.weight.requires_grad
    assert all(parameter.requires_grad for parameter in model.body.parameters())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.body.parameters() if p.grad is not None)
    assert model.head.weight.grad is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert int(result.forwards.sum()) == sum(len(query.items) for query in asked)
    assert int(result.backwards.sum()) == sum(len(query.items) for query in asked if query.gradient)
    assert [query.step for query in asked] == sorted({query.step for query in asked})


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.norm)
def test_it_fools_and_says_whom_truthfully(attack: Attack, threat: ThreatModel) -> None:
    model = Small().eval()
    problem = a_problem(model, threat)
    result = drive(attack, problem, WhiteBox(model, problem))
    with torch.no_grad():
        said = model(result.images).argmax(1) != problem.labels
    assert not (result.fooled & ~said).any()
    noise = problem.threat.project(
        problem.images,
        problem.images + threat.eps * signs(problem.keys, problem.images.shape[1:], seed=9, step=0) * 0.99,
    )
    with torch.no_grad():
        by_noise = (model(noise).argmax(1) != problem.labels).sum()
    assert result.fooled.sum() > int(by_noise)


def test_batch_mates_do_not_matter(attack: Attack) -> None:
    model = Small().double().eval()

    def in_double(pixels: Tensor) -> Tensor:
        return model(pixels.double())

    problem = a_problem(Small(), THREATS[0])
    whole = drive(attack, problem, WhiteBox(in_double, problem))
    rows = torch.tensor([7, 2])
    part = subset(problem, rows)
    alone = drive(attack, part, WhiteBox(in_double, part))
    assert torch.allclose(alone.images, whole.images[rows], atol=1e-5)
    assert torch.equal(alone.fooled, whole.fooled[rows])
    assert torch.equal(alone.forwards, whole.forwards[rows])


def test_an_empty_ball_is_the_identity(attack: Attack) -> None:
    model = Small().eval()
    problem = a_problem(model, ThreatModel("linf", 0.0))
    result = drive(attack, problem, WhiteBox(model, problem))
    assert torch.equal(result.images, problem.images)
    assert not result.fooled.any()
    wrong = classification(problem.images, (problem.labels + 1) % 10, problem.threat)  # type: ignore[operator]
    assert drive(attack, wrong, WhiteBox(model, wrong)).fooled.all()


def test_nobody_to_attack_is_no_error(attack: Attack) -> None:
    model = Small().eval()
    problem = a_problem(model, THREATS[0], count=2)
    empty = subset(problem, torch.tensor([], dtype=torch.int64))
    assert drive(attack, empty, WhiteBox(model, empty)).images.shape == (0, 3, 16, 16)


def test_the_same_twice(attack: Attack) -> None:
    model = Small().eval()
    problem = a_problem(model, THREATS[1])
    first, second = (drive(attack, problem, WhiteBox(model, problem)) for _ in range(2))
    assert torch.equal(first.images, second.images)


def test_items_that_are_fooled_cost_no_more(attack: Attack) -> None:
    model = Small().eval()
    problem = a_problem(model, ThreatModel("linf", 64 / 255))
    run = Run(attack, problem)
    oracle = WhiteBox(model, problem)
    while run.query is not None:
        asked, fooled = run.query.items, run.fooled.clone()
        assert not fooled[asked].any()
        run.answer(oracle(run.query))
    assert run.done
    with pytest.raises(RuntimeError, match="ended"):
        run.answer(oracle(Query(problem.images, torch.arange(12), problem.objective, False, 0)))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "apgd-ce", "square"])
def test_targets_are_reached(name: str) -> None:
    model = Small().eval()
    problem = a_problem(model, ThreatModel("linf", 48 / 255), targeted=True)
    options = {"queries": 600} if name == "square" else QUICK[name]
    result = drive(make_attack(name, options), problem, WhiteBox(model, problem))
    with torch.no_grad():
        said = model(result.images).argmax(1)
    assert torch.equal(said == problem.targets, result.fooled)
    assert result.fooled.float().mean() > (0.1 if name == "fgsm" else 0.5)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["apgd-dlr", "apgd-t", "fab-t", "square"])
def test_few_classes_are_attacked_too(name: str, classes: int) -> None:
    model = Small(classes).eval()
    problem = a_problem(model, ThreatModel("linf", 64 / 255))
    options = {"queries": 600} if name == "square" else QUICK[name]
    assert drive(make_attack(name, options), problem, WhiteBox(model, problem)).fooled.all()


def test_a_masked_model_is_noticed() -> None:
    model = Small().eval()
    problem = a_problem(model, THREATS[0])
    result = drive(
        make_attack("pgd"), problem, WhiteBox(lambda pixels: model((pixels * 8).round() / 8 + 0 * pixels), problem)
    )
    assert (result.zero_gradients == result.backwards).all()


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"no attack 'nought'; there are: fgsm, pgd"):
        make_attack("nought")
    with pytest.raises(OptionError, match=r"options iterations, step_size.*given were: eps"):
        make_attack("pgd", {"eps": 1})
    with pytest.raises(OptionError, match="at least 1"):
        make_attack("apgd-ce", {"iterations": 0})
    with pytest.raises(OptionError, match="finite number"):
        ThreatModel("linf", float("nan"))
    with pytest.raises(ValueError, match="normalisation belongs inside"):
        classification(torch.full((1, 3, 4, 4), 2.0), torch.zeros(1, dtype=torch.int64), THREATS[0])


def test_noise_is_uniform_normal_and_the_items_own() -> None:
    keys = torch.arange(400)
    draws = uniform(keys, (50,), seed=1, step=0)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    histogram = torch.histc(draws, 20, 0, 1) / draws.numel()
    assert (histogram - 0.05).abs().max() < 0.006
    for axis in (draws, draws.T):  # neighbours in items and in positions do not follow each other
        centred = axis - axis.mean()
        assert abs((centred[1:] * centred[:-1]).mean() / centred.square().mean()) < 0.03
    bell = normal(keys, (50,), seed=1, step=0)
    assert abs(bell.mean()) < 0.03
    assert abs(bell.std() - 1) < 0.02
    assert abs(bell.pow(4).mean() - 3) < 0.3
    assert set(integers(keys, (3,), 7, seed=0, step=0).unique().tolist()) == set(range(7))
    assert torch.equal(uniform(keys[5:7], (50,), seed=1, step=0), draws[5:7])
    for other in ({"seed": 2}, {"step": 1}, {"stream": 1}, {"seed": 1 + (1 << 40)}):
        assert not torch.equal(uniform(keys, (50,), **{"seed": 1, "step": 0, **other}), draws)
    far = torch.tensor([3, 3 + (1 << 33)])
    assert not torch.equal(*uniform(far, (9,), seed=0, step=0))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("pgd", {"iterations": "10"}, "iterations of the attack 'pgd' is a whole number, not '10'"),
        ("pgd", {"iterations": 2.5}, "iterations .* is a whole number"),
        ("pgd", {"iterations": True}, "iterations .* is a whole number"),
        ("pgd", {"step_size": float("nan")}, "step_size .* is a finite number"),
        ("pgd", {"keep": "first"}, "keep .* is one of best, last"),
        ("pgd", {"stop_fooled": 1}, "stop_fooled .* is a yes or no"),
        ("square", {"queries": "x"}, "queries .* is a whole number"),
        ("apgd-t", {"classes": None}, "classes .* is a whole number"),
        ("autoattack", {"iterations": 1.0}, "iterations .* is a whole number"),
    ],
)
def test_options_of_another_kind_are_refused(name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        make_attack(name, options)
    assert make_attack("pgd", {"step_size": 0, "momentum": 1})  # whole numbers are numbers
