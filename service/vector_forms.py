"""Vectors as they go out, in the numbers and the form (JSON, NumPy's file format, bare bytes) that are asked for."""

from __future__ import annotations

import base64
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray

EmbedDtype = Literal["float32", "float16", "int8", "binary"]
NPY, BYTES = "application/x-npy", "application/octet-stream"


def converted(vectors: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Unit vectors with other numbers, little-endian.

    `int8` scales each vector so that its largest number, in magnitude, becomes 127 or -127, which leaves cosines as
    they are but for rounding; the vectors are no longer of length 1. `binary` keeps the signs: 1 for a number above 0,
    eight to a byte, the first in the highest bit, the last byte filled up with 0; Hamming distances order them.

    Args:
        vectors: float32 [..., D].
        dtype: an EmbedDtype.

    Returns:
        [..., D] of this dtype; for `binary` uint8 [..., ceil(D / 8)].
    """
    if dtype == "float16":
        return vectors.astype("<f2")
    if dtype == "int8":
        most = np.maximum(np.abs(vectors).max(axis=-1, keepdims=True), 1e-12)
        scaled: NDArray[np.int8] = np.rint(vectors * (127 / most)).astype(np.int8)
        return scaled
    if dtype == "binary":
        return np.packbits(vectors > 0, axis=-1)
    return vectors.astype("<f4", copy=False)


def encoded(vector: NDArray[np.generic], encoding: str) -> list[float] | str:
    """A vector as JSON numbers, or as base64 of its bytes."""
    if encoding == "base64":
        return base64.b64encode(vector.tobytes()).decode("ascii")
    if vector.dtype == np.float16:
        return [float(str(number)) for number in vector]  # the shortest that reads back as the same
    if vector.dtype.kind == "f":
        vector = vector.astype(np.float64).round(8)
    numbers: list[float] = vector.tolist()
    return numbers


def packed(rows: NDArray[np.generic], media_type: str) -> bytes:
    """Vectors [N, ...] as a file of NumPy's (format 1.0, no objects in it), or as their bytes alone, row by row."""
    if media_type == BYTES:
        return rows.tobytes()
    file = io.BytesIO()
    np.lib.format.write_array(file, rows, version=(1, 0), allow_pickle=False)
    return file.getvalue()
