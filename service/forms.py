"""One request in any of its three forms (JSON, multipart, the bare image) -> options and pictures.

What is wrong with one picture stays with that picture; everything else is the request's own fault and is raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import Request
from torch import Tensor

from ironclip.errors import ImageError, InputTooLarge, IronclipError
from service.container import ImageLimits
from service.containers import sniff
from service.errors import BodyMalformed, MediaTypeUnsupported, RequestInvalid
from service.form_parts import PICTURES, Part, read_parts
from service.headers import header
from service.images import bytes_digest, check_declared_type, is_image_type, is_url, parse_data
from service.problems import from_validation
from service.settings import Settings

M = TypeVar("M", bound=BaseModel)

_ACCEPTED = "application/json, multipart/form-data, image/jpeg, image/png or image/webp"
# Bodies larger than this are taken apart in a thread: base64 and SHA-256 would hold up the event loop.
_THREAD_BYTES = 1 << 20
# Values in one JSON text at most. A parser keeps the interpreter to itself from the first byte to the last, in a
# thread too, and makes a hundred bytes of memory out of three: so they are counted, by their commas, before it runs.
_MAX_VALUES = 500_000


@dataclass(frozen=True)
class Picture:
    """One picture as it came: its bytes and their digest (hex), or its pixels, or why it cannot be used.

    `pointer` says where in the request it stood. A picture that came as pixels (uint8 [3, R, R], or float32 in [0, 1])
    has no file: `data` and `digest` are empty, and `pixels_digest` is what caches know it by. One that is still a URL
    has nothing but that; `service.image_urls` fetches it.
    """

    data: bytes = b""
    digest: str = ""
    declared: str | None = None
    pointer: str = ""
    error: IronclipError | None = None
    pixels: Tensor | None = None
    pixels_digest: bytes = b""
    url: str = ""


@dataclass(frozen=True)
class Ask(Generic[M]):
    """A request with its pictures taken out.

    Attributes:
        options: the checked fields.
        pictures: in the caller's order.
        single: one picture was sent as such, so the answer is one object and its fault is the request's.
        size: bytes that the options took as they came.
    """

    options: M
    pictures: list[Picture]
    single: bool
    size: int = 0


def media_type(request: Request) -> str:
    """The request's Content-Type without its parameters, in lower case."""
    return (header(request.scope, b"content-type") or "").partition(";")[0].strip().lower()


async def read_json(request: Request, model: type[M]) -> M:
    """Read a JSON body into a model.

    Raises:
        MediaTypeUnsupported: the body is not declared to be JSON.
        BodyMalformed, RequestInvalid, InputTooLarge: as their names say.
    """
    kind = media_type(request)
    if not is_json(kind):
        raise MediaTypeUnsupported(f"Send application/json, and say so in Content-Type; here it says {_shown(kind)}.")
    body = await request.body()
    parsed: M = await off_loop(len(body), parse_json, body, model)
    return parsed


async def read_ask(request: Request, model: type[M], options: type[M], limits: ImageLimits, max_images: int) -> Ask[M]:
    """Read a request for pictures in whichever form it came.

    Args:
        request: the request; its body is read here.
        model: the JSON form, with `images` and perhaps `image`.
        options: the same without the pictures, for form fields and query parameters.
        limits: for each picture.
        max_images: pictures in one request at most.

    Raises:
        IronclipError: the request as a whole cannot be read.
    """
    kind = media_type(request)
    if not (kind == "multipart/form-data" or is_raw(kind) or is_json(kind)):
        raise MediaTypeUnsupported(
            f"Send one of {_ACCEPTED}, and say which in Content-Type; here it says {_shown(kind)}."
        )
    if request.query_params and not is_raw(kind):
        raise RequestInvalid("Put the options into the body; query parameters go with a bare image only.")
    if kind == "multipart/form-data":
        return await _read_multipart(request, options, limits, max_images)
    if is_raw(kind):
        data = await request.body()
        asked, size = await _read_fields(options, _query(request))
        digest = getattr(request.state, "body_digest", "")
        picture = await off_loop(len(data), picture_from_bytes, data, kind, limits, "", digest)
        return Ask(asked, [picture], True, size)
    asked = await read_json(request, model)
    one: str | None = getattr(asked, "image", None)
    texts: list[str] = [one] if one is not None else (getattr(asked, "images", None) or [])
    pointer = "/image" if one is not None else "/images/{}"
    size = len(await request.body()) - sum(map(len, texts))
    return Ask(asked, await pictures_from_text(texts, limits, max_images, pointer), one is not None, size)


