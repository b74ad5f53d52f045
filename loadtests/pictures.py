"""Pictures to load a server with: distinct by seed, as large as photographs are for their pixels; and a broken one."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def make_pictures(size: tuple[int, int], count: int, seed: int) -> list[bytes]:
    """Distinct JPEGs (quality 85) of synthetic texture, about as many bytes a pixel as photographs have."""
    generator = np.random.default_rng(seed)
    width, height = size
    pictures = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def half_repeated(pictures: list[bytes], seed: int) -> list[bytes]:
    """The pictures in an order where every second one is one of eight that come again and again."""
    generator = np.random.default_rng(seed)
    popular, fresh = pictures[:8], pictures[8:]
    mixed: list[bytes] = []
    for one in fresh:
        mixed += [one, popular[int(generator.integers(len(popular)))]]
    return mixed


def truncate(picture: bytes) -> bytes:
    """The first half of a file, as a broken upload leaves it."""
    return picture[: len(picture) // 2]


def parse_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT.

    Raises:
        ValueError: it is not of that form.
    """
    width, cross, height = text.partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise ValueError(f"{text!r} is not a size in pixels: write WIDTHxHEIGHT, such as 224x224")
    return int(width), int(height)
