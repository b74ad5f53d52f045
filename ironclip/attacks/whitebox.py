"""Answers an attack's queries from a differentiable model: forward, and backward to the pixels alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ironclip.attacks.contract import Answer, Problem, Query

Model = Callable[[Tensor], Tensor]


@contextmanager
def as_found(model: object) -> Iterator[None]:
    """Evaluate a module with its weights frozen, and leave modes and ``requires_grad`` as they were.

    Frozen, so that a backward pass goes to the pixels alone: half the work, and no ``grad`` is touched.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


class WhiteBox:
    """The oracle for `drive`: evaluates a model, in its own dtype, and takes gradients with respect to the pixels.

    Args:
        model: pixels in [0, 1] [b, 3, R, R] -> outputs [b, ...]; normalisation inside. A module is put into evaluation
            mode with frozen weights for each query and left as found.
        problem: whose verdict counts.
        batch_size: pixels in one forward at most; a query is cut into such parts.
        draws: for a random model: step -> the model's variants for this step. Loss and gradient are means over them
            (expectation over transformation, Athalye et al. 2018); fooled is what fools more than half.
    """

    def __init__(
        self,
        model: Model,
        problem: Problem,
        *,
        batch_size: int = 256,
        draws: Callable[[int], Sequence[Model]] | None = None,
    ) -> None:
        self._model = model
        self._problem = problem
        self._batch_size = batch_size
        self._draws = draws

    def __call__(self, query: Query) -> Answer:
        """Answer one query."""
        models = [self._model] if self._draws is None else list(self._draws(query.step))
        parts = []
        with as_found(self._model):
            for rows in torch.split(torch.arange(len(query.pixels), device=query.pixels.device), self._batch_size):
                parts.append(self._answer(query, rows, models))
        if len(parts) == 1:
            return parts[0]
        return Answer(
            torch.cat([part.loss for part in parts]),
            torch.cat([part.fooled for part in parts]),
            torch.cat([part.outputs for part in parts]),
            torch.cat([part.gradient for part in parts if part.gradient is not None]) if query.gradient else None,
        )

    def _answer(self, query: Query, rows: Tensor, models: Sequence[Model]) -> Answer:
        items = query.items[rows]
        answers = [self._draw(query, query.pixels[rows], items, model) for model in models]
        if len(answers) == 1:
            return answers[0]
        gradients = [answer.gradient for answer in answers if answer.gradient is not None]
        return Answer(
            torch.stack([answer.loss for answer in answers]).mean(0),
            torch.stack([answer.fooled for answer in answers]).float().mean(0) > 0.5,
            torch.stack([answer.outputs for answer in answers]).mean(0),
            torch.stack(gradients).mean(0) if gradients else None,
        )

    def _draw(self, query: Query, pixels: Tensor, items: Tensor, model: Model) -> Answer:
        # Enabled here, whatever the caller's mode: an evaluation loop usually runs under no_grad.
        with torch.inference_mode(False), torch.set_grad_enabled(query.gradient):
            pixels = pixels.detach().clone().requires_grad_(query.gradient)
            outputs = model(pixels)
            loss = query.objective(outputs, items)
            # The sum: each item's gradient is its own, whatever the size of the batch.
            gradient = torch.autograd.grad(loss.sum(), pixels)[0].float() if query.gradient else None
        outputs = outputs.detach()
        return Answer(loss.detach().float(), self._problem.fooled(outputs, items), outputs, gradient)
