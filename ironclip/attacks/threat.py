"""What the attacker may do: a ball around the picture, cut by the cube of valid pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ironclip.errors import OptionError

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")
# What float32 adds to a length over many pixels grows with it.
_RELATIVE, _ROUNDING = 1e-5, 1e-6


def lengths(vectors: Tensor, norm: Norm) -> Tensor:
    """Norm of each item: [N, ...] -> [N, 1, 1, 1] (as many trailing axes as the input has)."""
    flat = vectors.flatten(1)
    values = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
    return values.reshape(-1, *[1] * (vectors.ndim - 1))


@dataclass(frozen=True)
class ThreatModel:
    """Perturbations of at most ``eps`` in ``norm``, pixels staying in [0, 1].

    Attributes:
        norm: ``linf`` or ``l2``.
        eps: radius in pixel units, where a pixel runs from 0 to 1; for ``l2`` the length over all pixels and channels.

    Raises:
        OptionError: an unknown norm, or an eps that is negative or not finite.
    """

    norm: Norm = "linf"
    eps: float = 4 / 255

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise OptionError(f"norm is one of {', '.join(NORMS)}, not {str(self.norm)[:40]!r}.", pointer="/norm")
        if not 0 <= self.eps < float("inf"):
            raise OptionError(f"eps is a finite number of at least 0 in pixel units, not {self.eps!r}.", pointer="/eps")

    @property
    def label(self) -> str:
        """For people: ``linf 4/255``, ``l2 0.5``."""
        return f"linf {self.eps * 255:g}/255" if self.norm == "linf" else f"l2 {self.eps:g}"

    def project(self, images: Tensor, candidates: Tensor) -> Tensor:
        """The allowed pixels near ``candidates``: inside the ball around ``images`` and inside [0, 1].

        For ``linf`` the nearest point. For ``l2`` first into the ball, then into the cube; the second step cannot leave
        the ball, since ``images`` lie in the cube.
        """
        if self.norm == "linf":
            inside = candidates.clamp(images - self.eps, images + self.eps)
        else:
            delta = candidates - images
            inside = images + delta * (self.eps / lengths(delta, "l2").clamp_min(1e-12)).clamp_max(1.0)
        return inside.clamp(0.0, 1.0)

    def ascent(self, gradients: Tensor) -> Tensor:
        """The unit step that raises a linear function most: the sign (``linf``) or the direction (``l2``)."""
        if self.norm == "linf":
            return gradients.sign()
        # Scaled before the norm: gradients of a sure decision may be too small to square.
        scaled = gradients / lengths(gradients, "linf").clamp_min(1e-38)
        return scaled / lengths(scaled, "l2").clamp_min(1e-12)

    def contains(self, images: Tensor, candidates: Tensor) -> Tensor:
        """Whether each perturbation is inside the radius, up to what float32 may add to its length: bool [N]."""
        return self.distances(images, candidates) <= self.eps * (1 + _RELATIVE) + _ROUNDING

    def distances(self, images: Tensor, candidates: Tensor) -> Tensor:
        """Length of each perturbation in this norm: [N]."""
        return lengths(candidates - images, self.norm).flatten()
