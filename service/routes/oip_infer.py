"""`POST /v2/models/{model}/infer`: classifications and embeddings as tensors."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from ironclip.errors import IronclipError, OptionError
from service.answers import Item, scores_of
from service.decisions import Plan, encoder_reference
from service.errors import MediaTypeUnsupported
from service.forms import media_type, off_loop
from service.oip import Inference, Limits, read_inference, shortened, wanted
from service.rate_limits import TEXT, reading
from service.routes.classify import DEFAULT_TOP_K, best, cache_status, check_size, points_of, softmax
from service.routes.common import Deadline, meter_of, service_of, stages_of
from service.routes.embed import embed_images, embed_texts, image_defence
from service.routes.embed import points_of as embedding_points
from service.routes.oip import model_of, version_of
from service.runtime import ServedEncoder
from service.tensors import HEADER_LENGTH, Output, write_outputs
from service.together import together

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

# Elements of one answer: those written as JSON, or as texts, and all.
_MAX_WRITTEN = 200_000
_MAX_ELEMENTS = 4_000_000
# Writing this many elements is left to a thread; a score that is only looked at counts as a tenth of one.
_THREAD_ELEMENTS = 10_000
_SCORES_PER_ELEMENT = 10
_DECIDED = frozenset({"scores", "labels", "cosine", "top_labels", "top_scores", "domain_score"})


@dataclass
class _Found:
    """What the model said of one request."""

    served: ServedEncoder
    names: list[str]
    plan: Plan | None = None
    items: list[Item] = field(default_factory=list)
    embedded: list[Item] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    defence: dict[str, Any] = field(default_factory=dict)


@router.post("/models/{model}/infer", operation_id="oipInfer", summary="Ask a model")
async def oip_infer(request: Request, model: str) -> Response:
    """Classify pictures among labels, or embed pictures and texts; tensors as JSON or as binary data.

    Pictures are files (`images`) or pixels at the encoder's resolution (`pixels`, without preprocessing). The
    parameters are the options of `/classify`; a label tree adds the outputs `level:NAME` and `level_labels:NAME`.
    One picture that cannot be used fails the request; the error says which.
    """
    return await _infer(request, model, None)


@router.post(
    "/models/{model}/versions/{version}/infer", operation_id="oipInferVersion", summary="Ask a version of a model"
)
async def oip_infer_version(request: Request, model: str, version: str) -> Response:
    """The same, if the model is served in this version: then the encoder is the one that is meant."""
    return await _infer(request, model, version)


async def _infer(request: Request, model: str, version: str | None) -> Response:
    service, stages = service_of(request), stages_of(request)
    deadline = Deadline(request)
    served = model_of(service, model, version)
    _check_media_type(request)
    settings = service.settings
    # A picture is a file or pixels there, never a URL: the protocol knows none.
    limits = Limits(
        replace(service.image_limits, urls=False), settings.max_images, settings.max_texts, settings.max_labels
    )
    async with deadline.receiving():
        body = await request.body()
    header = request.headers.get(HEADER_LENGTH)
    resolution = served.encoder.resolution
    asked = (body, header, served.reference, resolution, limits)
    inference: Inference = await off_loop(len(body), read_inference, *asked)
    found = await deadline.within(_answer(request, served, inference))

    def write() -> Response:
        outputs = [_output(found, inference, name) for name in found.names]
        head = {
            "model_name": served.name,
            "model_version": version_of(served),
            "id": inference.request.id or request.state.request_id,
            "parameters": _parameters(found, inference),
        }
        content, length = write_outputs(head, [(output, inference.binary(output.name)) for output in outputs])
        headers = {"Cache-Status": cache_status([*found.items, *found.embedded])}
        if length is None:
            return Response(content, 200, headers, "application/json")
        headers["Inference-Header-Content-Length"] = str(length)
        return Response(content, 200, headers, "application/octet-stream")

    with stages.time("serialise"):
        elements = _check_elements(found, inference)
        if found.plan is not None:
            elements += len(found.items) * scores_of(found.plan) // _SCORES_PER_ELEMENT
        return await asyncio.to_thread(write) if elements > _THREAD_ELEMENTS else write()


async def _answer(request: Request, served: ServedEncoder, inference: Inference) -> _Found:
    """Ask the model for what the outputs need."""
    service, stages, meter = service_of(request), stages_of(request), meter_of(request)
    _raise_first([picture.error for picture in inference.pictures])
    plan = None
    if inference.options is not None:
        await meter.pay(reading(inference.size))
        plan = await service.plan(inference.options, inference.size, tenant=meter.caller.tenant)
    levels = list(plan.level_nodes) if plan is not None else []
    names = wanted(inference, levels, plan is not None and plan.domain is not None)
    found = _Found(served, names, plan)
    decided = plan is not None and any(name in _DECIDED or ":" in name for name in names)
    embedded = "embedding" in names or ("warnings" in names and not decided)
    if plan is not None:
        check_size(plan, len(inference.pictures), inference.parameters.top_k or 1)
        found.defence = plan.defence_form
    _check_elements(found, inference)

    async def see() -> None:
        if decided and plan is not None:
            found.items = await service.answers.classify(plan, inference.pictures, stages, meter)
            _raise_first([item.error for item in found.items])
        if embedded:
            found.embedded = await _embed(request, found, inference)
            _raise_first([item.error for item in found.embedded])

    async def read() -> None:
        if "text_embedding" in names:
            found.texts = list(
                await embed_texts(request, served, inference.texts, inference.parameters.truncate, stages)
            )
            _raise_first(found.texts)

    async with meter.paid(_points(found, inference, decided or embedded)):
        await together([see(), read()])
    return found


def _points(found: _Found, inference: Inference, seen: bool) -> float:
    """What a request costs; pictures that are decided about and embedded go through the tower once.

    Without labels `_embed` pays for what it sees.
    """
    points = TEXT * len(inference.texts) if "text_embedding" in found.names else 0.0
    if found.plan is not None and seen:
        points += points_of(found.plan, inference.pictures)
    return points


async def _embed(request: Request, found: _Found, inference: Inference) -> list[Item]:
    plan, stages, meter = found.plan, stages_of(request), meter_of(request)
    if plan is not None:
        reads = plan if plan.defence.reads_labels else None
        asked = (found.served, plan.defence, plan.features_key, inference.pictures, stages, reads)
        return await service_of(request).answers.embed(*asked, tenant=plan.tenant, meter=meter)
    defence = image_defence(request, found.served, inference.parameters.defence, None)
    found.defence = {"name": defence.name, **defence.options()}
    async with meter.paid(embedding_points(inference.pictures, defence, [])):
        return await embed_images(request, found.served, inference.pictures, stages, defence)


def _output(found: _Found, inference: Inference, name: str) -> Output:
    """One output as a tensor."""
    plan, items = found.plan, found.items
    if name == "embedding":
        return _vectors(name, [item.vector for item in found.embedded])
    if name == "text_embedding":
        return _vectors(name, found.texts)
    if name == "warnings":
        texts = [",".join(item.warnings) for item in items or found.embedded]
        return Output(name, "BYTES", (len(texts),), texts)
    assert plan is not None
    labels = plan.label_set.names
    kind, _, level = name.partition(":")
    if kind == "labels":
        return Output(name, "BYTES", (len(labels),), labels)
    if kind == "level_labels":
        return Output(name, "BYTES", (len(plan.level_nodes[level]),), plan.level_nodes[level])
    if kind == "level":
        return _numbers(name, [_probabilities(item, f"level:{level}") for item in items])
    if kind == "scores":
        return _numbers(name, [_probabilities(item, "logits") for item in items])
    if kind in ("top_labels", "top_scores"):
        top_k = inference.parameters.top_k or DEFAULT_TOP_K
        ranked = [(row, best(row, top_k)) for row in (softmax(_scores(item)["logits"]) for item in items)]
        if kind == "top_scores":
            return _numbers(name, [shortened(row[ranks]) for row, ranks in ranked])
        shape = (len(items), len(ranked[0][1]))
        return Output(name, "BYTES", shape, [labels[k] for _, ranks in ranked for k in ranks])
    if kind == "cosine":
        return _numbers(name, [_scores(item)["cosine"] for item in items])
    assert kind == "domain_score"
    return _numbers(name, [_scores(item)["domain"][0] for item in items])


def _parameters(found: _Found, inference: Inference) -> dict[str, Any]:
    """What decided; values are texts, numbers and booleans, as the protocol wants its parameters."""
    served, plan = found.served, found.plan
    parameters: dict[str, Any] = {f"encoder_{key}": value for key, value in encoder_reference(served).items()}
    if inference.pictures:
        parameters["preprocessing"] = "none" if inference.prepared else served.encoder.preprocessing.digest
        parameters["defence"] = json.dumps(found.defence, sort_keys=True)
    if plan is not None:
        parameters |= {f"label_set_{key}": value for key, value in plan.reference.items()}
    if plan is not None and plan.domain is not None and found.items:
        scores = [float(_scores(item)["domain"][0]) for item in found.items]
        outside = [i for i, score in enumerate(scores) if score < plan.domain.threshold]
        parameters |= {"domain_threshold": plan.domain.threshold, "domain_outside": len(outside)}
        if outside:
            parameters["domain_warning"] = (
                f"{len(outside)} of {len(scores)} pictures (the first is {outside[0]}) are unlike what the encoder was "
                f"trained on ({plan.domain.description}); do not trust their scores."
            )
    return parameters


def _check_elements(found: _Found, inference: Inference) -> int:
    """Elements of all outputs.

    Raises:
        OptionError: too many; the text says what to ask for instead.
    """
    images, every, written = len(inference.pictures), 0, 0
    for name in found.names:
        kind, _, level = name.partition(":")
        if kind in ("embedding", "text_embedding"):
            count = found.served.encoder.dim * (images if kind == "embedding" else len(inference.texts))
        elif found.plan is None or kind in ("warnings", "domain_score"):
            count = images
        elif kind in ("level", "level_labels"):
            count = len(found.plan.level_nodes[level]) * (images if kind == "level" else 1)
        elif kind == "labels":
            count = len(found.plan.label_set)
        else:
            top_k = inference.parameters.top_k or DEFAULT_TOP_K if kind.startswith("top") else len(found.plan.label_set)
            count = images * min(top_k, len(found.plan.label_set))
        every += count
        texts = kind in ("labels", "top_labels", "level_labels", "warnings")
        written += count if texts or not inference.binary(name) else 0
    if every > _MAX_ELEMENTS or written > _MAX_WRITTEN:
        most = _MAX_ELEMENTS if every > _MAX_ELEMENTS else _MAX_WRITTEN
        raise OptionError(
            f"The answer would hold {every} elements, {written} of them texts or numbers in JSON; at most "
            f"{_MAX_ELEMENTS} and {_MAX_WRITTEN} fit. Ask for binary data (binary_data_output), for a top_k, or for "
            "fewer outputs or pictures.",
            pointer="/outputs",
            limit=most,
        )
    return every


def _check_media_type(request: Request) -> None:
    """Refuse what is neither JSON nor binary; clients of the protocol often send no type at all."""
    kind = media_type(request)
    if kind not in ("", "application/json", "application/octet-stream") and not kind.endswith("+json"):
        raise MediaTypeUnsupported("Send application/json, or application/octet-stream with binary data behind JSON.")


def _raise_first(outcomes: list[Any]) -> None:
    """Raise the first error among them: the protocol has no errors of single elements."""
    for outcome in outcomes:
        if isinstance(outcome, IronclipError):
            raise outcome


def _probabilities(item: Item, name: str) -> NDArray[np.float64]:
    return shortened(softmax(_scores(item)[name]))


def _scores(item: Item) -> dict[str, NDArray[Any]]:
    assert item.scores is not None
    return dict(item.scores)


def _numbers(name: str, rows: list[Any]) -> Output:
    values = np.stack(rows)
    return Output(name, "FP32", values.shape, values)


def _vectors(name: str, rows: list[Any]) -> Output:
    return _numbers(name, [np.asarray(row, np.float32) for row in rows])
