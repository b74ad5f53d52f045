"""A cached value is believed only if it is exactly what could have been written under its key."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.vectors import Schema, ValueRejected, pack, unpack

KEY = b"k" * 32
SCHEMA: Schema = {"scores": ("float32", (3,)), "note": ("uint8", (None,)), "bank": ("float32", (2, None))}


def arrays() -> dict[str, np.ndarray]:
    return {
        "scores": np.array([0.5, -1.0, 3.25], np.float32),
        "note": np.frombuffer(b"hello", np.uint8),
        "bank": np.arange(4, dtype=np.float32).reshape(2, 2),
    }


def test_what_is_packed_comes_back_to_the_bit() -> None:
    back = unpack(pack(arrays(), key=KEY), SCHEMA, key=KEY)
    for name, array in arrays().items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    blob = bytearray(pack(arrays(), key=KEY))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueRejected):
        unpack(bytes(blob), SCHEMA, key=KEY)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueRejected):
        unpack(blob, SCHEMA, key=KEY)


@pytest.mark.parametrize("cut", [0, 1, 5, 20, -17, -1])
def test_a_cut_value_is_refused(cut: int) -> None:
    with pytest.raises(ValueRejected):
        unpack(pack(arrays(), key=KEY)[:cut], SCHEMA, key=KEY)


def test_a_value_of_another_key_is_refused() -> None:
    with pytest.raises(ValueRejected, match="hash"):
        unpack(pack(arrays(), key=b"o" * 32), SCHEMA, key=KEY)


def test_a_value_signed_without_the_secret_is_refused() -> None:
    with pytest.raises(ValueRejected, match="hash"):
        unpack(pack(arrays(), key=KEY), SCHEMA, key=KEY, secret=b"s" * 32)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("scores", np.array([0.5, np.nan, 1], np.float32), "finite"),
        ("scores", np.array([0.5, np.inf, 1], np.float32), "finite"),
        ("scores", np.array([0.5, 1], np.float32), "shape"),
        ("scores", np.zeros((3, 1), np.float32), "dtype"),
        ("scores", np.zeros(3, np.int64), "dtype"),
        ("bank", np.zeros((3, 2), np.float32), "shape"),
        ("other", np.zeros(1, np.float32), "names"),
    ],
)
def test_a_well_signed_value_of_the_wrong_kind_is_refused(name: str, value: np.ndarray, why: str) -> None:
    with pytest.raises(ValueRejected, match=why):
        unpack(pack({**arrays(), name: value}, key=KEY), SCHEMA, key=KEY)


@pytest.mark.parametrize("shape", [(2**31, 2**31), (2**32 - 1,) * 4, (2**32 - 1,) * 4 + (0,), (1,) * 100])
def test_a_shape_that_claims_more_than_is_there_allocates_nothing(shape: tuple[int, ...]) -> None:
    import hashlib

    huge = b"ICV1" + b"\x01" + b"\x01x" + struct.pack(f"<BB{len(shape)}I", 1, len(shape), *shape)
    mac = hashlib.blake2b(struct.pack("<I", len(KEY)) + KEY + huge, digest_size=16).digest()
    with pytest.raises(ValueRejected, match="form"):
        unpack(huge + mac, {"x": ("float32", (None, None))}, key=KEY)
