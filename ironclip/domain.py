"""Is a picture of the kind that an encoder was trained on? A measured threshold on its features.

An artifact may hold `domain.safetensors` (prototypes) and a `domain` entry in `ironclip.json` (threshold and the rates
measured with it). The score of a picture is the mean cosine of its features with the k nearest prototypes; below the
threshold the picture lies outside. Deep nearest neighbours: Sun et al. 2022, arXiv 2204.06507.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.artifact import read_meta
from ironclip.errors import ArtifactError

DOMAIN_FILE = "domain.safetensors"
METHOD = "knn-cosine"


@dataclass(frozen=True)
class Domain:
    """What an encoder was trained on, as prototypes in its feature space.

    Attributes:
        description: in words, for the warning: "emoji and icon art".
        prototypes: float32 [P, dim], unit length.
        neighbours: k, how many nearest prototypes the score is a mean over.
        threshold: scores below it are outside.
        measured: the rates measured with this threshold, and on what.
    """

    description: str
    prototypes: Tensor
    neighbours: int
    threshold: float
    measured: dict[str, Any]

    def score(self, features: Tensor) -> Tensor:
        """Mean cosine with the k nearest prototypes: features [N, dim] (any length) -> float32 [N]."""
        prototypes = self.prototypes.to(features.device)
        cosines = normalize(features.float(), dim=-1) @ prototypes.T
        return cosines.topk(self.neighbours, dim=-1).values.mean(dim=-1)

    def inside(self, features: Tensor) -> Tensor:
        """bool [N]: the score reaches the threshold."""
        return self.score(features) >= self.threshold

    def to_json(self) -> dict[str, Any]:
        """The `domain` entry of `ironclip.json`."""
        return {
            "description": self.description,
            "method": METHOD,
            "neighbours": self.neighbours,
            "threshold": self.threshold,
            **self.measured,
        }


def save_prototypes(folder: Path | str, prototypes: Tensor) -> None:
    """Write unit prototypes [P, dim] as float16 into an artifact's folder."""
    save_file({"prototypes": prototypes.half().contiguous()}, Path(folder) / DOMAIN_FILE)


def load_domain(folder: Path | str) -> Domain | None:
    """The domain of an artifact; None where it has none.

    Raises:
        ArtifactError: the entry or the prototypes cannot be read, or are of a method this version does not have.
    """
    path = Path(folder) / DOMAIN_FILE
    entry = read_meta(folder).get("domain")
    if entry is None:
        return None
    try:
        if entry["method"] != METHOD:
            raise ArtifactError(f"{folder}: domain method {entry['method']!r}; this version knows {METHOD}.")
        measured = {key: value for key, value in entry.items() if key not in ("description", "method")}
        return Domain(
            description=str(entry["description"]),
            prototypes=normalize(load_file(path)["prototypes"].float(), dim=-1),
            neighbours=int(measured.pop("neighbours")),
            threshold=float(measured.pop("threshold")),
            measured=measured,
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: its domain cannot be read: {error!r}.") from error


def nearest(features: Tensor, prototypes: Tensor, neighbours: int) -> Tensor:
    """The score itself, for choosing a threshold: see `Domain.score`."""
    return Domain("", normalize(prototypes.float(), dim=-1), neighbours, 0.0, {}).score(features)


__all__ = ["DOMAIN_FILE", "Domain", "load_domain", "nearest", "save_prototypes"]
