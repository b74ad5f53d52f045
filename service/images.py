"""Bytes of a picture -> checks -> pixels for the encoder, off the event loop and before any queue.

Whatever is wrong with the bytes comes out as an ImageError; nothing else can. Trailing bytes after the picture
(polyglots) are ignored and reported as a warning; they still count in the digest of the bytes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import re
import threading
import time
import warnings as python_warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image, ImageFile

from ironclip.cpus import usable_cpus
from ironclip.errors import (
    ImageError,
    ImageInvalid,
    ImageTooLarge,
    ImageUnsupported,
    NotReady,
    Overloaded,
)
from ironclip.preprocessing import Preprocessing
from service import telemetry
from service.container import Container, ImageLimits
from service.containers import ACCEPTED, read_container, sniff

__all__ = ["DecodedImage", "ImageDecoder", "ImageLimits", "bytes_digest", "decode", "parse_data", "pixels_digest"]

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
# Decodes that come out slower than this many seconds apart (and than four usual ones) are not waited for.
_LEAST_PACE = 0.01
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
        ImageInvalid, ImageUnsupported, ImageTooLarge: see `read_container`; nothing else is raised.
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
    """Raise ImageUnsupported if a declared MIME type is not that of the format found in the bytes."""
    declared = (declared_type or "").partition(";")[0].strip().lower()
    if declared in _NO_CLAIM:
        return
    expected = _MIME_FORMATS.get(declared)
    if expected is None:
        raise ImageUnsupported(f"The declared type is not accepted; {ACCEPTED}.")
    if expected != actual:
        raise ImageUnsupported(f"The declared type is {declared}, but the bytes are {actual}.")


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


class ImageDecoder:
    """Runs `decode` in a small pool of threads, with a bound on what may wait.

    Threads, not processes: Pillow lets go of the interpreter lock while it decodes and resamples, and pixels need no
    copy back. The checks before decoding bound time and memory of one picture.

    Args:
        limits: for every picture.
        workers: threads; 0 is one a core, within the CPU quota.
        max_pending: pictures being decoded or waiting for it at most.
    """

    def __init__(self, limits: ImageLimits, *, workers: int = 0, max_pending: int = 256) -> None:
        self.limits = limits
        self.workers = workers or usable_cpus()
        self.max_pending = max_pending
        self.pending = 0
        self._seconds = 0.005  # running mean of one decode
        self._moved = 0.0  # when a decode last ended, or the first of a spell was handed in
        self._closed = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    @property
    def estimated_wait_seconds(self) -> float:
        """How long a picture that came now would take until it is decoded."""
        return (self.pending + 1) * self._seconds / self.workers

    @property
    def flowing(self) -> bool:
        """Whether pictures are being decoded and come out at about the usual pace; a few huge ones do not."""
        usual = max(_LEAST_PACE, 4 * self._seconds)
        return self.pending > 0 and time.perf_counter() - self._moved < usual

    async def decode(self, data: bytes, preprocessing: Preprocessing, declared_type: str | None = None) -> DecodedImage:
        """Decode in a worker thread; a caller that is cancelled leaves the queue.

        Raises:
            ImageError: as `decode`.
            Overloaded: `max_pending` pictures are waiting.
            NotReady: closed.
        """
        if self._closed:
            raise NotReady("The service is stopping.")
        if self.pending >= self.max_pending:
            raise Overloaded(
                f"{self.pending} pictures are waiting to be decoded, the limit is {self.max_pending} "
                "(IRONCLIP_MAX_QUEUE, or IRONCLIP_MAX_IMAGES where that is more).",
                limit_name="decode-items",
                retry_after=self.estimated_wait_seconds,
                limit=self.max_pending,
            )
        work = self._pool.submit(self._timed, partial(decode, data, preprocessing, self.limits, declared_type))
        with self._lock:
            if not self.pending:
                self._moved = time.perf_counter()
            self.pending += 1
        # When the work ends, not when the caller stops waiting: a cancelled caller's decode may run on.
        work.add_done_callback(self._count_down)
        return await asyncio.wrap_future(work)

    def close(self) -> None:
        """Refuse new work, drop what waits, and let running decodes end."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: partial[DecodedImage]) -> DecodedImage:
        began = time.perf_counter()
        try:
            return work()
        finally:
            seconds = time.perf_counter() - began
            self._seconds += 0.05 * (seconds - self._seconds)
            telemetry.DECODE_SECONDS.observe(seconds)

    def _count_down(self, work: Future[DecodedImage]) -> None:
        with self._lock:
            self.pending -= 1
            self._moved = time.perf_counter()
