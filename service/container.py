"""What is common to the containers of every image format: what a picture may claim, and what was found in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ironclip.errors import ImageInvalid, ImageTooLarge, OptionError
from service.settings import MOST_PIXELS


@dataclass(frozen=True)
class ImageLimits:
    """What one encoded picture may claim and cost; checked from headers, before anything is decoded.

    Args:
        max_bytes: bytes of the encoded file.
        max_pixels: width x height, at most 89 million.
        max_side: pixels along one side.
        urls: whether a URL may stand for a picture; whoever allows it fetches them.
    """

    max_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 25_000_000
    max_side: int = 16_384
    urls: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise OptionError(f"max_pixels must lie in 1..{MOST_PIXELS}", limit=MOST_PIXELS)

    def check_bytes(self, count: int) -> None:
        """Raise ImageTooLarge if an encoded picture of `count` bytes is over the limit."""
        if count > self.max_bytes:
            raise ImageTooLarge(
                f"The picture has {count} bytes; at most {self.max_bytes} are accepted.", limit=self.max_bytes
            )

    def check_size(self, width: int, height: int) -> None:
        """Raise ImageInvalid for an empty picture, ImageTooLarge for one over the limits."""
        if width < 1 or height < 1:
            raise ImageInvalid("The picture's header says that it has no pixels.")
        if max(width, height) > self.max_side:
            raise ImageTooLarge(
                f"The picture is {width} x {height}; a side may have {self.max_side} pixels at most.",
                limit=self.max_side,
            )
        if width * height > self.max_pixels:
            raise ImageTooLarge(
                f"The picture is {width} x {height} = {width * height} pixels; at most {self.max_pixels} are "
                "accepted. Scale it down before sending; the encoder's input is far smaller.",
                limit=self.max_pixels,
            )


@dataclass
class Container:
    """A checked container: `data` holds only what decoding needs, `info` what preprocessing asks about."""

    format: str
    width: int
    height: int
    data: bytes
    info: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def note_trailing(found: Container, data: bytes, position: int) -> None:
    """Warn of bytes behind the picture's end at `position`."""
    # Cameras pad with zeros; anything else is worth saying.
    if len(data) > position and data[position:].strip(b"\0") and "multi-picture" not in found.warnings:
        found.warnings.append("trailing-bytes-ignored")
