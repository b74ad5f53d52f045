"""Tensors of the Open Inference Protocol on the wire: within JSON, or behind it as little-endian bytes.

Counts, shapes and sizes are compared with what is allowed before anything is made of them. The binary form is the
binary tensor data extension, which Triton's and KServe's clients speak.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from ironclip.errors import InputTooLarge
from service.errors import BodyMalformed, RequestInvalid
from service.oip_schemas import InferInput

HEADER_LENGTH = "inference-header-content-length"
_NUMBERS: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
_LENGTH = struct.Struct("<I")
_NOTHING = memoryview(b"")


@dataclass(frozen=True)
class Wire:
    """One input tensor as it came: its elements in row-major order from JSON, or its bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: list[Any] | None = None
    data: memoryview = _NOTHING

    @property
    def size(self) -> int:
        """Elements by the shape, which may be a lie."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Output:
    """One output tensor: numbers in its shape, or texts in row-major order."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: NDArray[Any] | Sequence[str]


def split_body(body: bytes, header: str | None) -> tuple[bytes, memoryview]:
    """The JSON, and the bytes behind it; raises BodyMalformed where the header is not true of the body."""
    if header is None:
        return body, memoryview(b"")
    if not (header.isascii() and header.isdigit() and len(header) < 16 and 0 < int(header) <= len(body)):
        raise BodyMalformed(
            f"Inference-Header-Content-Length is the number of bytes of the JSON at the body's front; the body has "
            f"{len(body)} bytes."
        )
    length = int(header)
    return body[:length], memoryview(body)[length:]


def read_inputs(inputs: Sequence[InferInput], binary: memoryview) -> dict[str, Wire]:
    """Give each input its part of the binary data, in the order of the JSON.

    Raises:
        BodyMalformed: the binary data is more or less than the inputs say.
        RequestInvalid: an input comes twice, or has no data, or both kinds.
    """
    found: dict[str, Wire] = {}
    for i, tensor in enumerate(inputs):
        size = tensor.parameters.binary_data_size if tensor.parameters is not None else None
        if tensor.name in found:
            raise _fault(f"The input {tensor.name[:60]!r} comes twice.", f"/inputs/{i}/name")
        if (size is None) == (tensor.data is None):
            raise _fault(
                "An input has either data, or binary_data_size in its parameters and its bytes behind the JSON.",
                f"/inputs/{i}",
            )
        part = memoryview(b"")
        if size is not None:
            if size > len(binary):
                raise BodyMalformed(
                    f"The input {tensor.name[:60]!r} says that it has {size} bytes behind the JSON; {len(binary)} are "
                    "left there (is Inference-Header-Content-Length set?)."
                )
            part, binary = binary[:size], binary[size:]
        found[tensor.name] = Wire(tensor.name, tensor.datatype, tuple(tensor.shape), tensor.data, part)
    if len(binary):
        raise BodyMalformed(f"{len(binary)} bytes behind the JSON belong to no input: see binary_data_size.")
    return found


def read_texts(wire: Wire, most: int) -> list[str | bytes]:
    """The elements of a BYTES tensor [N] or [N, 1]: texts from JSON, bytes from binary data.

    Raises:
        RequestInvalid: another datatype or shape, elements that are no texts, or more or fewer than the shape says.
        InputTooLarge: more than ``most``.
    """
    _check_datatype(wire, ("BYTES",))
    if len(wire.shape) not in (1, 2) or wire.shape[1:] not in ((), (1,)):
        raise _shape_fault(wire, "[N] or [N, 1]")
    count = _checked_count(wire, most)
    if wire.elements is None:
        return _read_bytes(wire, count)
    flat = _flat(wire, wire.elements, wire.shape)
    for i, value in enumerate(flat):
        if not isinstance(value, str):
            raise _fault(f"An element of a BYTES tensor is a text (base64 for images), not {_kind(value)}.", wire, i)
    return flat


