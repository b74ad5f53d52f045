"""Bytes of a picture -> checks -> pixels for the encoder, off the event loop and before any queue.

Whatever is wrong with the bytes comes out as an ImageError; nothing else can. Trailing bytes after the picture
(polyglots) are ignored and reported as a warning; they still count in the digest of the bytes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
import warnings as python_warnings
from dataclasses import dataclass

import torch
from PIL import Image, ImageFile

from ironclip.errors import (
    ImageError,
    ImageInvalid,
    ImageTooLarge,
    ImageUnsupported,
)
from ironclip.preprocessing import Preprocessing
from service.container import Container, ImageLimits
from service.containers import ACCEPTED, read_container, sniff
from service.errors import ImageTypeMismatch

__all__ = ["DecodedImage", "ImageLimits", "bytes_digest", "decode", "parse_data", "pixels_digest"]

# Process-wide, because Pillow knows no other way; both are also Pillow's defaults or stricter.
ImageFile.LOAD_TRUNCATED_IMAGES = False
python_warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

_MIME_FORMATS = {
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/pjpeg": "JPEG",
    "image/png": "PNG",
    "image/x-png": "PNG",
    "image/webp": "WEBP",
}
_NO_CLAIM = ("", "application/octet-stream", "image/*", "*/*")
_DATA_URI = re.compile(r"data:(?P<type>[^;,]{0,127})(?:;(?!base64,)[^;,]{0,127}){0,4}(?P<base64>;base64)?,", re.I)


@dataclass(frozen=True)
class DecodedImage:
    """A picture ready for the encoder.

    Attributes:
        pixels: uint8 [3, R, R].
        digest: `pixels_digest(pixels)`, taken in the decoding thread.
        warnings: codes of `ironclip.preprocessing.WARNINGS`.
        format: 'JPEG', 'PNG' or 'WEBP'.
        source_mode: Pillow's name of the stored pixel mode (RGB, CMYK, P, I;16, ...).
        source_size: stored width and height, pixels.
    """

    pixels: torch.Tensor
    digest: str
    warnings: tuple[str, ...]
    format: str
    source_mode: str
    source_size: tuple[int, int]


def decode(
    data: bytes, preprocessing: Preprocessing, limits: ImageLimits, declared_type: str | None = None
) -> DecodedImage:
    """Check, decode and preprocess one encoded picture; blocks, for worker threads.

    Args:
        data: the encoded file.
        preprocessing: the encoder's rules.
        limits: bytes, pixels and side allowed.
        declared_type: MIME type that the sender claims, if any; it must agree with the bytes.

    Raises:
        ImageInvalid, ImageUnsupported, ImageTooLarge: see `read_container`; nothing else is raised. A declared type
            that is another is an ImageUnsupported too (ImageTypeMismatch).
    """
    limits.check_bytes(len(data))
    check_declared_type(sniff(data), declared_type)
    container = read_container(data, limits)
    try:
        return _decode_checked(container, preprocessing)
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge("The picture needs more memory than is allowed for one.") from error
    except Exception as error:
        # Pillow's codecs raise whatever they meet (OSError, SyntaxError, ValueError, struct.error, ...); their texts
        # may quote the input, so they are not passed on.
        state = "truncated" if "truncated" in str(error) else "corrupt or truncated"
        raise ImageInvalid(f"The {container.format} data is {state}; it cannot be decoded in full.") from error


def _decode_checked(container: Container, preprocessing: Preprocessing) -> DecodedImage:
    with Image.open(io.BytesIO(container.data), formats=[container.format]) as image:
        if image.size != (container.width, container.height):
            raise ImageInvalid("The picture's headers disagree about its size.")
        if getattr(image, "n_frames", 1) != 1:
            raise ImageUnsupported("Animated pictures are not accepted; send one frame.")
        mode = image.mode
        image.load()
        image.info.pop("exif", None)
        image.info.update(container.info)
        pixels, warnings = preprocessing(image)
    codes = dict.fromkeys((*container.warnings, *warnings))
    size = (container.width, container.height)
    return DecodedImage(pixels, pixels_digest(pixels), tuple(codes), container.format, mode, size)


def check_declared_type(actual: str, declared_type: str | None) -> None:
    """Raise ImageTypeMismatch if a declared MIME type is not that of the format found in the bytes."""
    declared = (declared_type or "").partition(";")[0].strip().lower()
    if declared in _NO_CLAIM:
        return
    expected = _MIME_FORMATS.get(declared)
    if expected is None:
        raise ImageTypeMismatch(f"The declared type is not accepted; {ACCEPTED}.")
    if expected != actual:
        raise ImageTypeMismatch(f"The declared type is {declared}, but the bytes are {actual}.")


def is_image_type(kind: str) -> bool:
    """Whether a media type (lower case, without parameters) is that of pictures that are read, or claims nothing."""
    return kind in _MIME_FORMATS or kind in ("image/*", "application/octet-stream")


def parse_data(text: str, limits: ImageLimits) -> tuple[bytes, str | None]:
    """Return the bytes and the declared type (None if there is none) of strict base64 or a base64 `data:` URI.

    The size is checked on the text, before anything is decoded. Strict: the standard alphabet, padded, with no
    white space.

    Raises:
        ImageTooLarge: more bytes than allowed.
        ImageUnsupported: another kind of URI (URLs are not fetched), or a data URI that is not base64.
        ImageInvalid: not base64.
    """
    declared, start = None, 0
    if text[:5].lower() == "data:":
        match = _DATA_URI.match(text)
        if match is None or not match["base64"]:
            raise ImageUnsupported("A data URI must be of the form data:image/png;base64,...")
        declared, start = match["type"].strip().lower() or None, match.end()
    elif is_url(text):
        raise ImageUnsupported("Image URLs are not fetched; send the picture itself as base64 or a data: URI.")
    length = len(text) - start
    limits.check_bytes(length // 4 * 3 - text.count("=", max(start, len(text) - 2)))
    try:
        data = base64.b64decode(text[start:] if start else text, validate=True)
    except (binascii.Error, ValueError):
        raise ImageInvalid(
            "The picture is not base64: use the standard alphabet with padding, and no spaces or line breaks."
        ) from None
    return data, declared


def is_url(text: str) -> bool:
    """Whether a text that should be a picture is a URL of any scheme (a `data:` URI is not meant)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]{1,31}://", text) is not None


def bytes_digest(data: bytes) -> str:
    """SHA-256 (hex) of an encoded file, as it came."""
    return hashlib.sha256(data).hexdigest()


def pixels_digest(pixels: torch.Tensor) -> str:
    """SHA-256 (hex) of uint8 pixels and their shape; float32 pixels have digests in a domain of their own."""
    shape = ",".join(map(str, pixels.shape))
    domain = "float32:" if pixels.is_floating_point() else ""
    digest = hashlib.sha256(f"{domain}{shape};".encode())
    digest.update(pixels.contiguous().numpy().data)
    return digest.hexdigest()
