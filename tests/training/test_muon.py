"""Muon against its definition, and against AdamW where whitening is what matters."""

import copy

import pytest
import torch

from training.muon import BLOCK, Muon, in_blocks, orthogonalise
from training.towers import build_optimisers


@pytest.mark.parametrize("shape", [(1, 48, 48), (1, 16, 200), (3, 200, 16)])
def test_all_directions_come_out_about_equally_long(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices[:, 0] *= 30  # one direction that would drown the others
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.35
    # The smallest of a square matrix may need more rounds; all but a few are up.
    assert (values > 0.5).float().mean() > 0.9
    assert torch.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (8, 500), (2 * BLOCK, 2 * BLOCK), (BLOCK + 1, BLOCK + 1)])
def test_updates_are_as_large_as_adamws(shape: tuple[int, ...]) -> None:
    update = in_blocks(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-6)
    assert update.shape == shape
    assert 0.1 < update.square().mean().sqrt() < 0.3


def test_badly_scaled_regression_is_solved_where_adamw_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 32, generator=generator) @ torch.diag(torch.logspace(0, -2, 32))
    inputs = inputs @ torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q
    target = inputs @ torch.randn(32, 16, generator=generator)

    def left_after(steps: int, make: type[torch.optim.Optimizer]) -> float:
        weight = torch.nn.Parameter(torch.zeros(16, 32))
        optimiser = make([weight], lr=0.1)  # type: ignore[call-arg]
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / steps)
            loss = (inputs @ weight.T - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return loss.item()

    assert left_after(200, Muon) < 0.5 * left_after(200, torch.optim.AdamW)


def test_state_goes_through_a_checkpoint() -> None:
    def steps(optimiser: torch.optim.Optimizer, weight: torch.nn.Parameter, count: int) -> None:
        for _ in range(count):
            weight.grad = torch.sin(weight.detach() * 3) + 0.1
            optimiser.step()

    first = torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    straight = Muon([first], lr=0.05, weight_decay=0.1)
    steps(straight, first, 2)
    second = torch.nn.Parameter(first.detach().clone())
    resumed = Muon([second], lr=0.0)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    steps(straight, first, 3)
    steps(resumed, second, 3)
    assert torch.equal(first, second)


def test_every_parameter_has_one_optimiser() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 5))
    for kind in ("adamw", "muon"):
        groups = [g for o in build_optimisers(model, kind, 0.1) for g in o.param_groups]  # type: ignore[arg-type]
        held = [parameter for group in groups for parameter in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        assert len(held) == len(list(model.parameters()))
        assert all(p.ndim > 1 for g in groups if g["weight_decay"] for p in g["params"])
