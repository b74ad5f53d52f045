"""The hierarchical method: image and text aligned at every level of class trees, in hyperbolic space, under one attack.

Dong, Zhang, Zhu, Ong, Koniusz 2026, "Hierarchically robust zero-shot vision-language models" (arXiv 2604.18867).
Re-implemented after reading notes, not after the paper's text. From the notes: the Poincare ball and the Einstein
midpoint (eq. 8), the neighbour-aware alignment (eq. 9), one perturbation against the weighted sum over levels (eq. 10)
with omega_l = 1 - l/(L+1), the violation loss, the label gap (eq. 11), the total (eq. 14). Inferred: eq. 9's set of
neighbours (no edge with the node), eq. 13's form, hinges and means in place of bare sums, features scaled without
normalisation, curvature, margins, weights, the decision at inference, the text side's perturbation.

A node's picture is the midpoint of its pictures in the batch, so the loss couples a batch; across processes features
are gathered with their gradients. Trained are the image tower, the text projection, two scales and the temperature.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.attacks.objectives import Objective
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.hierarchy import LabelTree
from ironclip.hyperbolic import ball_norm, paired_distances
from ironclip.labels import Label, LabelSet
from training.methods.base import Batch, Losses, Networks, Plain
from training.methods.hyperbolic_head import NO_RIVAL, HierarchicalHead
from training.methods.nodes import make_nodes


@dataclass(frozen=True)
class Hierarchical(Plain):
    """L = sum_l omega_l CE(p^l) + lambda_1 L_vic + lambda_2 (L_gap^label + L_gap^intra) (eq. 14).

    Attributes:
        trees: files of label trees (JSON) over the training classes; the first is the one for ``data.per_parent``.
        levels: how many levels of each, the leaves first; 0 uses all.
        curvature: r of the ball.
        violation: lambda_1.
        gap: lambda_2.
        gap_margin: zeta_gap, by how much a child lies deeper than its parent.
        violation_quantile: zeta_vic as a quantile of the matched distances at the start.
        intra: ``instance`` wants a node's pictures deeper than its text, ``image`` wants child nodes' pictures deeper
            than their parents' (two readings of eq. 13).
        space: ``poincare``, or ``cosine`` for the same alignment on the sphere, without the losses that need depth: at
            one level, with one picture of each class, this is TeCoA.
        text_attack: ``none``; ``feature`` moves the texts' features before the projection; ``token`` moves token
            embeddings, through the text tower, of the nodes on the batch's paths.
        text_eps: radius (L-inf) in units of token embeddings; for ``feature`` scaled by the ratio of the root mean
            squares.
        text_steps: of its sign steps, each as long as the radius.
    """

    trees: tuple[str, ...] = ()
    levels: int = 0
    curvature: float = 1.0
    violation: float = 0.1
    gap: float = 1.0
    gap_margin: float = 0.05
    violation_quantile: float = 0.6
    intra: Literal["instance", "image"] = "instance"
    space: Literal["poincare", "cosine"] = "poincare"
    text_attack: Literal["none", "feature", "token"] = "none"
    text_eps: float = 2e-4
    text_steps: int = 1
    name: ClassVar[str] = "hierarchical"
    forwards: ClassVar[int] = 1
    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.curvature <= 0 or self.text_eps < 0 or self.text_steps < 1 or self.levels < 0:
            raise OptionError("curvature is above 0, text_eps and levels at least 0, text_steps at least 1.")
        if not 0 <= self.violation_quantile <= 1:
            raise OptionError("violation_quantile lies between 0 and 1.")

    def extra(
        self, encoder: Encoder, label_set: LabelSet, sample: Callable[[], tuple[Tensor, Tensor]]
    ) -> HierarchicalHead:
        """The head, its texts encoded once."""
        trees = [LabelTree.parse(_read_json(path)) for path in self.trees]
        nodes = make_nodes(label_set.names, trees, self.levels)
        upper = zip(nodes.names[len(label_set) :], nodes.prompts[len(label_set) :], strict=True)
        labels_of = [*label_set.labels, *(Label(name, own) for name, own in upper)]
        texts = [label_set.prompts(label) for label in labels_of]
        flat = [text for prompts in texts for text in prompts]
        with torch.no_grad():
            tokens = encoder.tokenize(flat, truncate=True)
            parts = [encoder.pool_tokens(part).to(encoder.mean.dtype) for part in torch.split(tokens, 256)]
            pooled = torch.stack([part.mean(0) for part in torch.split(torch.cat(parts), [len(p) for p in texts])])
        features, labels = sample()
        head = HierarchicalHead(
            encoder,
            nodes,
            pooled.to(features),
            (features, labels),
            curvature=self.curvature,
            quantile=self.violation_quantile,
            flat=self.space == "cosine",
        )
        if self.text_attack == "token":
            if any(len(prompts) > 1 for prompts in texts):
                raise OptionError("text_attack=token wants one prompt for each node: give one template")
            head.tokens = tokens
        return head

    def apply(self, encoder: Encoder, extra: nn.Module) -> None:
        """Write projection and head into an encoder: what is evaluated, and what the artifact holds."""
        assert isinstance(extra, HierarchicalHead)
        projection: Any = encoder.model.text_projection
        with torch.no_grad():
            if isinstance(projection, nn.Linear):
                projection.weight.copy_(extra.projection.T)
            else:
                projection.copy_(extra.projection)
        if extra.flat:
            return
        encoder.head = Head(
            "poincare",
            curvature=self.curvature,
            image_scale=extra.log_image_scale.exp().item(),
            text_scale=extra.log_text_scale.exp().item(),
            temperature=extra.temperature().item(),
        )

    def objective(self, networks: Networks, batch: Batch) -> Objective:
        """Eq. 10 with all levels at once: a node's loss, shared among its pictures."""
        head = _head(networks)
        with torch.no_grad():
            texts, temperature = head.texts(), head.temperature()
        plans: dict[tuple[int, ...], _Plan] = {}

        def loss(features: Tensor, items: Tensor) -> Tensor:
            # An attack that trains asks about the same pictures each time.
            key = tuple(items.tolist())
            if key not in plans:
                plans.clear()
                plans[key] = _plan(head, batch.labels[items])
            plan = plans[key]
            losses, _ = self._terms(head, head.images(features), plan, texts, temperature)
            share = losses / plan.counts
            return torch.where(plan.rows >= 0, share[plan.rows.clamp_min(0)], 0.0).sum(1)

        return loss

    def loss(self, networks: Networks, batch: Batch, adversarial: Tensor, phase: str = "train") -> Losses:
        """See the class."""
        head = _head(networks)
        points = head.images(networks.gather(networks.student(adversarial)))
        labels = networks.gather(batch.labels)
        plan = _plan(head, labels)
        texts = head.texts(self._text_shift(head, points.detach(), plan))
        losses, middles = self._terms(head, points, plan, texts, head.temperature())
        alignment = losses.sum()
        if head.flat:
            return Losses(alignment, {"alignment": alignment})
        matched = paired_distances(points, texts[labels], self.curvature)
        violation = F.relu(matched - head.tolerated).mean()
        depths = ball_norm(texts, self.curvature)
        edges = head.edges
        label_gap = _hinge(depths[edges[:, 1]] - depths[edges[:, 0]] + self.gap_margin)
        intra_gap = self._intra(head, plan, middles, depths)
        total = alignment + self.violation * violation + self.gap * (label_gap + intra_gap)
        parts = {"alignment": alignment, "violation": violation, "label_gap": label_gap, "intra_gap": intra_gap}
        return Losses(total, parts)

    def _terms(
        self, head: HierarchicalHead, points: Tensor, plan: _Plan, texts: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy [P] and midpoint [P, dim] of the rows with pictures: one scatter-add, one product."""
        middles = head.middles(points, plan.rows, len(plan.there))
        losses = head.losses(middles, texts, temperature, plan.nodes, plan.mask)
        return plan.weights * losses, middles

    def _intra(self, head: HierarchicalHead, plan: _Plan, middles: Tensor, depths: Tensor) -> Tensor:
        pictures = ball_norm(middles, self.curvature)
        if self.intra == "instance":
            return _hinge(depths[plan.nodes] - pictures + self.gap_margin)
        # Within a tree the weights fall from column to column: a pair across two trees is no parent and child.
        falls = head.weights[1:] < head.weights[:-1]
        below, above = plan.rows[:, :-1][:, falls].flatten(), plan.rows[:, 1:][:, falls].flatten()
        pairs = torch.unique(torch.stack([below, above], 1), dim=0)
        pairs = pairs[(pairs >= 0).all(1)]
        return _hinge(pictures[pairs[:, 1]] - pictures[pairs[:, 0]] + self.gap_margin)

    def _text_shift(self, head: HierarchicalHead, points: Tensor, plan: _Plan) -> Tensor | None:
        """Sign steps on the text side against the same loss, pictures fixed: [N, width], or None."""
        if self.text_attack == "none" or not self.text_eps:
            return None
        on_paths = torch.unique(plan.nodes)
        moved = torch.zeros_like(head.pooled)
        eps = self.text_eps
        if self.text_attack == "feature":
            eps *= head.relative
            shape: tuple[int, ...] = (len(on_paths), head.pooled.shape[1])
        else:
            shape = (len(on_paths), head.tokens.shape[1], head.embedding_width)
        delta = torch.zeros(shape, device=points.device, dtype=head.pooled.dtype)

        def pooled_shift(delta: Tensor) -> Tensor:
            if self.text_attack == "feature":
                return moved.index_copy(0, on_paths, delta)
            pooled = head.pool(head.tokens[on_paths.cpu()], shift=delta).to(moved)
            return moved.index_copy(0, on_paths, pooled - head.pooled[on_paths])

        for _ in range(self.text_steps):
            delta.requires_grad_(True)
            losses, _ = self._terms(head, points, plan, head.texts(pooled_shift(delta)), head.temperature())
            (gradient,) = torch.autograd.grad(losses.sum(), delta)
            delta = (delta + eps * gradient.sign()).clamp(-eps, eps).detach()
        with torch.no_grad():
            return pooled_shift(delta)


@dataclass(frozen=True)
class _Plan:
    """What depends on a batch's labels alone; P of all rows have pictures.

    Attributes:
        rows: int64 [B, columns], each picture's rows among the P; -1 for none.
        there: int64 [P], which rows they are.
        nodes: int64 [P], their nodes.
        counts: int64 [P], their pictures.
        weights: float [P], omega_l over trees and over the level's rows in the batch.
        mask: float [P, N], added to the logits: a large negative number where a node does not compete.
    """

    rows: Tensor
    there: Tensor
    nodes: Tensor
    counts: Tensor
    weights: Tensor
    mask: Tensor


def _plan(head: HierarchicalHead, labels: Tensor) -> _Plan:
    of_all = head.rows_of[labels]
    there, inverse, counts = torch.unique(of_all, return_inverse=True, return_counts=True)
    rows = inverse.reshape(of_all.shape)
    if int(there[0]) < 0:  # the first is "no row"
        there, counts, rows = there[1:], counts[1:], rows - 1
    columns = head.column_of[there]
    in_column = torch.bincount(columns, minlength=len(head.weights))
    weights = (head.weights[columns] / in_column[columns]).to(head.projection.dtype)
    mask = weights.new_zeros(()).masked_fill(~head.rivals[there], NO_RIVAL)
    return _Plan(rows, there, head.node_of[there], counts, weights, mask)


def _head(networks: Networks) -> HierarchicalHead:
    assert isinstance(networks.extra, HierarchicalHead), "the recipe builds the method's head"
    return networks.extra


def _hinge(values: Tensor) -> Tensor:
    """Mean of what is above zero's side; zero of nothing."""
    return F.relu(values).mean() if len(values) else values.sum()


def _read_json(path: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"there is no tree {path!r}: give the path of a JSON file")
    return json.loads(file.read_text(encoding="utf-8"))
