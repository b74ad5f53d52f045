"""A multipart form as it arrives -> its parts in memory, in small pieces, and no further than its bounds.

The framework's own reader has one bound for all fields, takes texts that are not UTF-8 for Latin-1, and holds up the
event loop for as long as what has arrived takes: a form of ten thousand labels, a quarter of a second.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping

from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from ironclip.errors import InputTooLarge, IronclipError, TooManyLabels
from service.errors import BodyMalformed

PICTURES = ("image", "images")
# Bytes that are taken apart at a time, and seconds after which others have their turn in between.
_PIECE = 8192
_TURN = 0.002
# Fields at most whose number no setting bounds: options, templates, radii.
_MOST_OTHERS = 4096


class Part:
    """One part of a form.

    Args:
        name: of its field.
        is_file: it has a file's name, so it is bytes; else it is a text.
        kind: the Content-Type that it has of its own.
    """

    __slots__ = ("_pieces", "is_file", "kind", "name", "size")

    def __init__(self, name: str, *, is_file: bool, kind: str | None) -> None:
        self.name, self.is_file, self.kind = name, is_file, kind
        self.size = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """Put what has arrived behind the rest."""
        self._pieces.append(piece)
        self.size += len(piece)

    def take(self) -> bytes:
        """Its content, which is not kept twice: the next call has none."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)

    def take_text(self) -> str:
        """Its content as a text; raises BodyMalformed where it is none."""
        hint = "; a file needs a filename" if self.name in PICTURES else ""
        return _decoded(self.take(), f"The field {self.name[:60]!r} is not UTF-8 text{hint}.")


class _Reader:
    """What the parser tells, put together."""

    def __init__(self, limits: Mapping[str, tuple[int, str]]) -> None:
        self.parts: list[Part] = []
        self.whole = False
        self._limits = limits
        self._counts: Counter[str] = Counter()
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""

    def on_part_begin(self) -> None:
        self._headers = {}

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if b"name" not in options:
            raise BodyMalformed("A part of the form has no name: each has one in its Content-Disposition.")
        name = _decoded(options[b"name"], "The name of a field is not UTF-8.")
        self._count(name)
        kind = self._headers.get(b"content-type")
        self.parts.append(
            Part(name, is_file=b"filename" in options, kind=None if kind is None else kind.decode("latin-1"))
        )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].add(data[start:end])

    def on_end(self) -> None:
        self.whole = True

    def _count(self, name: str) -> None:
        what = "images" if name in PICTURES else name if name in self._limits else ""
        self._counts[what] += 1
        most, setting = self._limits.get(what, (_MOST_OTHERS, ""))
        if self._counts[what] > most:
            kind = TooManyLabels if what == "labels" else InputTooLarge
            raise kind(
                f"At most {most} {what or 'other fields'} fit into one form{setting and f' ({setting})'}.",
                pointer=f"/{what}" if what else None,
                limit=most,
            )


async def read_parts(request: Request, limits: Mapping[str, tuple[int, str]]) -> list[Part]:
    """Read a form to its end.

    Args:
        request: the request; its body is read here.
        limits: parts of one name at most, and the setting that says so ("": none); `images` counts `image` too.

    Raises:
        BodyMalformed: it is no form, or is cut off.
        InputTooLarge, TooManyLabels: it has too many parts.
        ClientDisconnect: the body breaks off.
    """
    _, parameters = parse_options_header(request.headers["content-type"])
    if parameters.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise BodyMalformed("The texts of a form are read as UTF-8; leave the charset out.")
    if not parameters.get(b"boundary"):
        raise BodyMalformed("The form's Content-Type has no boundary.")
    reader = _Reader(limits)
    told = {name: getattr(reader, name) for name in dir(reader) if name.startswith("on_")}
    parser: MultipartParser | None = None
    turn = time.perf_counter()
    async for chunk in request.stream():
        for start in range(0, len(chunk), _PIECE):
            try:
                parser = parser or MultipartParser(parameters[b"boundary"], told)  # type: ignore[arg-type]
                parser.write(chunk[start : start + _PIECE])
            except IronclipError:
                raise
            except Exception:
                # The parser meets raw bytes and has no closed set of exceptions; whatever it raises, the form is bad.
                raise BodyMalformed("The multipart form cannot be read.") from None
            if time.perf_counter() - turn > _TURN:
                await asyncio.sleep(0)
                turn = time.perf_counter()
    if not reader.whole:
        raise BodyMalformed("The multipart form is cut off: its last boundary is missing.")
    return reader.parts


def _decoded(data: bytes, fault: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BodyMalformed(fault) from None
