"""The JPEG container: walks the segments, and keeps those that pixels need."""

from __future__ import annotations

import re
import struct

from ironclip.errors import ImageInvalid, ImageUnsupported
from service.container import Container, ImageLimits, note_trailing

_MAX_SEGMENTS, _MAX_SCANS = 4096, 64
# The end of entropy-coded data: a marker that is neither a stuffed zero nor a restart.
_SCAN_END = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
MARKER = re.compile(rb"\xff+([^\xff])", re.DOTALL)


def read_jpeg(data: bytes, limits: ImageLimits) -> Container:
    """Check a JPEG, and return it without what decoding does not need."""
    view = memoryview(data)
    found = Container("JPEG", 0, 0, b"")
    keep: list[bytes | memoryview] = [b"\xff\xd8"]
    position, scans = 2, 0
    for _ in range(_MAX_SEGMENTS):
        match = MARKER.match(data, position)
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
            end = _SCAN_END.search(data, position)
            if not found.width or end is None:
                raise ImageInvalid("The JPEG is truncated." if found.width else "The JPEG has no frame header.")
            if scans > _MAX_SCANS:
                raise ImageUnsupported(f"The JPEG has more than {_MAX_SCANS} scans.", limit=_MAX_SCANS)
            keep += [*segment, view[position : end.start()]]
            position = end.start()
        elif 0xC0 <= marker <= 0xCF and marker != 0xCC:
            if found.width:
                raise ImageInvalid("The JPEG has more than one frame header.")
            found.width, found.height = _read_frame_header(marker, bytes(body), limits)
            keep += segment
        elif _note_application(found, marker, body):
            keep += segment
    raise ImageInvalid(f"The JPEG has more than {_MAX_SEGMENTS} segments.", limit=_MAX_SEGMENTS)


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
    note_trailing(found, data, position)
    return found
