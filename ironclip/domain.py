"""Is a picture of the kind that an encoder was trained on? A measured threshold on its features.

An artifact may hold `domain.safetensors` and a `domain` entry in `ironclip.json` (threshold, and the rates measured
with it). The score is sqrt(dim) / d, where d is the Mahalanobis distance from a picture's features to the nearest
class mean under one covariance for all classes (Lee et al. 2018, arXiv 1807.03888): about 1 for a typical training
picture, towards 0 far away. Below the threshold the picture lies outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ironclip.artifact import read_meta
from ironclip.errors import ArtifactError

DOMAIN_FILE = "domain.safetensors"
METHOD = "mahalanobis"
_ENTRY = frozenset({"description", "method", "threshold"})


@dataclass(frozen=True)
class Domain:
    """What an encoder was trained on, as class means in its feature space.

    Attributes:
        description: in words, for the warning: "emoji and icon art".
        means: float32 [C, dim], class means, whitened.
        whitening: float32 [dim, dim]; features @ whitening have unit covariance within a class.
        threshold: scores below it are outside.
        measured: how the threshold was chosen, and the rates measured with it.
    """

    description: str
    means: Tensor
    whitening: Tensor
    threshold: float = 0.0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def score(self, features: Tensor) -> Tensor:
        """Features as `Encoder.encode_image` gives them (not normalised) [N, dim] -> float32 [N], in (0, inf)."""
        white = features.float() @ self.whitening.to(features.device)
        distance = torch.cdist(white, self.means.to(features.device)).amin(dim=-1)
        root: float = self.means.shape[-1] ** 0.5
        return torch.full_like(distance, root) / distance.clamp_min(1e-6)

    def inside(self, features: Tensor) -> Tensor:
        """bool [N]: the score reaches the threshold."""
        return self.score(features) >= self.threshold

    def to_json(self) -> dict[str, Any]:
        """The `domain` entry of `ironclip.json`."""
        return {
            "description": self.description,
            "method": METHOD,
            "threshold": self.threshold,
            **self.measured,
        }

    def save(self, folder: Path | str) -> None:
        """Write means and whitening, as float16 and float32, into an artifact's folder."""
        tensors = {"means": self.means.half().contiguous(), "whitening": self.whitening.contiguous()}
        path = Path(folder) / DOMAIN_FILE
        save_file(tensors, path)
        path.chmod(0o644)


def fit_domain(features: Tensor, labels: Tensor, description: str, shrinkage: float = 0.1) -> Domain:
    """A domain without a threshold, from the features [N, dim] of training pictures and their classes int64 [N].

    The covariance within classes is shrunk towards a multiple of the identity by `shrinkage`.
    """
    features = features.double()
    classes, labels = torch.unique(labels, return_inverse=True)
    count = torch.bincount(labels).unsqueeze(1)
    means = torch.zeros(len(classes), features.shape[1], dtype=torch.float64).index_add_(0, labels, features) / count
    inner = features - means[labels]
    covariance = inner.T @ inner / len(inner)
    covariance += (shrinkage * covariance.diagonal().mean() + 1e-12) * torch.eye(len(covariance), dtype=torch.float64)
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return Domain(description, (means @ whitening).half().float(), whitening.float())


def load_domain(folder: Path | str) -> Domain | None:
    """The domain of an artifact; None where it has none.

    Raises:
        ArtifactError: the entry or its tensors cannot be read, or are of a method this version does not have.
    """
    entry = read_meta(folder).get("domain")
    if entry is None:
        return None
    try:
        if entry["method"] != METHOD:
            raise ArtifactError(f"{folder}: domain method {entry['method']!r}; this version knows {METHOD}.")
        tensors = load_file(Path(folder) / DOMAIN_FILE)
        return Domain(
            description=str(entry["description"]),
            means=tensors["means"].float(),
            whitening=tensors["whitening"].float(),
            threshold=float(entry["threshold"]),
            measured={key: value for key, value in entry.items() if key not in _ENTRY},
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: its domain cannot be read: {error!r}.") from error
