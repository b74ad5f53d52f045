"""Head: how an encoder's features become a decision; part of its artifact, beside the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ironclip.errors import ArtifactError

HEADS: dict[str, tuple[str, ...]] = {
    "cosine": (),
    "poincare": ("curvature", "image_scale", "text_scale", "temperature"),
}
"""Types of head, and the numbers that each has."""


@dataclass(frozen=True)
class Head:
    """How features become a decision; travels with the weights in `ironclip.json`.

    `cosine`: logit = logit_scale * cos(image, text), CLIP's own rule (Radford et al. 2021).

    `poincare`: logit = -temperature * d(exp_0(image_scale * image), exp_0(text_scale * text)), distances in hyperbolic
    space of curvature -`curvature`, features not normalised (the hierarchical method; see `ironclip.hyperbolic`).
    """

    type: str = "cosine"
    curvature: float = 1.0
    image_scale: float = 1.0
    text_scale: float = 1.0
    temperature: float = 1.0

    @classmethod
    def parse(cls, value: object) -> Head:
        """Read a head from its JSON form; raises ArtifactError for one that this version does not have."""
        kind = value.get("type") if isinstance(value, Mapping) else None
        if isinstance(value, Mapping) and isinstance(kind, str) and set(value) == {"type", *HEADS.get(kind, ("",))}:
            numbers = [value[name] for name in HEADS[kind]]
            if all(isinstance(n, (int, float)) and math.isfinite(n) and n > 0 for n in numbers):
                return cls(kind, **{name: float(value[name]) for name in HEADS[kind]})
        raise ArtifactError(
            f"The artifact's head is {json.dumps(value, default=str)[:200]}; this version knows the types "
            f"{', '.join(HEADS)}, with numbers above 0. Use a newer ironclip, or export the encoder with a cosine head."
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON form, as stored in `ironclip.json`."""
        return {"type": self.type, **{name: getattr(self, name) for name in HEADS[self.type]}}
