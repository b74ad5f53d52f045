"""Embeddings: NumPy arrays where NumPy is installed, lists of floats elsewhere."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ironclip_client.errors import UnexpectedAnswer
from ironclip_client.parsing import pick, raw_field
from ironclip_client.results import Batch, EncoderRef, Meta, batch, encoder_ref

try:
    import numpy as np
except ImportError:  # it is an extra: vectors are lists then
    np = None  # type: ignore[assignment]

# `embed_dtype` -> struct's and NumPy's letter of one number.
_TYPES = {"float32": "f", "float16": "e", "int8": "b", "binary": "B"}
# An array of numbers or a list of them, by what is installed: no type says both and is of use to either.
Vector = Any


@dataclass(frozen=True)
class Embedding:
    """A vector (of length 1 in float32 and float16), and what was done to its picture that may not be expected."""

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
    """Vectors of pictures and of texts, each in the order of what was sent.

    In float32 and float16 their dot product is the cosine. In `int8` they are not of length 1, and products overflow:
    take them in a wider type and divide by the lengths. In `binary` they are packed bits: count those that differ.
    """

    encoder: EncoderRef
    dim: int
    preprocessing: Mapping[str, str]
    defence: Mapping[str, Any]
    images: Batch[Embedding]
    texts: Batch[Embedding]
    embed_dtype: str = "float32"
    meta: Meta = field(default_factory=Meta, repr=False, compare=False)
    raw: Mapping[str, Any] = raw_field()

    @property
    def image_vectors(self) -> Vector:
        """All pictures' vectors as one array [N, dim] (a list of lists without NumPy); raises if one failed."""
        return self._stacked(self.images)

    @property
    def text_vectors(self) -> Vector:
        """All texts' vectors as one array [N, dim] (a list of lists without NumPy); raises if one failed."""
        return self._stacked(self.texts)

    def _stacked(self, found: Batch[Embedding]) -> Vector:
        rows = [one.vector for one in found.raise_for_error()]
        if np is None or rows:
            return rows if np is None else np.stack(rows)
        return np.zeros((0, -(-self.dim // 8) if self.embed_dtype == "binary" else self.dim), _letter(self.embed_dtype))

    def __repr__(self) -> str:
        return f"<Embeddings of {len(self.images)} images and {len(self.texts)} texts, dim {self.dim}>"


def embeddings(data: object, meta: Meta) -> Embeddings:
    """Read the answer of `/embed`."""

    dtype = data.get("embed_dtype", "float32") if isinstance(data, Mapping) else "float32"

    def one(value: Any) -> Embedding:
        vector = decode_vector(value.get("embedding") if isinstance(value, Mapping) else None, dtype)
        return pick(Embedding, value, own={"vector": vector}, warnings=tuple)

    def outcomes(values: Any) -> Batch[Embedding]:
        return batch(values, one, meta)

    return pick(Embeddings, data, own={"meta": meta}, encoder=encoder_ref, images=outcomes, texts=outcomes)


def decode_vector(value: object, dtype: str = "float32") -> Vector:
    """A vector from JSON numbers, or from base64 of little-endian ones.

    Args:
        value: as the answer has it.
        dtype: an `embed_dtype`.

    Raises:
        UnexpectedAnswer: neither, or of a dtype that is not known here.
    """
    letter = _letter(dtype)
    if not value or not isinstance(value, (list, str)):
        raise UnexpectedAnswer("The answer has no vector where one belongs; is this an Ironclip service?")
    try:
        numbers: Any = value
        if isinstance(value, str):
            data = base64.b64decode(value, validate=True)
            numbers = struct.unpack(f"<{len(data) // struct.calcsize(letter)}{letter}", data)
        return np.array(numbers, dtype=letter) if np is not None else list(numbers)
    except (ValueError, TypeError, OverflowError, struct.error):
        raise UnexpectedAnswer(f"A vector of the answer does not consist of {dtype} numbers.") from None


def _letter(dtype: str) -> str:
    if dtype not in _TYPES:
        raise UnexpectedAnswer("The vectors have numbers of a type that this client does not know; is it too old?")
    return _TYPES[dtype]
