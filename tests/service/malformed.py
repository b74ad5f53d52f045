"""Pictures that break decoders, made in code: `refused()` must each get a clear error, `odd()` must be decoded.

Names of refused pictures begin with the error code that is due, `image-invalid/...`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PNG = b"\x89PNG\r\n\x1a\n"
COLOURS = (200, 40, 90)


def picture(width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    """A small picture with structure; the same each time."""
    values = np.random.default_rng(7).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    """The picture as a file of one format."""
    buffer = io.BytesIO()
    (image or picture()).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    """One PNG chunk, with the right checksum unless another is given."""
    right = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", right if crc is None else crc)


def header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """A PNG's IHDR chunk."""
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(*chunks: bytes, end: bool = True) -> bytes:
    """A PNG of given chunks."""
    return PNG + b"".join(chunks) + (chunk(b"IEND", b"") if end else b"")


def rows(width: int = 4, height: int = 4, channels: int = 3) -> bytes:
    """Compressed pixel rows for `header(width, height)`."""
    return zlib.compress((b"\0" + b"\x80" * width * channels) * height)


def small_png(*chunks: bytes) -> bytes:
    """A good PNG of 4 x 4 with more chunks before its pixels."""
    return png(header(4, 4), *chunks, chunk(b"IDAT", rows()))


def segment(marker: int, body: bytes) -> bytes:
    """One JPEG segment."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def into_jpeg(*segments: bytes, jpeg: bytes | None = None) -> bytes:
    """A JPEG with more segments right after its start."""
    base = jpeg or encoded("JPEG")
    return base[:2] + b"".join(segments) + base[2:]


def exif(*entries: tuple[int, int, int, int], order: str = "<", next_directory: int = 0, start: int = 8) -> bytes:
    """An EXIF block whose first directory has (tag, type, count, value) entries."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    body = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    count = struct.pack(order + "H", len(entries))
    return (
        b"Exif\0\0" + mark + struct.pack(order + "I", start) + count + body + struct.pack(order + "I", next_directory)
    )


def frame_patched(offset: int, value: bytes, marker: int | None = None) -> bytes:
    """A JPEG with bytes of its frame header overwritten; offset 0 is the precision."""
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 4 + offset : start + 4 + offset + len(value)] = value
    if marker is not None:
        data[start + 1] = marker
    return bytes(data)


def many_scans(count: int, image: Image.Image | None = None) -> bytes:
    """A progressive JPEG whose last scan is repeated until it has `count` scans."""
    data = encoded("JPEG", image, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + b"\xff\xd9"


def webp_chunk(name: bytes, body: bytes) -> bytes:
    """One WebP chunk."""
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) & 1)


def webp(*chunks: bytes) -> bytes:
    """A WebP of given chunks."""
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def canvas(width: int, height: int, flags: int = 0) -> bytes:
    """A WebP's VP8X chunk."""
    sizes = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return webp_chunk(b"VP8X", bytes((flags, 0, 0, 0)) + sizes)


def lossy_frame(width: int | None = None, height: int | None = None) -> bytes:
    """A WebP's VP8 chunk, with another size written into it if one is given."""
    data = bytearray(encoded("WEBP", quality=50)[12:])
    if width is not None and height is not None:
        data[14:18] = struct.pack("<HH", width, height)
    return bytes(data)


def animated(form: str) -> bytes:
    """A picture of two frames."""
    return encoded(form, picture(), save_all=True, append_images=[picture(48, 40).rotate(180)])


