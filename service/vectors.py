"""Named arrays as bytes, for a cache that other writers can reach: nothing is believed that is not checked.

    magic "ICV1" | u8 sections | sections | 16 bytes BLAKE2b over the cache key and all before it

    section: u8 length of name | name | u8 dtype | u8 dimensions | u32 each dimension | data, little-endian

The trailing hash is keyed when the operator has set a secret, so that only the replicas can write values; without
one it still catches damage, and values put under another value's key. There is no pickle here.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.generic]]
# Name -> (dtype, shape); None stands for any length along one dimension.
Schema = Mapping[str, tuple[str, tuple[int | None, ...]]]

_MAGIC = b"ICV1"
_MAC_BYTES = 16
_DTYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("<f4"),
    2: np.dtype("u1"),
    3: np.dtype("<i8"),
    4: np.dtype("?"),
}
_CODES = {dtype.name: code for code, dtype in _DTYPES.items()}


class ValueRejected(ValueError):
    """The bytes are not a value that could have been written under this key."""


def pack(arrays: Mapping[str, NDArray[np.generic]], *, key: bytes, secret: bytes = b"") -> bytes:
    """Return the arrays as bytes, bound to the cache key (and to `secret`, at most 64 bytes)."""
    parts = [_MAGIC, struct.pack("<B", len(arrays))]
    for name, array in arrays.items():
        code = _CODES[array.dtype.name]
        label = name.encode()
        parts += [
            struct.pack("<B", len(label)),
            label,
            struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape),
            np.ascontiguousarray(array, dtype=_DTYPES[code]).tobytes(),
        ]
    body = b"".join(parts)
    return body + _mac(body, key, secret)


def unpack(blob: bytes, schema: Schema, *, key: bytes, secret: bytes = b"") -> Arrays:
    """Return the arrays that `pack` wrote, if they have the names, types and shapes of `schema`.

    Raises:
        ValueRejected: anything is not as it should be: magic, hash, names, dtypes, shapes, length, or a
            number that is not finite.
    """
    if len(blob) < len(_MAGIC) + 1 + _MAC_BYTES or not blob.startswith(_MAGIC):
        raise ValueRejected("magic")
    body, mac = blob[:-_MAC_BYTES], blob[-_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(body, key, secret)):
        raise ValueRejected("hash")
    try:
        arrays = _sections(body)
    except (struct.error, IndexError, KeyError, ValueError, OverflowError) as error:
        raise ValueRejected("form") from error
    if set(arrays) != set(schema):
        raise ValueRejected("names")
    for name, (dtype, shape) in schema.items():
        array = arrays[name]
        if array.dtype.name != dtype or array.ndim != len(shape):
            raise ValueRejected("dtype")
        if any(want is not None and want != have for want, have in zip(shape, array.shape, strict=True)):
            raise ValueRejected("shape")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueRejected("finite")
    return arrays


def _sections(body: bytes) -> Arrays:
    arrays: Arrays = {}
    at = len(_MAGIC) + 1
    for _ in range(body[len(_MAGIC)]):
        length = body[at]
        name = body[at + 1 : at + 1 + length].decode()
        at += 1 + length
        code, ndim = struct.unpack_from("<BB", body, at)
        shape = struct.unpack_from(f"<{ndim}I", body, at + 2)
        at += 2 + 4 * ndim
        dtype, count = _DTYPES[code], math.prod(shape)
        arrays[name] = np.frombuffer(body, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    if at != len(body):
        raise ValueError("length")
    return arrays


def _mac(body: bytes, key: bytes, secret: bytes) -> bytes:
    digest = hashlib.blake2b(key=secret[:64], digest_size=_MAC_BYTES)
    digest.update(struct.pack("<I", len(key)) + key)
    digest.update(body)
    return digest.digest()