def _query(request: Request) -> list[tuple[str, str]]:
    """The query parameters; the framework would put a replacement character for what is not UTF-8."""
    try:
        return parse_qsl(request.scope["query_string"].decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise BodyMalformed("The query parameters are not UTF-8 (percent-encoded).") from None


async def pictures_from_text(
    texts: Sequence[str], limits: ImageLimits, max_images: int, pointer: str = "/input/{}"
) -> list[Picture]:
    """Read pictures from base64 or `data:` URIs; `pointer` says where they stood, with `{}` for the index.

    Raises:
        InputTooLarge: more than `max_images`.
    """
    _check_count(len(texts), max_images)
    pictures: list[Picture] = await off_loop(sum(map(len, texts)), _pictures_from_text, texts, limits, pointer)
    return pictures


async def _read_multipart(request: Request, options: type[M], limits: ImageLimits, max_images: int) -> Ask[M]:
    fields: list[tuple[str, str]] = []
    pictures: list[Picture] = []
    single = False
    for part in await read_parts(request, _part_limits(request, max_images)):
        name = part.name
        if name not in PICTURES:
            if part.is_file:
                raise RequestInvalid(f"The field {name[:60]!r} is a file; only image and images are files.")
            fields.append((name, part.take_text()))
            continue
        if name == "image" and pictures:
            raise RequestInvalid("The field image came more than once, or beside images; send several as images.")
        if single:
            raise RequestInvalid("Give exactly one of image and images.")
        single = name == "image"
        pointer = "/image" if single else f"/images/{len(pictures)}"
        pictures.append(await off_loop(part.size, _picture_from_part, part, limits, pointer))
    if not pictures:
        raise RequestInvalid("The form has no image: add a file field called image, or several called images.")
    asked, size = await _read_fields(options, fields)
    return Ask(asked, pictures, single, size)


def _part_limits(request: Request, max_images: int) -> dict[str, tuple[int, str]]:
    """How many parts of one name a form may have: no more than its options are allowed."""
    settings: Settings = request.app.state.service.settings
    return {
        "images": (max_images, "IRONCLIP_MAX_IMAGES" if max_images == settings.max_images else ""),
        "labels": (settings.max_labels, "IRONCLIP_MAX_LABELS"),
        "texts": (settings.max_texts, "IRONCLIP_MAX_TEXTS"),
    }


def _picture_from_part(part: Part, limits: ImageLimits, pointer: str) -> Picture:
    if part.is_file:
        return picture_from_bytes(part.take(), part.kind, limits, pointer)
    return picture_from_text(part.take_text(), limits, pointer)


def _fields(items: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Form fields or query parameters as the JSON form has them: lists where a field may repeat."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in ("labels", "templates", "texts", "eps", "artefacts"):
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise RequestInvalid(f"The field {name[:60]!r} came more than once.")
        else:
            fields[name] = _object(name, value) if name in ("attack", "defence", "tree", "gallery") else value
    templates = fields.get("templates")
    if templates is not None and len(templates) == 1 and "{}" not in templates[0]:
        fields["templates"] = templates[0]  # the name of a list of templates
    return fields


def _object(name: str, value: str) -> object:
    if not value.lstrip().startswith("{"):
        return value
    _check_values(value.encode("utf-8", "replace"))
    try:
        # Not the standard library's parser: that one lets lone surrogates in, and any depth.
        return from_json(value)
    except ValueError:
        raise RequestInvalid(f"The field {name!r} looks like JSON and is not.") from None


async def _read_fields(model: type[M], items: Sequence[tuple[str, str]]) -> tuple[M, int]:
    """The options from form fields or query parameters, and how long these are together."""
    size = sum(len(value) for _, value in items)
    return await off_loop(size, _validate, model, items), size


def _validate(model: type[M], items: Sequence[tuple[str, str]]) -> M:
    try:
        return model.model_validate(_fields(items))
    except ValidationError as error:
        raise from_validation(error) from None


def parse_json(body: bytes, model: type[M]) -> M:
    """Read a JSON text into a model; blocks. Raises BodyMalformed, RequestInvalid or InputTooLarge."""
    _check_values(body)
    try:
        # Strict: a number in quotes is a caller's mistake, better told than guessed at.
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise from_validation(error) from None


def _check_values(text: bytes) -> None:
    """Raise InputTooLarge for JSON with too many values (commas within texts count too)."""
    commas = 0
    for start in range(0, len(text) if len(text) > _MAX_VALUES else 0, _THREAD_BYTES):
        commas += text.count(b",", start, start + _THREAD_BYTES)
        if commas > _MAX_VALUES:
            raise InputTooLarge(f"At most {_MAX_VALUES} values fit into one request.", limit=_MAX_VALUES)


def _pictures_from_text(texts: Sequence[str], limits: ImageLimits, pointer: str) -> list[Picture]:
    return [picture_from_text(text, limits, pointer.format(i)) for i, text in enumerate(texts)]


def picture_from_text(text: str, limits: ImageLimits, pointer: str) -> Picture:
    """A picture from base64 or a `data:` URI; or its URL, where the limits let one stand for a picture."""
    if limits.urls and is_url(text):
        return Picture(url=text, pointer=pointer)
    try:
        data, declared = parse_data(text, limits)
    except ImageError as error:
        return Picture(error=error.at(pointer))
    return picture_from_bytes(data, declared, limits, pointer)


def picture_from_bytes(
    data: bytes, declared: str | None, limits: ImageLimits, pointer: str = "", digest: str = ""
) -> Picture:
    """A picture from an encoded file; what can be told from the first bytes is checked, also for one a cache knows.

    `digest` is that of the bytes, where it is known already.
    """
    try:
        limits.check_bytes(len(data))
        check_declared_type(sniff(data), declared)
    except ImageError as error:
        return Picture(error=error.at(pointer))
    return Picture(data, digest or bytes_digest(data), declared, pointer)


def is_json(kind: str) -> bool:
    """Whether a media type is JSON."""
    return kind == "application/json" or kind.endswith("+json")


def is_raw(kind: str) -> bool:
    """Whether a body of this media type is the picture itself, of a format that is read."""
    return is_image_type(kind)


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise InputTooLarge(
            f"{count} images were sent; at most {limit} fit into one request.", pointer="/images", limit=limit
        )


async def off_loop(size: int, work: Any, *args: Any) -> Any:
    """Call `work`, in a thread where it is about so many bytes that it would hold up the event loop."""
    return work(*args) if size < _THREAD_BYTES else await asyncio.to_thread(work, *args)


def _shown(kind: str) -> str:
    known = ("application/x-www-form-urlencoded", "text/plain")
    return kind if kind in known else "another type" if kind else "nothing"
