"""One request as it is sent: which of the service's three input forms fits, and how options go along."""

from __future__ import annotations

import base64
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from ironclip_client.errors import UsageError
from ironclip_client.images import Encoded
from ironclip_client.options import CallOptions, split
from ironclip_client.results import Meta

T = TypeVar("T")

# Options go into the address beside a bare picture up to this length: proxies cut addresses off at 4 to 8 kB.
_MAX_QUERY = 2000
# A form with more fields than this is slower to read than JSON.
_MAX_FIELDS = 1000
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,128}")
_LISTS = ("labels", "templates", "texts", "eps", "artefacts")

Again = Literal["safe", "refused", "never"]


@dataclass(frozen=True)
class Reply:
    """An answer that is no error: status, headers (names in lower case), body, and about the exchange."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    meta: Meta = field(default_factory=Meta)

    def json(self) -> Any:
        """The body; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, not sent yet, and how its answer is read.

    Attributes:
        again: when it may be sent once more: `safe`, whatever happened; `refused`, only if it surely was not begun;
            `never`.
        timeout: seconds for all tries together; the client's own if None.
    """

    method: str
    path: str
    read: Callable[[Reply], T]
    params: Sequence[tuple[str, str]] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None
    data: Mapping[str, list[str]] | None = None
    files: Sequence[tuple[str, tuple[str, bytes, str]]] | None = None
    again: Again = "safe"
    timeout: float | None = None


def plain_call(
    method: str,
    path: str,
    read: Callable[[Reply], T],
    options: Mapping[str, Any],
    *,
    params: Sequence[tuple[str, str]] = (),
    headers: Mapping[str, str] | None = None,
    document: Mapping[str, Any] | None = None,
    again: Again = "safe",
) -> Call[T]:
    """A call without pictures; with a document, which goes as JSON.

    Raises:
        UsageError: an option that it does not have, or a document that JSON cannot say.
    """
    call, _ = split(options, CallOptions)
    every = {**(headers or {}), **_call_headers(call)}
    if document is not None:
        every["Content-Type"] = "application/json"
    content = None if document is None else _dump(document)
    timeout = call.get("timeout")
    return Call(method, path, read, params=params, headers=every, content=content, again=again, timeout=timeout)


def image_call(
    path: str,
    image: Encoded,
    asked: Mapping[str, Any],
    call: Mapping[str, Any],
    read: Callable[[Reply], T],
    *,
    headers: Mapping[str, str] | None = None,
    again: Again = "safe",
) -> Call[T]:
    """A call about one picture: bare where the options fit into the address, else as a form, else as JSON."""
    every = {**(headers or {}), **_call_headers(call)}
    shared: dict[str, Any] = {"again": again, "timeout": call.get("timeout")}
    fields = form_fields(asked)
    if fields is not None and len(urllib.parse.urlencode(fields)) <= _MAX_QUERY:
        every["Content-Type"] = image.media_type
        return Call("POST", path, read, params=fields, headers=every, content=image.data, **shared)
    if fields is not None and len(fields) <= _MAX_FIELDS:
        files = [("image", ("image", image.data, image.media_type))]
        return Call("POST", path, read, headers=every, data=_grouped(fields), files=files, **shared)
    every["Content-Type"] = "application/json"
    document = {**asked, "image": base64.b64encode(image.data).decode()}
    return Call("POST", path, read, headers=every, content=_dump(document), **shared)


def images_call(
    path: str,
    images: Sequence[Encoded],
    asked: Mapping[str, Any],
    call: Mapping[str, Any],
    read: Callable[[Reply], T],
) -> Call[T]:
    """A call about several pictures, each with an outcome of its own: a form if the options go into one, else JSON."""
    headers, timeout = _call_headers(call), call.get("timeout")
    fields = form_fields(asked)
    if images and fields is not None and len(fields) <= _MAX_FIELDS:
        files = [("images", (f"image-{i}", one.data, one.media_type)) for i, one in enumerate(images)]
        return Call("POST", path, read, headers=headers, data=_grouped(fields), files=files, timeout=timeout)
    headers["Content-Type"] = "application/json"
    document = {**asked, "images": [base64.b64encode(one.data).decode() for one in images]}
    return Call("POST", path, read, headers=headers, content=_dump(document), timeout=timeout)


def form_fields(asked: Mapping[str, Any]) -> list[tuple[str, str]] | None:
    """Options as the fields of a form or of an address; None where only JSON can say them.

    Raises:
        UsageError: a text that is not Unicode.
    """
    fields: list[tuple[str, str]] = []
    for name, value in asked.items():
        values = _field_values(name, value)
        if values is None:
            return None
        fields += [(name, text) for text in values]
    for name, text in fields:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{name} holds a text that is not Unicode (a lone surrogate).") from None
    return fields


def _field_values(name: str, value: Any) -> list[str] | None:
    if isinstance(value, str):
        # The service reads a field that begins so as JSON, and one template without {} as the name of a list.
        ambiguous = value.lstrip().startswith("{") or (name == "templates" and "{}" in value)
        listed = name in _LISTS and name != "templates"
        return None if ambiguous or listed else [value]
    if isinstance(value, bool):
        return ["true" if value else "false"]
    if isinstance(value, (int, float)):
        return [repr(value)]
    if isinstance(value, Mapping) and name in ("defence", "tree"):
        return [_dump(value).decode()]
    if not isinstance(value, list) or name not in _LISTS or not value:
        return None
    if name == "templates" and len(value) == 1 and "{}" not in str(value[0]):
        return None
    if all(isinstance(one, str) for one in value) and name != "eps":
        return list(value)
    return [repr(one) for one in value] if name == "eps" and all(type(one) in (int, float) for one in value) else None


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples and arrays as lists, NumPy's numbers as numbers.

    Raises:
        UsageError: JSON has no such value.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError("JSON has no infinity and no NaN; give finite numbers.")
        return float(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        return [plain(one) for one in value]
    raise UsageError(f"A {type(value).__name__} cannot be sent as JSON.")


def several(values: object, name: str) -> list[Any]:
    """The values of an argument that takes several; raises UsageError for a lone text, bytes or none of many."""
    if isinstance(values, (str, bytes, bytearray, Mapping)) or not isinstance(values, Iterable):
        raise UsageError(f"{name} takes several: give a list, as in {name}=[...].")
    return list(values)


def segment(name: str) -> str:
    """A name as one part of a path.

    Raises:
        UsageError: no name, or one that is no part of a path.
    """
    if not isinstance(name, str) or name in ("", ".", ".."):
        raise UsageError(f"{name!r} is no name.")
    return urllib.parse.quote(name, safe="@")


def _call_headers(call: Mapping[str, Any]) -> dict[str, str]:
    request_id = call.get("request_id")
    if request_id is None:
        return {}
    if not isinstance(request_id, str) or not _REQUEST_ID.fullmatch(request_id):
        raise UsageError("A request_id has 8 to 128 letters, digits, '.', '_' or '-'.")
    return {"X-Request-Id": request_id}


def _grouped(fields: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, value in fields:
        grouped.setdefault(name, []).append(value)
    return grouped


def _dump(document: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise UsageError("A text is not Unicode (it has a lone surrogate).") from None
