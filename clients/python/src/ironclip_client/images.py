"""Pictures as callers have them -> bytes and a media type; nothing is decoded, the service does that."""

from __future__ import annotations

import base64
import binascii
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Union

from ironclip_client.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

ImageSource = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, BinaryIO, "PillowImage"]
"""A path, the bytes of a file, an open file, a `data:` URI, or a picture of Pillow's."""

_ORIENTATION = 0x0112
# What PNG has no words for; Pillow converts the rest itself or PNG keeps it as it is.
_AS_RGB = ("CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Encoded:
    """The bytes of a picture's file, and what they look like."""

    data: bytes
    media_type: str

    def __repr__(self) -> str:
        return f"Encoded({len(self.data)} bytes, {self.media_type})"


def read_image(source: ImageSource | Encoded) -> Encoded:
    """Read a picture from wherever it is.

    Raises:
        UsageError: not something that a picture can be read from.
        OSError: the file cannot be read.
    """
    if isinstance(source, Encoded):
        return source
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _encoded(bytes(source))
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _encoded(from_data_uri(source))
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        raise UsageError("The service fetches no URLs: download the picture and send its bytes.")
    if isinstance(source, (str, os.PathLike)):
        try:
            return _encoded(Path(source).read_bytes())
        except ValueError as error:  # a NUL in it
            raise UsageError(f"This is no path of a picture: {error}.") from None
    if _is_pillow(source):
        return Encoded(_from_pillow(source), "image/png")
    if hasattr(source, "read"):
        try:
            data = source.read()
        except ValueError as error:  # it has been closed
            raise UsageError(f"The picture's file cannot be read: {error}.") from None
        if not isinstance(data, (bytes, bytearray)):
            raise UsageError("Open the picture's file in binary mode, 'rb'.")
        return _encoded(bytes(data))
    hint = (
        "give several as images=[...]" if isinstance(source, (list, tuple)) else "Image.fromarray makes one of an array"
    )
    raise UsageError(
        "A picture is a path, bytes, an open file, a data: URI or a picture of Pillow's, "
        f"not {type(source).__name__}; {hint}."
    )


def media_type_of(data: bytes) -> str:
    """The media type by a file's first bytes; what is not known is left to the service to name."""
    if data[:3] == b"\xff\xd8\xff":
        return "image/jpeg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "image/png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return "application/octet-stream"


def _encoded(data: bytes) -> Encoded:
    return Encoded(data, media_type_of(data))


def from_data_uri(text: str) -> bytes:
    """The bytes of a base64 `data:` URI; raises UsageError."""
    head, comma, body = text.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UsageError("A data: URI of a picture is data:image/...;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("The data: URI does not hold base64.") from None


def _is_pillow(source: object) -> bool:
    # By name, so that Pillow is never imported for callers who do not have it.
    return any(kind.__module__ == "PIL.Image" and kind.__name__ == "Image" for kind in type(source).__mro__)


def _from_pillow(image: Any) -> bytes:
    """The picture as PNG, which keeps its pixels; and its orientation, which the service applies as for a file."""
    buffer = io.BytesIO()
    exif = image.getexif()
    options = {"exif": exif} if exif.get(_ORIENTATION, 1) != 1 else {}
    try:
        pixels = image.convert("RGB") if image.mode in _AS_RGB else image
        pixels.save(buffer, "PNG", compress_level=1, **options)
    except (OSError, ValueError) as error:
        raise UsageError(f"A picture of mode {image.mode} cannot be sent ({error}); convert it to RGB.") from error
    return buffer.getvalue()
