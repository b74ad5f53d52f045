"""`/v1`: OpenAI's embeddings format, with pictures as `data:` URIs among the texts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ironclip.errors import InputTooLarge, IronclipError, OptionError, Unavailable
from service.errors import RequestInvalid
from service.forms import pictures_from_text, read_json
from service.routes.common import Deadline, json_response, meter_of, service_of, stages_of
from service.routes.embed import check_texts, embed_images, embed_texts, image_defence, points_of
from service.runtime import ServedEncoder
from service.schemas import OpenAIEmbeddingRequest
from service.together import together
from service.vector_forms import converted, encoded

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_TURN = 16  # texts whose tokens are counted in one go


@dataclass(frozen=True)
class Inputs:
    """The parts of `input` by kind, each with its place."""

    texts: list[tuple[int, str]]
    images: list[tuple[int, str]]


@router.post("/embeddings", operation_id="openaiEmbeddings", summary="Embeddings in OpenAI's format")
async def openai_embeddings(request: Request) -> Response:
    """Unit vectors for texts and pictures mixed in one `input`, as OpenAI's clients ask for them."""
    service, stages = service_of(request), stages_of(request)
    deadline = Deadline(request)
    async with deadline.receiving():
        asked = await read_json(request, OpenAIEmbeddingRequest)
    served = service.encoder(asked.model)
    if asked.dimensions is not None and asked.dimensions != served.encoder.dim:
        raise OptionError(
            f"This encoder's vectors have {served.encoder.dim} dimensions and cannot be shortened.",
            pointer="/dimensions",
            limit=served.encoder.dim,
        )
    limits = service.settings
    if isinstance(asked.input, list) and len(asked.input) > limits.max_texts + limits.max_images:
        raise InputTooLarge(
            f"{len(asked.input)} inputs were sent; at most {limits.max_texts} texts and {limits.max_images} pictures "
            "fit into one request.",
            pointer="/input",
            limit=limits.max_texts + limits.max_images,
        )
    inputs = split_input(asked.input)
    check_texts([text for _, text in inputs.texts], service.settings.max_texts)
    pictures = await pictures_from_text(
        [uri for _, uri in inputs.images], service.image_limits, service.settings.max_images
    )

    async def work() -> tuple[dict[int, Any], int]:
        _raise_first([picture.error for picture in pictures], [place for place, _ in inputs.images])
        texts, defence = [text for _, text in inputs.texts], image_defence(request, served, None, None)
        async with meter_of(request).paid(points_of(pictures, defence, texts)):
            vectors, items = await together(
                [
                    embed_texts(request, served, texts, None, stages),
                    embed_images(request, served, pictures, stages, defence),
                ]
            )
            # What the service could not do is not paid for.
            _raise_first([item.error for item in items], [place for place, _ in inputs.images], Unavailable)
            _raise_first(vectors, [place for place, _ in inputs.texts], Unavailable)
        _raise_first(vectors, [place for place, _ in inputs.texts])
        _raise_first([item.error for item in items], [place for place, _ in inputs.images])
        found: dict[int, Any] = {place: vector for (place, _), vector in zip(inputs.texts, vectors, strict=True)}
        for (place, _), item in zip(inputs.images, items, strict=True):
            assert item.vector is not None
            found[place] = item.vector
        return found, await _count_tokens(served, texts)

    vectors, tokens = await deadline.within(work())
    content = {
        "object": "list",
        "model": served.name,
        "data": [
            {
                "object": "embedding",
                "index": i,
                "embedding": encoded(converted(vectors[i], "float32"), asked.encoding_format),
            }
            for i in sorted(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return json_response(content, stages)


@router.get("/models", operation_id="openaiModels", summary="Encoders in OpenAI's format")
async def openai_models(request: Request) -> Response:
    """The served encoders, as OpenAI lists models."""
    return json_response({"object": "list", "data": [_model(one) for one in service_of(request).models.served]})


@router.get("/models/{model}", operation_id="openaiModel", summary="One encoder in OpenAI's format")
async def openai_model(request: Request, model: str) -> Response:
    """One served encoder, as OpenAI describes a model."""
    return json_response(_model(service_of(request).models.stable(model)))


async def _count_tokens(served: ServedEncoder, texts: Sequence[str]) -> int:
    """Tokens of all texts, a few at a time: a thread cannot be cancelled, and the caller may go."""
    tokens = 0
    for start in range(0, len(texts), _TURN):
        tokens += await asyncio.to_thread(_tokens_in, served, texts[start : start + _TURN])
    return tokens


def _tokens_in(served: ServedEncoder, texts: Sequence[str]) -> int:
    return sum(served.encoder.count_tokens(text) for text in texts)


def split_input(value: object) -> Inputs:
    """Sort `input` into texts and pictures.

    A string that begins with `data:image/` is a picture; so is a part `{"type": "image_url", "image_url":
    {"url": ...}}`.

    Raises:
        RequestInvalid: empty, tokens instead of text, or parts of another kind.
    """
    items = value if isinstance(value, list) else [value]
    inputs = Inputs([], [])
    for i, item in enumerate(items):
        text, image = _part(item, f"/input/{i}" if isinstance(value, list) else "/input")
        if image is None and text[:11].lower() == "data:image/":
            text, image = "", text
        if image is None:
            inputs.texts.append((i, text))
        else:
            inputs.images.append((i, image))
    if not items:
        raise _fault("/input", "Give at least one text or image.")
    return inputs


def _part(item: object, pointer: str) -> tuple[str, str | None]:
    """(text, None) or ("", image) of one element."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and item.get("type") == "text" and isinstance(item.get("text"), str):
        return item["text"], None
    if isinstance(item, dict) and item.get("type") == "image_url":
        url = item.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return "", url
    raise _fault(pointer, "Give a text, a data: URI, or a part of type text or image_url; tokens are not read.")


def _fault(pointer: str, detail: str) -> RequestInvalid:
    return RequestInvalid(detail, errors=[{"pointer": pointer, "code": "input", "detail": detail}])


def _raise_first(outcomes: Sequence[object], places: Sequence[int], kind: type[IronclipError] = IronclipError) -> None:
    for outcome, place in zip(outcomes, places, strict=True):
        if isinstance(outcome, kind):
            outcome.pointer = f"/input/{place}"
            raise outcome


def _model(served: ServedEncoder) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "ironclip"}
