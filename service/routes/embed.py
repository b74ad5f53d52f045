"""`POST /embed`: unit vectors for pictures and texts in one call."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from ironclip.defences import Defence, make_defence
from ironclip.errors import InputTooLarge, IronclipError, LabelError, OptionError
from service.answers import Item
from service.decisions import encoder_reference, feature_scope
from service.forms import Picture, read_ask
from service.negotiation import JSON, media_type_for
from service.problems import problem
from service.rate_limits import TEXT
from service.routes.classify import cache_status, check_size
from service.routes.common import (
    Deadline,
    fetched,
    json_response,
    meter_of,
    price_of,
    service_of,
    spared_of,
    stages_of,
)
from service.routes.remembering import remember
from service.runtime import ServedEncoder
from service.schemas import EmbedOptions, EmbedRequest, Options
from service.telemetry import Stages
from service.together import fault_of, together
from service.vector_forms import BYTES, NPY, converted, encoded, packed

router = APIRouter(tags=["inference"])

Floats = NDArray[np.float32]
TextOutcome = Floats | IronclipError


_NO_DEFENCE = make_defence()
# Unicode's categories Cc and Cs, without tabs and line breaks.
_UNREADABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# Media types of the answer, the usual one last.
FORMS = (BYTES, NPY, JSON)


@lru_cache(maxsize=64)
def _features_key(identity: tuple[str, str, str], defence: Defence, tenant: str) -> bytes:
    return feature_scope(identity, {"name": defence.name, **defence.options()}, tenant)


@router.post("/embed", operation_id="embed", summary="Embed pictures and texts")
async def embed(request: Request) -> Response:
    """Vectors of length 1 for `images` and `texts`, in the same order; their dot product is the cosine.

    Send JSON, a multipart form (`images` as files, `texts` repeated), or the bare image with the options as query
    parameters. An item that cannot be used has `{"error": problem}` in its place. A `defence` stands before the
    pictures alone; texts are embedded as they are. In float32 and float16 the dot product of two vectors is their
    cosine. Those in int8 are not of length 1: take them in a wider type, and divide their product by their lengths.
    Those in binary are compared by the bits in which they differ.

    With `Accept: application/x-npy` the answer is a NumPy file of all vectors, one a row, those of the images first;
    with `application/octet-stream` it is the same numbers alone. There, an item that cannot be used fails the request,
    and nothing is said of warnings, preprocessing and defence; the encoder is in a header.
    """
    service, stages = service_of(request), stages_of(request)
    form = media_type_for(request, FORMS)
    deadline = Deadline.of(request)
    async with deadline.receiving():
        ask = await read_ask(request, EmbedRequest, EmbedOptions, service.image_limits, service.settings.max_images)
    options = ask.options
    texts = options.texts
    served = service.encoder(options.encoder)
    check_texts(texts, service.settings.max_texts)
    defence = image_defence(request, served, options.defence, options.label_set)
    known = [picture.error for picture in ask.pictures] if ask.single or form != JSON else []
    if form != JSON:
        known += _faults(texts, service.settings.max_text_chars).values()

    async def work() -> tuple[list[Item], list[TextOutcome]]:
        _raise_first(known)
        meter = meter_of(request)
        async with meter.paid(points_of(ask.pictures, defence, texts)) as store:
            images = embed_images(request, served, ask.pictures, stages, defence, options.label_set)
            vectors = embed_texts(request, served, texts, options.truncate, stages)
            found, read = await together([images, vectors])
            await meter.give_back(spared_of(ask.pictures, found, defence), store)
            if ask.single:
                _raise_first([found[0].error])
        if form != JSON:  # a row cannot hold an error; and what it cost to find out is paid for
            _raise_first([*(item.error for item in found), *read])
        return found, read

    items, vectors = await deadline.within(work())
    headers = {"Cache-Status": cache_status(items), "Vary": "Accept"}
    if form == JSON:
        content = {
            "encoder": encoder_reference(served),
            "dim": served.encoder.dim,
            "embed_dtype": options.embed_dtype,
            "preprocessing": {"digest": served.encoder.preprocessing.digest},
            "defence": {"name": defence.name, **defence.options()},
            **_outcomes(items, vectors, options, request.state.request_id),
        }
        answer = json_response(content, stages, headers=headers)
    else:
        with stages.time("serialise"):
            found = [*(item.vector for item in items), *vectors]
            rows = np.stack([vector for vector in found if isinstance(vector, np.ndarray)])
            if len(rows) != len(found):
                raise RuntimeError("an item has neither a vector nor an error, and rows would be somebody else's")
            answer = Response(packed(converted(rows, options.embed_dtype), form), headers=headers, media_type=form)
    if not texts:  # those are embedded each time
        remember(request, answer, options.encoder, served, ask.pictures, items, None, options.label_set)
    return answer


def _raise_first(outcomes: Sequence[object]) -> None:
    """Raise the first error among them."""
    for outcome in outcomes:
        if isinstance(outcome, IronclipError):
            raise outcome


def _faults(texts: Sequence[str], limit: int) -> dict[int, LabelError]:
    """What is wrong with which of the texts, before their tokens are counted."""
    found: dict[int, LabelError] = {}
    for i, text in enumerate(texts):
        try:
            check_text(text, limit, f"/texts/{i}")
        except LabelError as error:
            found[i] = error
    return found


def _outcomes(
    items: Sequence[Item], vectors: Sequence[TextOutcome], options: EmbedOptions, request_id: str
) -> dict[str, list[dict[str, Any]]]:
    """The answers for pictures and texts, each with its vector or its error."""

    def form_of(vector: Floats) -> list[float] | str:
        return encoded(converted(vector, options.embed_dtype), options.encoding_format)

    def text_answer(vector: TextOutcome) -> dict[str, Any]:
        if isinstance(vector, IronclipError):
            return {"error": problem(vector, request_id)}
        return {"embedding": form_of(vector)}

    def image_answer(item: Item) -> dict[str, Any]:
        if item.error is not None or item.vector is None:
            return {"error": problem(item.error, request_id)} if item.error else {}
        return {"embedding": form_of(item.vector), "warnings": item.warnings}

    return {"images": [image_answer(item) for item in items], "texts": [text_answer(vector) for vector in vectors]}


def points_of(pictures: Sequence[Picture], defence: Defence, texts: Sequence[str]) -> float:
    """What the vectors cost, in points; a label set that a defence reads is paid for beside them."""
    return price_of(pictures, defence) + TEXT * len(texts)


def image_defence(
    request: Request, served: ServedEncoder, asked: dict[str, Any] | str | None, label_set: str | None
) -> Defence:
    """What stands before the pictures of an embedding: what is asked for, or the encoder's own where that can.

    Raises:
        OptionError: as `Plans.defence`; also a defence that reads the labels without a label set, and a label set that
            nothing reads.
    """
    defence = service_of(request).defence(served, asked)
    if asked is None and defence.reads_labels and label_set is None:
        defence = _NO_DEFENCE
    if defence.reads_labels and label_set is None:
        raise OptionError(
            f"The defence {defence.name!r} makes a picture's vector from the texts of the labels: name a registered "
            "label_set, or leave the defence out.",
            pointer="/label_set",
        )
    if label_set is not None and not defence.reads_labels:
        raise OptionError(
            f"Under the defence {defence.name!r} a vector does not depend on labels: leave label_set out, or name a "
            "defence that reads them.",
            pointer="/label_set",
        )
    return defence


async def embed_images(
    request: Request,
    served: ServedEncoder,
    pictures: Sequence[Picture],
    stages: Stages,
    defence: Defence,
    label_set: str | None = None,
) -> list[Item]:
    """Vectors of pictures; with a label set for a defence that reads it.

    Raises:
        InputTooLarge: the defence would hold too much of so many pictures and labels.
    """
    if not pictures:
        return []
    service, meter, plan = service_of(request), meter_of(request), None
    tenant = meter.caller.tenant
    if label_set is not None:
        asked = {"name": defence.name, **defence.options()}
        options = Options(encoder=served.reference, label_set=label_set, defence=asked)
        plan = await service.plan(options, tenant=tenant)
        check_size(plan, len(pictures), top_k=1)
    pictures = await fetched(request, pictures, served, defence)
    key = _features_key(served.identity, defence, tenant)
    return await service.answers.embed(served, defence, key, pictures, stages, plan, tenant=tenant, meter=meter)


async def embed_texts(
    request: Request, served: ServedEncoder, texts: Sequence[str], truncate: bool | None, stages: Stages
) -> list[TextOutcome]:
    """Unit vectors of texts; one that cannot be used has its error in its place.

    A text that is too long is cut where `truncate` is true; it is None where the route has no such option.
    """
    if not texts:
        return []
    errors = _faults(texts, service_of(request).settings.max_text_chars)
    good = [text for i, text in enumerate(texts) if i not in errors]
    with stages.time("model"):
        found = await served.encode_texts(good, truncate=bool(truncate)) if good else []
    fault, vectors = fault_of(found), iter(found)
    if fault is not None:
        raise fault
    outcomes: list[TextOutcome] = []
    for i in range(len(texts)):
        outcome = errors[i] if i in errors else next(vectors)
        if isinstance(outcome, IronclipError):
            outcome.pointer = f"/texts/{i}"
            if truncate is not None and isinstance(outcome, LabelError) and outcome.may_be_cut:
                outcome.detail += " Or set truncate, which cuts it."
            outcomes.append(outcome)
        elif isinstance(outcome, Tensor):
            outcomes.append(unit(outcome.numpy()))
    return outcomes


def check_texts(texts: Sequence[str], limit: int) -> None:
    """Raise InputTooLarge for more texts than fit into one request."""
    if len(texts) > limit:
        raise InputTooLarge(
            f"{len(texts)} texts were sent; at most {limit} fit into one request.", pointer="/texts", limit=limit
        )


def check_text(text: str, limit: int, pointer: str) -> None:
    """Raise LabelError for a text that could be no label's prompt; tokens are counted later.

    It is what `ironclip.labels` refuses: too many characters, nothing that can be seen, control characters and lone
    surrogates. But a text may have several lines: to a tokenizer tabs and line breaks are spaces.
    """
    if len(text) > limit:
        raise LabelError(
            f"A text of {len(text)} characters; at most {limit} are allowed.", pointer=pointer, limit=limit
        )
    text = text.strip()
    if all(unicodedata.category(c) in ("Cf", "Zs") for c in text):
        raise LabelError("A text is empty.", pointer=pointer)
    bad = _UNREADABLE.search(text)
    if bad is not None:
        raise LabelError(f"A text holds the character U+{ord(bad[0]):04X}, which no prompt can have.", pointer=pointer)


def unit(vector: Floats) -> Floats:
    """The vector at length 1."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    result: Floats = (vector / max(norm, 1e-12)).astype(np.float32)
    return result
