"""Reads JPEG, PNG and WebP containers itself, before any decoder runs: size, kind, ends, and what to keep.

A decoder is handed only what it needs for pixels: text, comments, EXIF, profiles, further pictures and trailing
bytes are taken out first, so parsers with a history (EXIF directories, zTXt, multi-picture tables) never see
untrusted bytes, and a polyglot's second half goes nowhere. What `Preprocessing` wants to know travels in `info`.
"""

from __future__ import annotations

import re
import struct
import zlib

from ironclip.errors import ImageInvalid, ImageUnsupported
from service.container import Container, ImageLimits, note_trailing
from service.jpeg_container import read_jpeg

ACCEPTED = "JPEG, PNG and WebP are accepted"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_MAX_PNG_CHUNKS, _MAX_WEBP_CHUNKS = 20_000, 256
# What a WebP's VP8X says of the rest, by bits.
_WEBP_ANIMATED, _WEBP_ALPHA, _WEBP_PROFILE = 0x02, 0x10, 0x20
_PNG_CHUNK_NAME = re.compile(rb"[A-Za-z]{4}")
_PNG_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


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
    reader = {"JPEG": read_jpeg, "PNG": _read_png, "WEBP": _read_webp}[sniff(data)]
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
            note_trailing(found, data, position)
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
    found, keep = Container("WEBP", 0, 0, b""), list[bytes]()
    position, frames, flags, canvas = 12, 0, 0, None
    for _ in range(_MAX_WEBP_CHUNKS):
        if position + 8 > end:
            break
        name, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        start, position = position + 8, position + 8 + length
        body = data[start : min(position, start + (1 << 16))]
        if position > end:
            raise ImageInvalid("The WebP is truncated, or a chunk's length is wrong.")
        if name == b"VP8X":
            flags = body[0] if body else 0
        if name in (b"ANIM", b"ANMF") or flags & _WEBP_ANIMATED:
            raise ImageUnsupported("Animated WebPs are not accepted; send one frame.")
        if name == b"VP8X" and len(body) == 10:
            canvas = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
            limits.check_size(*canvas)
        elif name in (b"VP8 ", b"VP8L"):
            frames += 1
            found.width, found.height = webp_frame_size(name, body)
            limits.check_size(found.width, found.height)
        elif name == b"EXIF":
            found.info.setdefault("exif", body)
        elif name == b"ICCP" and flags & _WEBP_PROFILE:
            found.info["icc_profile"] = b"not read"
        if name in (b"VP8X", b"ALPH", b"VP8 ", b"VP8L"):
            keep.append(_webp_chunk(name, data[start:position]))
        position += length & 1
    if position < end or frames != 1 or (canvas is not None and canvas != (found.width, found.height)):
        raise ImageInvalid("The WebP is corrupt: it must hold one frame of its own size.")
    kept = b"WEBP" + b"".join(keep)
    found.data = b"RIFF" + len(kept).to_bytes(4, "little") + kept
    note_trailing(found, data, end)
    return found


def _webp_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk as the decoder gets it: a VP8X tells of no other chunks than those that are kept."""
    if name == b"VP8X" and body:
        body = bytes((body[0] & _WEBP_ALPHA,)) + body[1:]
    return name + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) & 1)


def webp_frame_size(name: bytes, body: bytes) -> tuple[int, int]:
    """Width and height in the first ten bytes of a frame's chunk; raises ImageInvalid where they are none."""
    if name == b"VP8 " and len(body) >= 10 and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if name == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise ImageInvalid("The WebP's frame header is broken.")
