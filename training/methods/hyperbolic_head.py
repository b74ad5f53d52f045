"""What the hierarchical method trains beside the image tower, and the space that it compares in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.hyperbolic import averages, distance_cross_entropy, exp0, paired_distances
from training.methods.nodes import Nodes

# Added to the logit of a node that does not compete.
NO_RIVAL = -1e30


class HierarchicalHead(nn.Module):
    """What is trained beside the image tower: the text projection, the scales, the temperature.

    Args:
        curvature: r.
        quantile: of the matched distances of the clean pictures; the violation loss tolerates as much.
        flat: on the sphere instead, with the encoder's temperature.
        encoder: whose projection it starts from.
        nodes: of the trees.
        pooled: float32 [N, width], the nodes' text features before the projection.
        sample: features [n, dim] and labels [n] of some clean pictures, to set the scales by.
    """

    rows_of: Tensor
    node_of: Tensor
    column_of: Tensor
    weights: Tensor
    rivals: Tensor
    edges: Tensor
    pooled: Tensor
    tolerated: Tensor

    def __init__(
        self,
        encoder: Encoder,
        nodes: Nodes,
        pooled: Tensor,
        sample: tuple[Tensor, Tensor],
        *,
        curvature: float,
        quantile: float,
        flat: bool,
    ) -> None:
        super().__init__()
        features, labels = sample
        self.nodes, self.curvature, self.flat = nodes, curvature, flat
        for name in ("rows_of", "node_of", "column_of", "weights", "rivals", "edges"):
            self.register_buffer(name, getattr(nodes, name).to(pooled.device), persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)
        # For text_attack: the nodes' tokens, the text tower, and lengths of features beside those of embeddings.
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.pool: Callable[..., Tensor] = encoder.pool_tokens
        table: Any = encoder.model.token_embedding
        self.embedding_width = int(table.weight.shape[1])
        self.projection = nn.Parameter(_projection(encoder).clone())
        with torch.no_grad():
            self.relative = float(pooled.square().mean().sqrt() / table.weight.square().mean().sqrt())
            texts = pooled @ self.projection
            text_scale = 1.0 / texts[: len(nodes.rows_of)].norm(dim=-1).median()
            image_scale = 1.1 / features.norm(dim=-1).mean()
            # At norms of one a change of angle moves this distance about 0.8 times as far as the cosine (inferred).
            temperature = (1.0 if self.flat else 0.8) * encoder.logit_scale
            trained = not self.flat
            self.log_image_scale = nn.Parameter(image_scale.log(), requires_grad=trained)
            self.log_text_scale = nn.Parameter(text_scale.log(), requires_grad=trained)
            self.log_temperature = nn.Parameter(temperature.log().to(texts), requires_grad=trained)
            matched = paired_distances(self.images(features), self.texts()[labels], self.curvature)
            self.register_buffer("tolerated", torch.quantile(matched, quantile))

    def texts(self, shift: Tensor | None = None) -> Tensor:
        """Points of all nodes: [N, dim]; ``shift`` [N, width] moves their features before the projection."""
        tangent = (self.pooled if shift is None else self.pooled + shift) @ self.projection
        if self.flat:
            return F.normalize(tangent, dim=-1)
        return exp0(self.log_text_scale.exp() * tangent, self.curvature)

    def images(self, features: Tensor) -> Tensor:
        """Points of pictures: [B, dim] -> [B, dim]."""
        if self.flat:
            return F.normalize(features, dim=-1)
        return exp0(self.log_image_scale.exp() * features, self.curvature)

    def temperature(self) -> Tensor:
        """lambda, at most 100."""
        return self.log_temperature.exp().clamp_max(100.0)

    def middles(self, points: Tensor, groups: Tensor, count: int) -> Tensor:
        """Midpoints of groups of pictures (eq. 8; flat: their sum as a unit vector): [count, dim].

        Args:
            points: [B, dim].
            groups: int64 [B, m], each picture's groups; -1 for none. Every group has a picture.
            count: of the groups.
        """
        if not self.flat:
            return averages(points, groups, count, self.curvature)[0]
        picture, column = torch.nonzero(groups >= 0, as_tuple=True)
        sums = points.new_zeros(count, points.shape[1])
        return F.normalize(sums.index_add(0, groups[picture, column], points[picture]), dim=-1)

    def losses(self, middles: Tensor, texts: Tensor, temperature: Tensor, nodes: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of each midpoint [P, dim] with its node among the texts [N, dim]: [P].

        Args:
            middles, texts, temperature: as this head makes them.
            nodes: int64 [P].
            mask: float [P, N], added to the logits: 0, or NO_RIVAL for texts that do not compete.
        """
        if not self.flat:
            return distance_cross_entropy(middles, texts, temperature, nodes, self.curvature, mask)
        return F.cross_entropy(temperature * middles @ texts.T + mask, nodes, reduction="none")


def _projection(encoder: Encoder) -> Tensor:
    projection: Any = encoder.model.text_projection
    if isinstance(projection, nn.Linear) and projection.bias is None:
        return projection.weight.data.T
    if isinstance(projection, Tensor):
        return projection.data
    raise OptionError("hierarchical trains the text projection of an open_clip CLIP; this encoder has none of its form")
