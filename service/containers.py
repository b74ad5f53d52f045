"""Reads JPEG, PNG and WebP containers itself, before any decoder runs: size, kind, ends, and what to keep.

A decoder is handed only what it needs for pixels: text, comments, EXIF, profiles, further pictures and trailing
bytes are taken out first, so parsers with a history (EXIF directories, zTXt, multi-picture tables) never see
untrusted bytes, and a polyglot's second half goes nowhere. What `Preprocessing` wants to know travels in `info`.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from ironclip.errors import ImageInvalid, ImageTooLarge, ImageUnsupported, OptionError

ACCEPTED = "JPEG, PNG and WebP are accepted"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Pillow refuses beyond this by itself (half of its error bound), so a higher limit could not be kept.
_MOST_PIXELS = 89_000_000
_MAX_JPEG_SEGMENTS, _MAX_JPEG_SCANS, _MAX_PNG_CHUNKS, _MAX_WEBP_CHUNKS = 4096, 64, 20_000, 256
# The end of entropy-coded data: a marker that is neither a stuffed zero nor a restart.
_JPEG_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_JPEG_MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_PNG_CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


@dataclass(frozen=True)
class ImageLimits:
    """What one encoded picture may claim and cost; checked from headers, before anything is decoded.

    Args:
        max_bytes: bytes of the encoded file.
        max_pixels: width x height, at most 89 million.
        max_side: pixels along one side.
    """

    max_bytes: int = 16 * 1024 * 1024
    max_pixels: int = 25_000_000
    max_side: int = 16_384

    def __post_init__(self) -> None:
        if not 1 <= self.max_pixels <= _MOST_PIXELS:
            raise OptionError(f"max_pixels must lie in 1..{_MOST_PIXELS}", limit=_MOST_PIXELS)

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


def sniff(data: bytes) -> str:
    """Return 'JPEG', 'PNG' or 'WEBP' by the first bytes alone.

    Raises:
        ImageInvalid: no bytes at all.
        ImageUnsupported: anything else, named where it can be recognised.
    """
    if not data:
        raise ImageInvalid("The picture is empty (zero bytes).")
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(_PNG_MAGIC):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    raise ImageUnsupported(f"{_recognise(data)}; {ACCEPTED}, by their first bytes.")


def read_container(data: bytes, limits: ImageLimits) -> Container:
    """Check one encoded picture from its container alone, in time linear in its bytes and without decoding it.

    Raises:
        ImageInvalid: broken, truncated, or of no size.
        ImageUnsupported: another format, animated, or of a kind with no common decoder.
        ImageTooLarge: over one of the limits.
    """
    limits.check_bytes(len(data))
    reader = {"JPEG": _read_jpeg, "PNG": _read_png, "WEBP": _read_webp}[sniff(data)]
    return reader(data, limits)


def _recognise(data: bytes) -> str:
    text = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    brand = data[8:12]
    known: list[tuple[bool, str]] = [
        (data.startswith((b"GIF87a", b"GIF89a")), "This is a GIF"),
        (data.startswith(b"BM"), "This is a BMP"),
        (data.startswith((b"II*\0", b"MM\0*")), "This is a TIFF"),
        (data.startswith(b"\0\0\1\0"), "This is an icon file"),
        (data.startswith(b"%PDF"), "This is a PDF"),
        (text.startswith((b"<svg", b"<?xml", b"<!doctype", b"<html")), "This is markup, not pixels"),
        (data[4:8] == b"ftyp", "This is an AVIF" if brand.startswith(b"avi") else "This is a HEIC or MP4 file"),
        (data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")), "This is a JPEG XL"),
    ]
    return next((name for matches, name in known if matches), "This is not a picture format known here")


# --- JPEG -------------------------------------------------------------------------------------------------------


def _read_jpeg(data: bytes, limits: ImageLimits) -> Container:
    view = memoryview(data)
    found = Container("JPEG", 0, 0, b"")
    keep: list[bytes | memoryview] = [b"\xff\xd8"]
    position, scans = 2, 0
    for _ in range(_MAX_JPEG_SEGMENTS):
        match = _JPEG_MARKER.match(data, position)
        if match is None:
            raise ImageInvalid(
                "The JPEG is truncated." if position >= len(data) else "The JPEG has no marker where one is due."
            )
        marker, position = match[1][0], match.end()
        if marker == 0xD9:
            return _finish_jpeg(found, keep, scans, data, position)
        if marker < 0xC0 or marker in (0xC8, 0xD8, 0xDE, 0xDF) or 0xD0 <= marker <= 0xD7 or 0xF0 <= marker <= 0xFD:
            raise ImageInvalid(f"The JPEG is corrupt: marker 0x{marker:02x} out of place.")
        length = int.from_bytes(view[position : position + 2], "big")
        body = view[position + 2 : position + length]
        if length < 2 or len(body) != length - 2:
            raise ImageInvalid("The JPEG is truncated, or a segment's length is wrong.")
        position += length
        segment: list[bytes | memoryview] = [bytes((0xFF, marker)), length.to_bytes(2, "big"), body]
        if marker in (0xC4, 0xDB, 0xDD):
            keep += segment
        elif marker == 0xDA:
            scans += 1
            end = _JPEG_SCAN_END.search(data, position)
            if not found.width or end is None:
                raise ImageInvalid("The JPEG is truncated." if found.width else "The JPEG has no frame header.")
            if scans > _MAX_JPEG_SCANS:
                raise ImageUnsupported(f"The JPEG has more than {_MAX_JPEG_SCANS} scans.", limit=_MAX_JPEG_SCANS)
            keep += [*segment, view[position : end.start()]]
            position = end.start()
        elif 0xC0 <= marker <= 0xCF and marker != 0xCC:
            if found.width:
                raise ImageInvalid("The JPEG has more than one frame header.")
            found.width, found.height = _read_frame_header(marker, bytes(body), limits)
            keep += segment
        elif _note_application(found, marker, body):
            keep += segment
    raise ImageInvalid(f"The JPEG has more than {_MAX_JPEG_SEGMENTS} segments.", limit=_MAX_JPEG_SEGMENTS)


def _read_frame_header(marker: int, body: bytes, limits: ImageLimits) -> tuple[int, int]:
    if marker not in (0xC0, 0xC1, 0xC2):
        raise ImageUnsupported(
            "The JPEG is lossless, hierarchical or arithmetic-coded; baseline and progressive are read."
        )
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        raise ImageInvalid("The JPEG's frame header is broken.")
    precision, height, width, components = struct.unpack(">BHHB", body[:6])
    if precision != 8 or components not in (1, 3, 4):
        raise ImageUnsupported(f"JPEGs of {precision} bits and {components} components are not accepted.")
    limits.check_size(width, height)
    return width, height


def _note_application(found: Container, marker: int, body: memoryview) -> bool:
    """Take from an APPn or comment segment what preprocessing needs; True if libjpeg needs the segment too."""
    head = bytes(body[:14])
    if marker == 0xE1 and head.startswith(b"Exif\0\0"):
        found.info.setdefault("exif", bytes(body))
    elif marker == 0xE2 and head.startswith(b"ICC_PROFILE\0"):
        found.info["icc_profile"] = b"not read"
    elif marker == 0xE2 and head.startswith(b"MPF\0") and "multi-picture" not in found.warnings:
        found.warnings.append("multi-picture")
    # These two tell libjpeg which colour space the components are in.
    return (marker == 0xE0 and head.startswith(b"JFIF\0")) or (marker == 0xEE and head.startswith(b"Adobe"))


def _finish_jpeg(found: Container, keep: list[bytes | memoryview], scans: int, data: bytes, position: int) -> Container:
    if not scans:
        raise ImageInvalid("The JPEG ends before its first scan.")
    found.data = b"".join([*keep, b"\xff\xd9"])
    _note_trailing(found, data, position)
    return found


# --- PNG --------------------------------------------------------------------------------------------------------


def _read_png(data: bytes, limits: ImageLimits) -> Container:
    view = memoryview(data)
    found = Container("PNG", 0, 0, b"")
    keep: list[bytes | memoryview] = [_PNG_MAGIC]
    seen: set[bytes] = set()
    position, previous = len(_PNG_MAGIC), b""
    for _ in range(_MAX_PNG_CHUNKS):
        if position + 12 > len(data):
            raise ImageInvalid("The PNG is truncated.")
        length, name = int.from_bytes(view[position : position + 4], "big"), bytes(view[position + 4 : position + 8])
        end = position + 12 + length
        if _PNG_CHUNK_NAME.fullmatch(name) is None:
            raise ImageInvalid("The PNG is corrupt: a chunk has no proper name.")
        if end > len(data):
            raise ImageInvalid("The PNG is truncated, or a chunk's length is wrong.")
        if (previous == b"") != (name == b"IHDR") or (name == b"IDAT" and previous != name and name in seen):
            raise ImageInvalid("The PNG is corrupt: its chunks are out of order.")
        body = view[position + 8 : end - 4]
        if _note_chunk(found, name, body, seen, limits):
            if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise ImageInvalid("The PNG is corrupt: a checksum is wrong.")
            keep.append(view[position:end])
        seen.add(name)
        position, previous = end, name
        if name == b"IEND":
            if b"IDAT" not in seen:
                raise ImageInvalid("The PNG has no pixel data.")
            found.data = b"".join(keep)
            _note_trailing(found, data, position)
            return found
    raise ImageInvalid(f"The PNG has more than {_MAX_PNG_CHUNKS} chunks.", limit=_MAX_PNG_CHUNKS)


def _note_chunk(found: Container, name: bytes, body: memoryview, seen: set[bytes], limits: ImageLimits) -> bool:
    """Take from a chunk what preprocessing needs; True if the decoder needs the chunk too."""
    if name in (b"acTL", b"fcTL", b"fdAT"):
        raise ImageUnsupported("Animated PNGs are not accepted; send one frame.")
    before_pixels = b"IDAT" not in seen
    if name in (b"IDAT", b"IEND"):
        return True
    if name in (b"IHDR", b"PLTE") or (name == b"tRNS" and before_pixels):
        if name in seen:
            raise ImageInvalid("The PNG is corrupt: a chunk that may come once is repeated.")
        if name == b"IHDR":
            _read_png_header(found, bytes(body), limits)
        return True
    if name == b"eXIf":
        found.info.setdefault("exif", bytes(body))
    elif name == b"iCCP":
        found.info["icc_profile"] = b"not read"
    elif name == b"gAMA" and len(body) == 4 and before_pixels:
        found.info["gamma"] = int.from_bytes(body, "big") / 100_000
    elif name[:1].isupper():
        raise ImageUnsupported("The PNG needs an extension that is not known here (a critical chunk).")
    return False


def _read_png_header(found: Container, body: bytes, limits: ImageLimits) -> None:
    if len(body) != 13:
        raise ImageInvalid("The PNG's header is broken.")
    found.width, found.height, depth, colour, compression, filtering, interlace = struct.unpack(">IIBBBBB", body)
    if depth not in _PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        raise ImageInvalid("The PNG's header is broken: no such combination of depth, colour and method.")
    limits.check_size(found.width, found.height)
    if depth == 16:
        found.warnings.append("16-bit-scaled")


# --- WebP -------------------------------------------------------------------------------------------------------


def _read_webp(data: bytes, limits: ImageLimits) -> Container:
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data) or end < 20:
        raise ImageInvalid("The WebP is truncated, or its length is wrong.")
    found = Container("WEBP", 0, 0, data[:end])
    position, frames, canvas = 12, 0, None
    for _ in range(_MAX_WEBP_CHUNKS):
        if position + 8 > end:
            break
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        body, position = data[position + 8 : position + 8 + min(length, 1 << 16)], position + 8 + length
        if position > end:
            raise ImageInvalid("The WebP is truncated, or a chunk's length is wrong.")
        position += length & 1
        if name in (b"ANIM", b"ANMF") or (name == b"VP8X" and body[:1] and body[0] & 0x02):
            raise ImageUnsupported("Animated WebPs are not accepted; send one frame.")
        if name == b"VP8X" and len(body) == 10:
            canvas = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
            limits.check_size(*canvas)
        elif name in (b"VP8 ", b"VP8L"):
            frames += 1
            found.width, found.height = _webp_frame_size(name, body)
            limits.check_size(found.width, found.height)
        elif name == b"EXIF":
            found.info.setdefault("exif", body)
    if position < end or frames != 1 or (canvas is not None and canvas != (found.width, found.height)):
        raise ImageInvalid("The WebP is corrupt: it must hold one frame of its own size.")
    _note_trailing(found, data, end)
    return found


def _webp_frame_size(name: bytes, body: bytes) -> tuple[int, int]:
    if name == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageInvalid("The WebP's frame header is broken.")


def _note_trailing(found: Container, data: bytes, position: int) -> None:
    # Cameras pad with zeros; anything else is worth saying.
    if len(data) > position and data[position:].strip(b"\0") and "multi-picture" not in found.warnings:
        found.warnings.append("trailing-bytes-ignored")
