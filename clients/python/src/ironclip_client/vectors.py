"""Embeddings: NumPy arrays where NumPy is installed, lists of floats elsewhere."""

from __future__ import annotations

import array
import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ironclip_client.errors import UnexpectedAnswer
from ironclip_client.parsing import pick, raw_field
from ironclip_client.results import Batch, EncoderRef, Meta, batch, encoder_ref

try:
    import numpy as np
except ImportError:  # it is an extra: vectors are lists then
    np = None  # type: ignore[assignment]

# An array of float32 or a list of floats, by what is installed: no type says both and is of use to either.
Vector = Any


@dataclass(frozen=True)
class Embedding:
    """A vector of length 1, and what was done to its picture that a viewer may not expect."""

    vector: Vector
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Embedding of {len(self.vector)} numbers>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Embedding):
            return NotImplemented
        return list(self.vector) == list(other.vector) and self.warnings == other.warnings

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Embeddings:
    """Vectors of pictures and of texts, each in the order of what was sent; their dot product is the cosine."""

    encoder: EncoderRef
    dim: int
    preprocessing: Mapping[str, str]
    defence: Mapping[str, Any]
    images: Batch[Embedding]
    texts: Batch[Embedding]
    meta: Meta = field(default_factory=Meta, repr=False, compare=False)
    raw: Mapping[str, Any] = raw_field()

    @property
    def image_vectors(self) -> Vector:
        """All pictures' vectors as one array [N, dim] (a list of lists without NumPy); raises if one failed."""
        return _stack(self.images.raise_for_error(), self.dim)

    @property
    def text_vectors(self) -> Vector:
        """All texts' vectors as one array [N, dim] (a list of lists without NumPy); raises if one failed."""
        return _stack(self.texts.raise_for_error(), self.dim)

    def __repr__(self) -> str:
        return f"<Embeddings of {len(self.images)} images and {len(self.texts)} texts, dim {self.dim}>"


def embeddings(data: object, meta: Meta) -> Embeddings:
    """Read the answer of `/embed`."""

    def one(value: Any) -> Embedding:
        vector = decode_vector(value.get("embedding") if isinstance(value, Mapping) else None)
        return pick(Embedding, value, own={"vector": vector}, warnings=tuple)

    def outcomes(values: Any) -> Batch[Embedding]:
        return batch(values, one, meta)

    return pick(Embeddings, data, own={"meta": meta}, encoder=encoder_ref, images=outcomes, texts=outcomes)


def decode_vector(value: object) -> Vector:
    """A vector from JSON numbers, or from base64 of little-endian float32.

    Raises:
        UnexpectedAnswer: neither.
    """
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
            numbers = array.array("f", data)
        except ValueError:
            raise UnexpectedAnswer("A vector of the answer is not base64 of float32 numbers.") from None
        if sys.byteorder == "big":
            numbers.byteswap()
        return np.array(numbers, dtype=np.float32) if np is not None else numbers.tolist()
    if isinstance(value, list):
        return np.array(value, dtype=np.float32) if np is not None else value
    raise UnexpectedAnswer("The answer has no vector where one belongs; is this an Ironclip service?")


def _stack(found: Sequence[Embedding], dim: int) -> Vector:
    rows = [one.vector for one in found]
    if np is None:
        return rows
    return np.stack(rows) if rows else np.zeros((0, dim), dtype=np.float32)