def read_numbers(wire: Wire, shape: tuple[int, ...], most: int) -> NDArray[Any]:
    """A UINT8 or FP32 tensor [N, *shape], as uint8 or float32; binary data is not copied.

    Raises:
        RequestInvalid: another datatype or shape, or elements that do not fit them.
        InputTooLarge: N is more than ``most``.
    """
    _check_datatype(wire, tuple(_NUMBERS))
    if len(wire.shape) != 1 + len(shape) or wire.shape[1:] != shape:
        raise _shape_fault(wire, f"[N, {', '.join(map(str, shape))}]")
    _checked_count(wire, most)
    kind = _NUMBERS[wire.datatype]
    if wire.elements is None:
        if len(wire.data) != wire.size * kind.itemsize:
            raise _fault(
                f"{len(wire.data)} bytes were sent; {wire.datatype} of shape {list(wire.shape)} has "
                f"{wire.size * kind.itemsize}.",
                wire,
            )
        return np.frombuffer(wire.data, kind).reshape(wire.shape)
    flat = _flat(wire, wire.elements, wire.shape)
    whole = wire.datatype == "UINT8"
    for i, value in enumerate(flat):
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise _fault(f"An element of a {wire.datatype} tensor is a number, not {_kind(value)}.", wire, i)
        if whole and not 0 <= value <= 255:
            raise _fault("An element of a UINT8 tensor is from 0 to 255.", wire, i)
        if not whole and not -1e38 < value < 1e38:
            raise _fault("An element of an FP32 tensor is a finite number that float32 holds.", wire, i)
    return np.array(flat, kind).reshape(wire.shape)


def write_outputs(head: dict[str, Any], outputs: Sequence[tuple[Output, bool]]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary data follows (None where there is none).

    Args:
        head: the answer's other fields.
        outputs: each tensor, and whether it goes as binary data.
    """
    forms, parts = [], []
    for output, binary in outputs:
        form: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if binary:
            parts.append(_bytes_of(output))
            form["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            values = output.values
            form["data"] = values.ravel().tolist() if isinstance(values, np.ndarray) else list(values)
        forms.append(form)
    text = to_json({**head, "outputs": forms})
    return (b"".join([text, *parts]), len(text)) if parts else (text, None)


def _bytes_of(output: Output) -> bytes:
    if isinstance(output.values, np.ndarray):
        return output.values.astype(_NUMBERS[output.datatype]).tobytes()
    encoded = (text.encode() for text in output.values)
    return b"".join(part for data in encoded for part in (_LENGTH.pack(len(data)), data))


def _read_bytes(wire: Wire, count: int) -> list[str | bytes]:
    found: list[str | bytes] = []
    start, end = 0, len(wire.data)
    for i in range(count):
        if end - start < _LENGTH.size:
            raise _fault(f"The bytes end before element {i} of {count}; each is preceded by its length.", wire, i)
        (length,) = _LENGTH.unpack_from(wire.data, start)
        start += _LENGTH.size
        if length > end - start:
            raise _fault(f"The element says that it has {length} bytes; {end - start} are left.", wire, i)
        found.append(bytes(wire.data[start : start + length]))
        start += length
    if start != end:
        raise _fault(f"{end - start} bytes are left behind the last of {count} elements.", wire)
    return found


def _flat(wire: Wire, data: list[Any], shape: tuple[int, ...]) -> list[Any]:
    """The elements in row-major order, from a flat list or from one nested as the shape says."""
    if data and isinstance(data[0], list) and len(shape) > 1:
        if len(data) != shape[0] or not all(isinstance(part, list) for part in data):
            raise _data_fault(wire)
        return [value for part in data for value in _flat(wire, part, shape[1:])]
    if len(data) != math.prod(shape):
        raise _data_fault(wire)
    return data


def _checked_count(wire: Wire, most: int) -> int:
    count = wire.shape[0]
    if count < 1:
        raise _shape_fault(wire, "one with at least one element")
    if count > most:
        raise InputTooLarge(
            f"The input {wire.name} has {count} elements; at most {most} fit into one request.",
            pointer=f"/{wire.name}",
            limit=most,
        )
    return count


def _check_datatype(wire: Wire, known: tuple[str, ...]) -> None:
    if wire.datatype not in known:
        raise _fault(f"The datatype is {' or '.join(known)}, not {wire.datatype[:20]!r}.", wire)


def _shape_fault(wire: Wire, wanted: str) -> RequestInvalid:
    shape = str(list(wire.shape))
    return _fault(f"The shape is {wanted}, not {shape if len(shape) < 80 else shape[:80] + '...'}.", wire)


def _data_fault(wire: Wire) -> RequestInvalid:
    return _fault(f"The data does not have the {wire.size} elements of the shape {list(wire.shape)}.", wire)


def _kind(value: object) -> str:
    kinds = {bool: "a boolean", str: "a text", list: "a list", dict: "an object", float: "a fraction", int: "a number"}
    return kinds.get(type(value), "null")


def _fault(detail: str, where: Wire | str, index: int | None = None) -> RequestInvalid:
    pointer = where if isinstance(where, str) else f"/{where.name}"
    error = RequestInvalid(detail)
    error.pointer = pointer if index is None else f"{pointer}/{index}"
    return error
