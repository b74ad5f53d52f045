"""`/v2`: what the Open Inference Protocol asks about the server and its models; each served encoder is a model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ironclip import __version__
from ironclip.errors import EncoderNotFound, NotReady
from service.core import Service
from service.decisions import encoder_reference
from service.routes.common import json_response, service_of
from service.runtime import ServedEncoder
from service.telemetry import short

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

EXTENSIONS = ("binary_tensor_data", "parameters")


@router.get("", operation_id="oipServer", summary="The server")
@router.get("/", include_in_schema=False)
async def oip_server(request: Request) -> Response:
    """Name, version, and the extensions of the protocol that are spoken."""
    return json_response({"name": "ironclip", "version": __version__, "extensions": list(EXTENSIONS)})


@router.get("/health/live", operation_id="oipLive", summary="Is the server alive?")
async def oip_live(request: Request) -> Response:
    """200 as long as the process answers, 503 once a model worker is lost for good, as `/livez`."""
    live = not service_of(request).lost
    return json_response({"live": live}, status=200 if live else 503)


@router.get("/health/ready", operation_id="oipReady", summary="Are all models ready?")
async def oip_ready(request: Request) -> Response:
    """200 when requests can be answered, 503 otherwise, as `/readyz`."""
    service = service_of(request)
    ready = service.not_ready() is None
    return _health({"ready": ready, "live": not service.lost}, ready)


@router.get("/models", operation_id="oipModels", summary="Names of the models")
async def oip_models(request: Request) -> Response:
    """The served encoders' names; those of the settings also while they are being loaded."""
    service = service_of(request)
    return json_response({"models": list(dict.fromkeys([*service.settings.encoders, *service.models.names]))})


@router.get("/models/{model}", operation_id="oipModel", summary="Inputs and outputs of a model")
async def oip_model(request: Request, model: str) -> Response:
    """Its versions, inputs and outputs; no input is required by itself, see their descriptions."""
    return _metadata(request, model, None)


@router.get(
    "/models/{model}/versions/{version}", operation_id="oipModelVersion", summary="Inputs and outputs of a version"
)
async def oip_model_version(request: Request, model: str, version: str) -> Response:
    """The same; a version is the front of the encoder's digest."""
    return _metadata(request, model, version)


@router.get("/models/{model}/ready", operation_id="oipModelReady", summary="Is a model ready?")
async def oip_model_ready(request: Request, model: str) -> Response:
    """200 when the model can be asked, 503 while the service is loading, draining or stuck."""
    return _model_ready(request, model, None)


@router.get(
    "/models/{model}/versions/{version}/ready", operation_id="oipModelVersionReady", summary="Is a version ready?"
)
async def oip_model_version_ready(request: Request, model: str, version: str) -> Response:
    """The same of a version."""
    return _model_ready(request, model, version)


def _model_ready(request: Request, model: str, version: str | None) -> Response:
    service = service_of(request)
    try:
        name, ready = _seen(service, model, version).name, service.not_ready() is None
    except NotReady:
        name, ready = model, False
    return _health({"name": name, "ready": ready}, ready)


def model_of(service: Service, model: str, version: str | None) -> ServedEncoder:
    """The encoder behind a model's name (or `default`) and version, for a request.

    Raises:
        EncoderNotFound: there is no such model, or it is not served in this version.
        NotReady: it is not loaded yet.
    """
    if version is None:
        return service.encoder(model)
    if version not in _names_of(service, model):
        service.models.stable(model)  # a model that is not there is told as such
        raise EncoderNotFound(
            f"The model is served in the version {' or '.join(map(short, service.models.versions(model)))} alone: the "
            "front of its digest."
        )
    return service.encoder(f"{model}@{version}")


def _seen(service: Service, model: str, version: str | None) -> ServedEncoder:
    """The encoder to describe: never a canary, unless it is named."""
    return service.models.stable(model) if version is None else model_of(service, model, version)


def _names_of(service: Service, model: str) -> set[str]:
    """What a model's versions are called: the front of the digest, or the whole of it."""
    return {name for digest in service.models.versions(model) for name in (short(digest), digest)}


def version_of(served: ServedEncoder) -> str:
    """A model's version: the front of the encoder's digest, the same wherever the same weights are served."""
    return short(served.digest)


def _health(content: dict[str, Any], ready: bool) -> Response:
    return json_response(content) if ready else json_response(content, status=503, headers={"Retry-After": "1"})


def _metadata(request: Request, model: str, version: str | None) -> Response:
    service = service_of(request)
    served = _seen(service, model, version)
    return json_response(
        {
            "name": served.name,
            "versions": list(map(short, service.models.versions(served.name))),
            "platform": "ironclip_open_clip",
            "inputs": _inputs(served),
            "outputs": _outputs(served, served.domain is not None),
            "parameters": encoder_reference(served),
        }
    )


def _inputs(served: ServedEncoder) -> list[dict[str, Any]]:
    side = served.encoder.resolution
    pixels = (
        "Instead of images: RGB at the encoder's own resolution, UINT8, or FP32 from 0 to 1. No preprocessing is "
        "applied to them, as it is to images."
    )
    return [
        _tensor("images", "BYTES", [-1], "JPEG, PNG or WebP files; base64 in JSON. Also [N, 1]."),
        _tensor("pixels", "UINT8", [-1, 3, side, side], pixels, datatypes="UINT8, FP32"),
        _tensor("texts", "BYTES", [-1], "Texts to embed. Also [N, 1]."),
        _tensor("labels", "BYTES", [-1], "What pictures are classified among; also as a parameter, or label_set."),
    ]


def _outputs(served: ServedEncoder, domain: bool) -> list[dict[str, Any]]:
    """Outputs known beforehand; a label tree adds level:NAME and level_labels:NAME for each of its upper levels."""
    dim = served.encoder.dim
    outputs = [
        _tensor("scores", "FP32", [-1, -1], "Probability of each label; with labels, unless top_k is given."),
        _tensor("labels", "BYTES", [-1], "The labels, in the order of scores."),
        _tensor("top_labels", "BYTES", [-1, -1], "The best labels of each picture; with top_k."),
        _tensor("top_scores", "FP32", [-1, -1], "Their probabilities."),
        _tensor("cosine", "FP32", [-1, -1], "Cosine with each label's text weights; on request."),
        _tensor("embedding", "FP32", [-1, dim], "Unit vectors of pictures; without labels, or on request."),
        _tensor("warnings", "BYTES", [-1], "What preprocessing did to each picture, with commas; on request."),
        _tensor("text_embedding", "FP32", [-1, dim], "Unit vectors of texts."),
    ]
    if domain:
        outputs.append(_tensor("domain_score", "FP32", [-1], "Likeness to the training pictures; on request."))
    return outputs


def _tensor(name: str, datatype: str, shape: list[int], description: str, **more: str) -> dict[str, Any]:
    parameters = {"optional": True, "description": description, **more}
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
