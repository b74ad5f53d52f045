"""Optimal transport: against POT and a linear program, marginals, limits, and gradients against finite differences."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from ironclip.defences.transport import COUPLINGS, Coupling, _scalings, transport_cost


def problem(b: int = 2, n: int = 5, k: int = 3, m: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cost = 0.7 + 0.2 * torch.rand(b, n, k, m, generator=generator, dtype=torch.float64)
    first = torch.randn(b, n, generator=generator, dtype=torch.float64).softmax(-1)
    second = torch.randn(b, k, m, generator=generator, dtype=torch.float64).softmax(-1)
    return cost, first, second


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 1.0])
def test_plans_are_pots(epsilon: float) -> None:
    cost, a, b = problem(1, 5, 4, 50)
    value = transport_cost(cost, a, b, "sinkhorn", epsilon=epsilon, iterations=500)
    for k in range(4):
        plan = torch.from_numpy(
            ot.sinkhorn(a[0].numpy(), b[0, k].numpy(), cost[0, :, k].numpy(), epsilon, stopThr=1e-14, numItermax=5000)
        )
        divergence = (plan * (plan / (a[0, :, None] * b[0, k])).log()).sum()
        torch.testing.assert_close(value[0, k], (plan * cost[0, :, k]).sum() + epsilon * divergence, atol=1e-9, rtol=0)


def test_rows_and_columns_are_met() -> None:
    cost, a, b = (t.float() for t in problem(4, 5, 100, 50))
    kernel = ((0.5 - cost) / 0.1).exp()
    u, v = _scalings(kernel, a, b, 10)
    plan = a[:, :, None, None] * u[..., None] * kernel * (v * b)[:, None]
    assert float((plan.sum(1) - b).abs().max()) < 1e-5
    assert float((plan.sum(-1) - a[:, :, None]).abs().max()) < 1e-5


def test_the_exact_coupling_is_the_linear_program() -> None:
    cost, a, b = problem(1, 5, 3, 50)
    values = transport_cost(cost, a, b, "exact")
    rows = np.kron(np.eye(5), np.ones((1, 50)))
    columns = np.kron(np.ones((1, 5)), np.eye(50))
    for k in range(3):
        found = linprog(
            cost[0, :, k].numpy().ravel(),
            A_eq=np.vstack([rows, columns]),
            b_eq=np.concatenate([a[0].numpy(), b[0, k].numpy()]),
        )
        assert abs(found.fun - float(values[0, k])) < 1e-6


def test_sinkhorn_lies_between_exact_and_product_and_nears_them() -> None:
    cost, a, b = problem()
    exact, product = (transport_cost(cost, a, b, coupling) for coupling in ("exact", "product"))
    gaps = []
    for epsilon in (100.0, 1.0, 0.1, 0.05):
        value = transport_cost(cost, a, b, "sinkhorn", epsilon=epsilon, iterations=300)
        assert bool((value >= exact - 1e-9).all())
        assert bool((value <= product + 1e-9).all())
        gaps.append(float((value - exact).max()))
    assert gaps == sorted(gaps, reverse=True)
    nearly = transport_cost(cost, a, b, "sinkhorn", epsilon=1000.0, iterations=5)
    torch.testing.assert_close(nearly, product, atol=1e-5, rtol=0)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_gradients_are_finite_differences(coupling: Coupling) -> None:
    cost, a, b = problem()
    score = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value(cost: Tensor, first: Tensor, second: Tensor) -> Tensor:
        found = transport_cost(cost, first.softmax(-1), second.softmax(-1), coupling, epsilon=0.1, iterations=200)
        return (found * score).sum()

    leaves = [cost.requires_grad_(), a.log().requires_grad_(), b.log().requires_grad_()]
    gradients = torch.autograd.grad(value(*leaves), leaves)
    generator = torch.Generator().manual_seed(2)
    for i, (leaf, gradient) in enumerate(zip(leaves, gradients, strict=True)):
        direction = torch.randn(leaf.shape, dtype=torch.float64, generator=generator)
        moved = [[*leaves] for _ in range(2)]
        for j, sign in enumerate((1, -1)):
            moved[j][i] = leaf + sign * 1e-6 * direction
        measured = (value(*moved[0]) - value(*moved[1])) / 2e-6
        torch.testing.assert_close(measured, (gradient * direction).sum(), atol=1e-6, rtol=1e-4)


def test_ten_iterations_are_enough_for_the_gradient() -> None:
    """Danskin's theorem is of the optimum; after ten iterations the rest must not be seen in float32."""
    cost, a, b = problem(2, 5, 20, 50)
    gradients = []
    for iterations in (10, 1000):
        leaf = cost.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(transport_cost(leaf, a, b, "sinkhorn", iterations=iterations).sum(), leaf)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_absent_texts_have_no_say(coupling: Coupling) -> None:
    cost, a, b = problem()
    wide = torch.cat([cost, torch.full_like(cost[..., :2], 1.0)], -1).requires_grad_()
    padded = torch.cat([b, torch.zeros_like(b[..., :2])], -1)
    value = transport_cost(wide, a, padded, coupling)
    torch.testing.assert_close(value, transport_cost(cost, a, b, coupling))
    (gradient,) = torch.autograd.grad(value.sum(), wide)
    assert bool(gradient.isfinite().all())
    assert float(gradient[..., -2:].abs().max()) == 0