def _truncated() -> Iterator[tuple[str, bytes]]:
    for form, options in (("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})):
        data = encoded(form, picture(200, 160), **options)
        kind = form.lower() + ("-progressive" if options else "")
        for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
            yield f"image-invalid/{kind}-cut-at-{share:.0%}", data[: int(len(data) * share)]
        for missing in (1, 2, 5, 13):
            yield f"image-invalid/{kind}-last-{missing}-bytes-missing", data[:-missing]
    yield "image-invalid/jpeg-magic-only", b"\xff\xd8\xff"
    yield "image-invalid/png-magic-only", PNG
    yield "image-invalid/webp-magic-only", b"RIFF\x24\0\0\0WEBP"
    yield "image-invalid/zero-bytes", b""


def _foreign() -> Iterator[tuple[str, bytes]]:
    for form in ("GIF", "BMP", "TIFF", "ICO", "PDF", "PPM"):
        yield f"image-unsupported/{form.lower()}", encoded(form)
    yield "image-unsupported/svg", b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield "image-unsupported/svg-behind-entities", b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "b">]><svg>&a;</svg>'
    yield "image-unsupported/html", b"<!doctype html><img src=x onerror=alert(1)>"
    yield "image-unsupported/html-before-jpeg", b"<html></html>" + encoded("JPEG")
    yield "image-unsupported/avif-header", b"\0\0\0\x20ftypavif" + bytes(40)
    yield "image-unsupported/jpeg-xl-header", b"\xff\x0a" + bytes(40)
    yield "image-unsupported/wave-audio", b"RIFF\x24\0\0\0WAVEfmt " + bytes(40)
    yield "image-unsupported/png-through-text-mode", encoded("PNG").replace(b"\r\n", b"\n")
    yield "image-unsupported/pickle", b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x07os.path."
    yield "image-unsupported/one-byte", b"\xff"
    yield "image-unsupported/animated-png", animated("PNG")
    yield (
        "image-unsupported/png-with-one-animation-frame",
        png(header(4, 4), chunk(b"acTL", struct.pack(">II", 1, 0)), chunk(b"IDAT", rows())),
    )
    yield "image-unsupported/animated-webp", animated("WEBP")


def _bombs() -> Iterator[tuple[str, bytes]]:
    side = 12_000
    zeros = zlib.compress(bytes((side // 8 + 1) * side), 1)
    yield "image-too-large/png-12k-zeros", png(header(side, side, 1, 0), chunk(b"IDAT", zeros))
    yield "image-too-large/png-claims-60000", png(header(60_000, 60_000), chunk(b"IDAT", rows()))
    yield "image-too-large/png-claims-2-to-31", png(header(2**31 - 1, 2**31 - 1), chunk(b"IDAT", rows()))
    yield "image-too-large/png-65535-by-1", png(header(65_535, 1), chunk(b"IDAT", rows(65_535, 1)))
    yield "image-too-large/png-1-by-65535", png(header(1, 65_535), chunk(b"IDAT", rows(1, 65_535)))
    yield "image-too-large/jpeg-65535-by-1", encoded("JPEG", Image.new("RGB", (65_500, 1)))
    yield "image-too-large/jpeg-claims-65535", frame_patched(1, b"\xff\xff\xff\xff")
    yield "image-too-large/webp-claims-16383", webp(lossy_frame(16_383, 16_383))
    yield "image-too-large/webp-canvas-2-to-24", webp(canvas(1 << 24, 1 << 24), lossy_frame())
    yield "image-too-large/17-megabytes", encoded("JPEG") + bytes(17 << 20)
    yield "image-invalid/png-0-by-10", png(header(0, 10), chunk(b"IDAT", rows()))
    yield "image-invalid/jpeg-0-high", frame_patched(1, b"\0\0")
    yield "image-invalid/jpeg-0-wide", frame_patched(3, b"\0\0")
    yield "image-invalid/webp-0-wide", webp(lossy_frame(0, 40))


def _broken_png() -> Iterator[tuple[str, bytes]]:
    idat, good = chunk(b"IDAT", rows()), rows()
    noise = np.random.default_rng(0).bytes(400)
    yield "image-invalid/png-header-checksum", png(header(4, 4)[:-1] + b"\0", idat)
    yield "image-invalid/png-pixel-checksum", png(header(4, 4), chunk(b"IDAT", good, crc=1))
    yield "image-invalid/png-pixels-are-noise", png(header(4, 4), chunk(b"IDAT", noise))
    yield "image-invalid/png-pixels-end-early", png(header(64, 64), idat)
    yield "image-invalid/png-without-end", png(header(4, 4), idat, end=False)
    yield "image-invalid/png-without-pixels", png(header(4, 4))
    yield "image-invalid/png-empty-pixels", png(header(4, 4), chunk(b"IDAT", b""))
    yield "image-invalid/png-two-headers", png(header(4, 4), header(8, 8), idat)
    yield "image-invalid/png-header-second", png(idat, header(4, 4))
    yield "image-invalid/png-header-short", png(chunk(b"IHDR", b"\0\0\0\4"), idat)
    yield "image-invalid/png-pixels-in-two-places", png(header(4, 4), idat, chunk(b"tEXt", b"a\0b"), idat)
    yield "image-invalid/png-depth-7", png(header(4, 4, depth=7), idat)
    yield "image-invalid/png-colour-5", png(header(4, 4, colour=5), idat)
    yield "image-invalid/png-interlace-9", png(header(4, 4, interlace=9), idat)
    yield "image-invalid/png-chunk-longer-than-file", PNG + header(4, 4) + b"\x7f\xff\xff\xffIDAT" + good
    yield "image-invalid/png-chunk-without-name", png(header(4, 4), chunk(b"\0\1\2\3", b""), idat)
    yield "image-invalid/png-million-empty-chunks", png(header(4, 4), chunk(b"teXt", b"") * 100_000, idat)
    yield "image-invalid/png-filter-9", png(header(4, 4), chunk(b"IDAT", zlib.compress((b"\x09" + bytes(12)) * 4)))
    yield "image-unsupported/png-unknown-critical-chunk", png(header(4, 4), chunk(b"CgBI", b"\0\0\0\0"), idat)


def _broken_jpeg() -> Iterator[tuple[str, bytes]]:
    data = encoded("JPEG", picture(200, 160))
    scan = data.index(b"\xff\xda")
    tables, frame = data.index(b"\xff\xdb"), data.index(b"\xff\xc0")
    noise = np.random.default_rng(1).bytes(4000)
    yield "image-invalid/jpeg-noise-after-scan-header", data[: scan + 14] + noise + b"\xff\xd9"
    yield "image-invalid/jpeg-noise-after-start", b"\xff\xd8\xff" + noise
    yield "image-invalid/jpeg-only-start-and-end", b"\xff\xd8\xff\xd9"
    yield "image-invalid/jpeg-without-frame", data[:frame] + data[scan:]
    yield "image-invalid/jpeg-without-tables", data[:tables] + data[frame:]
    yield "image-invalid/jpeg-without-scan", data[:scan] + b"\xff\xd9"
    yield "image-invalid/jpeg-two-frames", into_jpeg(data[frame:scan], jpeg=data)
    yield "image-invalid/jpeg-segment-length-0", into_jpeg(b"\xff\xe5\0\0")
    yield "image-invalid/jpeg-segment-longer-than-file", into_jpeg(b"\xff\xe5\xff\xff")
    yield "image-invalid/jpeg-in-jpeg", into_jpeg(encoded("JPEG"))
    yield "image-invalid/jpeg-5000-comments", into_jpeg(segment(0xFE, b"x") * 5000)
    yield "image-invalid/jpeg-100000-exif-blocks", into_jpeg(segment(0xE1, b"Exif\0\0ab") * 100_000)
    yield "image-invalid/jpeg-frame-header-short", frame_patched(5, b"\x04")
    yield "image-unsupported/jpeg-12-bits", frame_patched(0, b"\x0c")
    yield "image-unsupported/jpeg-lossless", frame_patched(0, b"\x08", marker=0xC3)
    yield "image-unsupported/jpeg-arithmetic", frame_patched(0, b"\x08", marker=0xC9)
    yield "image-unsupported/jpeg-1000-scans", many_scans(1000)


def _broken_webp() -> Iterator[tuple[str, bytes]]:
    frame = encoded("WEBP", picture(200, 160), quality=50)[20:]
    yield "image-invalid/webp-pixels-end-early", webp(webp_chunk(b"VP8 ", frame[: len(frame) // 2]))
    yield "image-invalid/webp-lossless-noise", webp(webp_chunk(b"VP8L", b"\x2f\x2f\xc0\x09\0" + b"\xff" * 200))
    yield "image-invalid/webp-two-frames", webp(lossy_frame(), lossy_frame())
    yield "image-invalid/webp-canvas-of-other-size", webp(canvas(400, 400), lossy_frame())
    yield "image-invalid/webp-no-frame", webp(canvas(48, 40))
    yield "image-invalid/webp-chunk-longer-than-file", webp(b"VP8 \xff\xff\xff\x7f" + bytes(20))
    yield "image-invalid/webp-1000-chunks", webp(lossy_frame(), webp_chunk(b"ABCD", b"") * 1000)


def refused() -> dict[str, bytes]:
    """Pictures that must be refused, by name; the part before the slash is the error's code."""
    makers = (_truncated, _foreign, _bombs, _broken_png, _broken_jpeg, _broken_webp)
    return {name: data for maker in makers for name, data in maker()}


def odd() -> dict[str, bytes]:
    """Pictures that look hostile or rare and must be decoded, in time, as if they were plain."""
    text = PngInfo()
    for index in range(3000):
        text.add_text(f"key{index}", "value")
    ycck = bytearray(encoded("JPEG", picture(mode="CMYK")))
    ycck[ycck.index(b"Adobe") + 11] = 2
    gray16 = Image.fromarray(np.asarray(picture(mode="L")).astype(np.uint16) * 257)
    rgb16 = zlib.compress((b"\0" + struct.pack(">HHH", 60_000, 100, 65_535) * 4) * 4)
    bomb = zlib.compress(bytes(60_000_000), 1)
    blocks = {
        "orientation-0": exif((0x112, 3, 1, 0)),
        "orientation-9": exif((0x112, 3, 1, 9)),
        "orientation-65535": exif((0x112, 3, 1, 65_535)),
        "orientation-as-text": exif((0x112, 2, 1, 0x41)),
        "circular-directories": exif((0x8769, 4, 1, 8), (0x8825, 4, 1, 8), next_directory=8),
        "huge-counts": exif(*[(tag, 5, 0xFFFFFFFF, 0xFFFFFFF0) for tag in range(0x100, 0x180)]),
        "directory-outside": exif((0x112, 3, 1, 1), start=0xFFFFFFFF),
        "noise": b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + np.random.default_rng(3).bytes(60_000),
    }
    clear = picture(mode="RGBA")
    clear.putalpha(picture(mode="L"))
    dot = Image.new("RGB", (1, 1), COLOURS)
    dots = {f"1-by-1-{form.lower()}": encoded(form, dot) for form in ("JPEG", "PNG", "WEBP")}
    trailing_page = b"<script>alert(document.domain)</script>"
    return {
        **dots,
        **{f"jpeg-exif-{name}": into_jpeg(segment(0xE1, block)) for name, block in blocks.items()},
        **{f"png-exif-{name}": small_png(chunk(b"eXIf", block[6:])) for name, block in blocks.items()},
        "jpeg-then-zip": encoded("JPEG") + b"PK\x03\x04" + bytes(26) + b"payload",
        "png-then-html": encoded("PNG") + trailing_page,
        "webp-then-html": encoded("WEBP") + trailing_page,
        "jpeg-html-in-comment": into_jpeg(segment(0xFE, trailing_page)),
        "jpeg-of-two-pictures": animated("MPO"),
        "jpeg-1000-exif-blocks": into_jpeg(segment(0xE1, b"Exif\0\0" + b"ab" * 500) * 1000),
        "jpeg-broken-multi-picture-table": into_jpeg(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
        "jpeg-broken-profile": into_jpeg(segment(0xE2, b"ICC_PROFILE\0\xff\xff" + b"\xff" * 900)),
        "jpeg-broken-photoshop-block": into_jpeg(segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\xff")),
        "jpeg-progressive-60-scans": many_scans(60),
        "jpeg-padded-markers": encoded("JPEG").replace(b"\xff\xdb", b"\xff\xff\xff\xff\xdb", 1),
        "jpeg-cmyk": encoded("JPEG", picture(mode="CMYK")),
        "jpeg-ycck": bytes(ycck),
        "jpeg-gray": encoded("JPEG", picture(mode="L")),
        "png-3000-texts": encoded("PNG", pnginfo=text),
        "png-compressed-text-bomb": small_png(chunk(b"zTXt", b"k\0\0" + bomb)),
        "png-profile-bomb": small_png(chunk(b"iCCP", b"k\0\0" + bomb)),
        "png-pixel-bomb-behind-last-row": png(header(4, 4), chunk(b"IDAT", bomb)),
        "png-gray-16": encoded("PNG", gray16),
        "png-rgb-16": png(header(4, 4, 16), chunk(b"IDAT", rgb16)),
        "png-gray-alpha": encoded("PNG", clear.convert("LA")),
        "png-palette-transparent": encoded("PNG", picture().quantize(8), transparency=3),
        "png-rgb-transparent-colour": encoded("PNG", transparency=COLOURS),
        "png-one-bit": encoded("PNG", picture(mode="1")),
        "png-interlaced": png(header(1, 1, interlace=1), chunk(b"IDAT", rows(1, 1))),
        "png-many-pixel-chunks": png(header(4, 4), *(chunk(b"IDAT", rows()[i : i + 1]) for i in range(len(rows())))),
        "webp-alpha": encoded("WEBP", clear),
        "webp-lossless": encoded("WEBP", lossless=True),
    }
