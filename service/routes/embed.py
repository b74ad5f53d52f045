"""`POST /embed`: unit vectors for pictures and texts in one call."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from ironclip.defences import make_defence
from ironclip.errors import InputTooLarge, IronclipError, LabelError
from service.answers import Item
from service.decisions import encoder_reference, feature_scope
from service.errors import problem
from service.forms import Picture, read_ask
from service.routes.classify import cache_status
from service.routes.common import Deadline, json_response, service_of, stages_of
from service.runtime import ServedEncoder
from service.schemas import EmbedOptions, EmbedRequest
from service.telemetry import Stages

router = APIRouter(tags=["inference"])

Floats = NDArray[np.float32]
TextOutcome = Floats | IronclipError


_NO_DEFENCE = make_defence()


@lru_cache(maxsize=64)
def _plain_key(served: ServedEncoder) -> bytes:
    return feature_scope(served, {"name": _NO_DEFENCE.name, **_NO_DEFENCE.options()})


@router.post("/embed", operation_id="embed", summary="Embed pictures and texts")
async def embed(request: Request) -> Response:
    """Vectors of length 1 for `images` and `texts`, in the same order; their dot product is the cosine.

    Send JSON, a multipart form (`images` as files, `texts` repeated), or the bare image with the options as query
    parameters. An item that cannot be used has `{"error": problem}` in its place.
    """
    service, stages = service_of(request), stages_of(request)
    deadline = Deadline(request)
    with deadline.receiving():
        ask = await read_ask(request, EmbedRequest, EmbedOptions, service.image_limits, service.settings.max_images)
    options = ask.options
    texts = options.texts
    served = service.encoder(options.encoder)
    check_texts(texts, service.settings.max_texts)

    async def work() -> tuple[list[Item], list[TextOutcome]]:
        if ask.single and ask.pictures[0].error is not None:
            raise ask.pictures[0].error
        images = embed_images(request, served, ask.pictures, stages)
        vectors = embed_texts(request, served, texts, options.truncate, stages)
        found, read = await asyncio.gather(images, vectors)
        return found, read

    items, vectors = await deadline.within(work())
    if ask.single and items[0].error is not None:
        raise items[0].error
    request_id, encoding = request.state.request_id, options.encoding_format

    def text_answer(vector: TextOutcome) -> dict[str, Any]:
        if isinstance(vector, IronclipError):
            return {"error": problem(vector, request_id)}
        return {"embedding": encoded(vector, encoding)}

    def image_answer(item: Item) -> dict[str, Any]:
        if item.error is not None or item.features is None:
            return {"error": problem(item.error, request_id)} if item.error else {}
        return {"embedding": encoded(unit(item.features[0]), encoding), "warnings": item.warnings}

    content = {
        "encoder": encoder_reference(served),
        "dim": served.encoder.dim,
        "preprocessing": {"digest": served.encoder.preprocessing.digest},
        "images": [image_answer(item) for item in items],
        "texts": [text_answer(vector) for vector in vectors],
    }
    return json_response(content, stages, headers={"Cache-Status": cache_status(items)})


async def embed_images(
    request: Request, served: ServedEncoder, pictures: Sequence[Picture], stages: Stages
) -> list[Item]:
    """Features of pictures, without a defence."""
    if not pictures:
        return []
    return await service_of(request).answers.embed(served, _NO_DEFENCE, _plain_key(served), pictures, stages)


async def embed_texts(
    request: Request, served: ServedEncoder, texts: Sequence[str], truncate: bool, stages: Stages
) -> list[TextOutcome]:
    """Unit vectors of texts; a text that is too long has its error in its place."""
    if not texts:
        return []
    limit = service_of(request).settings.max_text_chars
    errors: dict[int, LabelError] = {}
    for i, text in enumerate(texts):
        try:
            check_text(text, limit, f"/texts/{i}")
        except LabelError as error:
            errors[i] = error
    good = [text for i, text in enumerate(texts) if i not in errors]
    with stages.time("model"):
        vectors = iter(await served.encode_texts(good, truncate=truncate) if good else [])
    outcomes: list[TextOutcome] = []
    for i in range(len(texts)):
        outcome = errors[i] if i in errors else next(vectors)
        if isinstance(outcome, LabelError):
            outcome.pointer = f"/texts/{i}"
        elif isinstance(outcome, Exception):
            raise outcome
        outcomes.append(outcome if isinstance(outcome, LabelError) else unit(outcome.numpy()))
    return outcomes


def check_texts(texts: Sequence[str], limit: int) -> None:
    """Raise InputTooLarge for more texts than fit into one request."""
    if len(texts) > limit:
        raise InputTooLarge(
            f"{len(texts)} texts were sent; at most {limit} fit into one request.", pointer="/texts", limit=limit
        )


def check_text(text: str, limit: int, pointer: str) -> None:
    """Raise LabelError for a text that is empty or has too many characters; tokens are counted later."""
    if not text.strip():
        raise LabelError("A text is empty.", pointer=pointer)
    if len(text) > limit:
        raise LabelError(
            f"A text of {len(text)} characters; at most {limit} are allowed.", pointer=pointer, limit=limit
        )


def unit(vector: Floats) -> Floats:
    """The vector at length 1."""
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    result: Floats = (vector / max(norm, 1e-12)).astype(np.float32)
    return result


def encoded(vector: Floats, encoding: str) -> list[float] | str:
    """The vector as JSON numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = vector.astype(np.float64).round(8).tolist()
    return numbers
