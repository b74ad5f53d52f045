"""Vendor artwork to square RGBA pictures, and SVGs redrawn in line-art styles for training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyvips

RgbaImage = npt.NDArray[np.uint8]

_SHAPES = "path,circle,ellipse,rect,polygon,polyline"
# Presentation attributes yield to a style sheet, so one rule redraws a whole icon. `width` is the icon's own width.
STYLES: dict[str, str] = {
    "plain": "",
    "outlined": _SHAPES + "{{stroke:#000;stroke-width:{stroke};stroke-linejoin:round}}",
    "line": _SHAPES + "{{stroke:#000;stroke-width:{stroke};stroke-linejoin:round;fill:#fff;fill-opacity:.55}}",
}


def svg_document(body: str, box: tuple[float, float, float, float], style: str = "plain") -> bytes:
    """A whole SVG document around an icon's ``body``; ``box`` is left, top, width, height."""
    left, top, width, height = box
    rule = STYLES[style].format(stroke=round(0.028 * width, 4))
    sheet = f"<style>{rule}</style>" if rule else ""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{sheet}{body}</svg>'
    ).encode()


def render(picture: bytes, size: int) -> RgbaImage:
    """Draw an SVG, PNG or WebP into the middle of a transparent ``size`` x ``size`` square, aspect ratio kept.

    Returns:
        uint8 array [size, size, 4], RGB not premultiplied.

    Raises:
        pyvips.Error: the bytes are no picture.
    """
    image = pyvips.Image.thumbnail_buffer(picture, size, height=size, size="both")
    if image.bands < 3:
        image = image.colourspace("srgb")
    if not image.hasalpha():
        image = image.addalpha()
    image = image.gravity("centre", size, size, extend="background", background=[0, 0, 0, 0])
    return np.asarray(image.cast("uchar").numpy(), dtype=np.uint8)
