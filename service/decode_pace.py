"""How long pictures take to decode, by their format and the pixels that they claim, and how many there is room for.

A claim is read from a few bytes, on the event loop; whether it is true is found out when the picture is decoded.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

from ironclip.errors import ImageError
from ironclip.resources import usable_cpus, usable_memory
from service.containers import sniff, webp_frame_size
from service.jpeg_container import MARKER

# Seconds for any picture, and for each of its pixels, on a core of 2021; what a machine makes of it is learnt.
_EACH = 0.0015
_PIXEL = {"JPEG": 22e-9, "PNG": 60e-9, "WEBP": 35e-9}
# Weight of the newest picture in the running (geometric) mean, and how far one picture may move it.
_NEWEST, _MOST = 0.1, 10.0
# Before a JPEG's frame header come a few dozen segments; where more do, the most that is accepted is taken for claimed.
_MAX_SEGMENTS = 256
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Bytes that a thread has in hand at most for each pixel of its picture (transparent PNGs and turned ones take 13), and
# the share of the memory that all threads may have together.
_BYTES_A_PIXEL, _MEMORY_SHARE = 14, 0.25


def decode_threads(max_pixels: int, processes: int = 1) -> int:
    """Threads that decode in each of so many processes that share this machine or container; at least 1.

    As many as there are cores, or as have room for the largest pictures that are accepted.
    """
    room = _MEMORY_SHARE * usable_memory() / (_BYTES_A_PIXEL * max_pixels)
    return max(1, min(usable_cpus(), math.floor(room)) // processes)


@dataclass(frozen=True)
class Claim:
    """What an encoded picture says that it is: its format ("" for none that is accepted), and pixels."""

    format: str
    pixels: int


def read_claim(data: bytes, most: int) -> Claim:
    """What a picture claims; ``most`` pixels where that is not to be found in a few bytes, and at most so many.

    What is not even the beginning of a picture claims nothing: to refuse it takes no time.
    """
    try:
        kind = sniff(data)
        pixels = {"JPEG": _jpeg_pixels, "PNG": _png_pixels, "WEBP": _webp_pixels}[kind](data)
    except ImageError:
        return Claim("", 0)
    return Claim(kind, most if pixels is None else min(pixels, most))


def _png_pixels(data: bytes) -> int:
    return _product(">II", data, 16)


def _jpeg_pixels(data: bytes) -> int | None:
    position = 2
    for _ in range(_MAX_SEGMENTS):
        match = MARKER.match(data, position)
        if match is None:
            return 0
        position = match.end()
        if match[1][0] in _FRAMES:
            return _product(">HH", data, position + 3)
        position += int.from_bytes(data[position : position + 2], "big")
    return None


def _webp_pixels(data: bytes) -> int | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return (1 + int.from_bytes(data[24:27], "little")) * (1 + int.from_bytes(data[27:30], "little"))
    return math.prod(webp_frame_size(kind, data[20:30])) if kind in (b"VP8 ", b"VP8L") else None


def _product(form: str, data: bytes, at: int) -> int:
    if len(data) < at + struct.calcsize(form):
        return 0  # it ends there, and is refused at once
    return math.prod(struct.unpack_from(form, data, at))


class DecodePace:
    """Seconds of one thread that pictures take; locks nothing, whoever holds it does."""

    def __init__(self) -> None:
        self._factors = dict.fromkeys(_PIXEL, 1.0)

    def seconds(self, claim: Claim) -> float:
        """Estimated seconds of one thread; 0 for what is no picture."""
        return self._factors[claim.format] * _shape(claim) if claim.format else 0.0

    def observe(self, claim: Claim, seconds: float) -> None:
        """Enter what a picture that could be decoded took."""
        if claim.format and seconds > 0:
            factor = self._factors[claim.format]
            ratio = min(max(seconds / _shape(claim), factor / _MOST), factor * _MOST)
            self._factors[claim.format] = factor * (ratio / factor) ** _NEWEST


def _shape(claim: Claim) -> float:
    return _EACH + _PIXEL[claim.format] * claim.pixels
