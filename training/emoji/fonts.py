"""Glyphs of outline fonts as SVG bodies."""

from __future__ import annotations

import io
from collections.abc import Iterable

from fontTools.pens.boundsPen import BoundsPen
from fontTools.pens.svgPathPen import SVGPathPen
from fontTools.ttLib import TTFont

from training.emoji.taxonomy import code_points

Box = tuple[float, float, float, float]


def font_glyphs(fonts: Iterable[bytes]) -> dict[tuple[str, int], tuple[str, Box]]:
    """Outlines of the characters of ``fonts``.

    Args:
        fonts: the bytes of WOFF or TrueType fonts; several may share characters and weights (parts of one font).

    Returns:
        (code point as `code_points` writes it, weight) -> SVG body and its box; glyphs without an outline are left
        out. Characters that are made of several code points (flags, families) are not resolved.
    """
    found: dict[tuple[str, int], tuple[str, Box]] = {}
    for content in fonts:
        font = TTFont(io.BytesIO(content))
        glyphs, weight = font.getGlyphSet(), int(font["OS/2"].usWeightClass)
        for code, name in font.getBestCmap().items():
            bounds, path = BoundsPen(glyphs), SVGPathPen(glyphs)
            glyphs[name].draw(bounds)
            glyphs[name].draw(path)
            if bounds.bounds is None:
                continue
            left, low, right, high = bounds.bounds
            # A font's axis points up, SVG's points down.
            body = f'<path transform="scale(1,-1)" d="{path.getCommands()}"/>'
            key = (code_points(f"{code:X}"), weight)
            found.setdefault(key, (body, (left, -high, right - left, high - low)))
    return found
