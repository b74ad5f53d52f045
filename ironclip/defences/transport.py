"""Optimal transport between few points and few others, for many pairs at once: [B, N] against [B, K, M].

Three couplings: `sinkhorn` (entropic, Cuturi 2013), `product` (no transport at all), `exact` (a linear program each, by
POT). All three are differentiated by the envelope theorem: the gradient of an optimal value is the optimal plan with
respect to the costs, and the potentials with respect to the weights (Danskin 1967); no iteration is unrolled. That is
exact at the optimum: ten iterations come near enough for costs of cosines at epsilon 0.1, one or two do not.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Coupling = Literal["sinkhorn", "product", "exact"]
# Kernels are exp((MIDDLE - cost) / epsilon): a middling cost keeps both ends of their range inside float32.
MIDDLE = 0.5
COUPLINGS: tuple[Coupling, ...] = ("sinkhorn", "product", "exact")


def transport_cost(
    cost: Tensor, a: Tensor, b: Tensor, coupling: Coupling, *, epsilon: float = 0.1, iterations: int = 10
) -> Tensor:
    """Cost of moving the weights ``a`` onto ``b``.

    Args:
        cost: [B, N, K, M], in [0, 2].
        a: [B, N], weights of the first points; each row sums to 1.
        b: [B, K, M], weights of the second ones; each row sums to 1, and may hold zeros.
        coupling: `exact` is ``min <T, cost>``; `sinkhorn` is ``min <T, cost> + epsilon KL(T | a x b)``, which lies
            between `exact` and `product`; `product` is ``<a x b, cost>``.
        epsilon: of `sinkhorn`; at least 0.05, or exp(-2 / epsilon) leaves too few digits of float32.
        iterations: of `sinkhorn`; a fixed number, so that nothing waits for the device.

    Returns:
        [B, K]; differentiable with respect to ``cost``, ``a`` and ``b``.
    """
    if coupling == "product":
        return torch.einsum("bn,bkm,bnkm->bk", a, b, cost)
    if coupling == "exact":
        result: Tensor = _Exact.apply(cost, a, b)
        return result
    value: Tensor = _Sinkhorn.apply(cost, a, b, epsilon, iterations)
    return value


def _scalings(kernel: Tensor, a: Tensor, b: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Sinkhorn's scalings u [B, N, K] and v [B, K, M] of the plan ``a u kernel v b``; columns are met exactly."""
    u = torch.ones(kernel.shape[:3], dtype=kernel.dtype, device=kernel.device)
    sums = torch.empty_like(b)
    for iteration in range(iterations + 1):
        weighted = (a[:, :, None] * u)[..., None]
        torch.mul(kernel[:, 0], weighted[:, 0], out=sums)
        for n in range(1, kernel.shape[1]):
            sums.addcmul_(kernel[:, n], weighted[:, n])
        if iteration == iterations:
            break
        u = torch.linalg.vecdot(kernel, (b / sums)[:, None]).reciprocal()
    return u, sums.reciprocal()


def kernel_cost(kernel: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int) -> Tensor:
    """`sinkhorn` from its kernel, for who can make that without the costs: without gradients.

    Args:
        kernel: ``exp((MIDDLE - cost) / epsilon)``, [B, N, K, M].
        a, b, epsilon, iterations: as `transport_cost`.
    """
    u, v = _scalings(kernel, a, b, iterations)
    return _dual(a, b, epsilon * u.log(), epsilon * v.log())


def _dual(a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor:
    # Columns are met exactly, so the plan sums to one and the dual needs no further term.
    value: Tensor = torch.einsum("bn,bnk->bk", a, f) + torch.linalg.vecdot(b, g) + MIDDLE
    return value


class _Sinkhorn(torch.autograd.Function):
    """The dual value epsilon (<a, log u> + <b, log v>) and its gradients."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor, epsilon: float, iterations: int) -> Tensor:
        kernel = (cost - MIDDLE).mul_(-1 / epsilon).exp_()
        u, v = _scalings(kernel, a, b, iterations)
        f, g = epsilon * u.log(), epsilon * v.log()
        ctx.save_for_backward(kernel, a, b, u, v, f, g)
        return _dual(a, b, f, g)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kernel, a, b, u, v, f, g = ctx.saved_tensors
        grad: Tensor = grads[0]
        plan = kernel * ((a[:, :, None] * u) * grad[:, None])[..., None] * (b * v)[:, None]
        return plan, torch.einsum("bk,bnk->bn", grad, f), grad[..., None] * g, None, None


class _Exact(torch.autograd.Function):
    """POT's network simplex for each pair, in float64 on the CPU; plans and potentials are its own."""

    @staticmethod
    def forward(ctx: Any, cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        import ot  # a second of every start, and needed for this alone

        costs, first, second = (t.detach().double().cpu().numpy() for t in (cost, a, b))
        plans, value = np.zeros_like(costs), np.zeros(second.shape[:2])
        f, g = np.zeros((costs.shape[0], costs.shape[2], costs.shape[1])), np.zeros_like(second)
        for i in range(costs.shape[0]):
            rows = first[i] / first[i].sum()
            for k in range(costs.shape[2]):
                there = np.flatnonzero(second[i, k] > 0)
                columns = second[i, k, there] / second[i, k, there].sum()
                matrix = np.ascontiguousarray(costs[i, :, k, there].T)
                plan, log = ot.emd(rows, columns, matrix, log=True)
                plans[i, :, k, there], value[i, k] = plan.T, log["cost"]
                f[i, k], g[i, k, there] = log["u"], log["v"]
        ctx.save_for_backward(*(torch.from_numpy(x).to(cost) for x in (plans, f, g)))
        return torch.from_numpy(value).to(cost)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        plans, f, g = ctx.saved_tensors
        grad: Tensor = grads[0]
        return plans * grad[:, None, :, None], torch.einsum("bk,bkn->bn", grad, f), grad[..., None] * g
