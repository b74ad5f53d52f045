"""The OpenAPI 3.1 document: what the routes read from raw bytes, said to people and to generators of clients.

FastAPI contributes paths, summaries and path parameters; bodies, answers and problems are put in here, because
the routes parse bodies themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema
from pydantic_core import core_schema

from service import answer_schemas as answers
from service import oip_schemas, probe_schemas, schemas
from service.access import ACCESS
from service.access import operation as operation_name
from service.errors import PROBLEM_JSON, problem_types

Json = dict[str, Any]

_DESCRIPTION = """CLIP encoders that are hard to fool, over HTTP.

Every error is an RFC 9457 problem (below `/v1`: OpenAI's error object, below `/v2`: `{"error": text}`) with a stable
`code`, which `/problems/{code}` explains. Every answer carries `X-Request-Id` (yours, if it matches
`^[A-Za-z0-9._-]{8,128}$`), a `traceparent` (W3C trace context; the caller's trace where it sent one) and, where there
was work, `Server-Timing`. A request may say how long it waits with
`X-Request-Timeout-Ms`, and with `Priority: u=4` to `u=7` (RFC 9218) that interactive requests go first. Where the
service has API keys, send one as `Authorization: Bearer` or `X-API-Key`; a key that is limited has `RateLimit` and
`RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-11) on every answer, in points. HEAD is answered wherever GET
is, the same without the body.
"""
_MODELS: tuple[type[BaseModel], ...] = (
    schemas.ClassifyRequest,
    schemas.Options,
    schemas.EmbedRequest,
    schemas.EmbedOptions,
    schemas.LabelSetDocument,
    schemas.ModelDocument,
    answers.Problem,
    answers.Classification,
    answers.Failed,
    answers.EmbedResponse,
    answers.LabelSetList,
    answers.LabelSetSummary,
    answers.LabelSetStored,
    answers.ModelStanding,
    answers.SampleList,
    probe_schemas.ProbeRequest,
    probe_schemas.ProbeFields,
    probe_schemas.ProbeAnswer,
    probe_schemas.ProbeStarted,
    probe_schemas.ProbeStanding,
    answers.Status,
    schemas.OpenAIEmbeddingRequest,
    answers.OpenAIEmbeddingResponse,
    oip_schemas.InferRequest,
    oip_schemas.InferResponse,
    oip_schemas.ServerMetadata,
    oip_schemas.ModelMetadata,
    oip_schemas.ModelNames,
    oip_schemas.Live,
    oip_schemas.Ready,
    oip_schemas.ModelReady,
    oip_schemas.OipError,
)
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
_BINARY: Json = {"type": "string", "format": "binary"}
_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `ick_ID_SECRET`. The names beside the scheme are the scopes it needs to have.",
    },
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}
_OBJECT: Json = {"type": "object", "additionalProperties": True}
_READS = (400, 404, 413, 415, 422, 424, 429, 500, 503, 504)
_READS_OIP = tuple(status for status in _READS if status != 424)


class _WithoutNull(GenerateJsonSchema):
    """What may be left out is left out here, not sent as null."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", 0) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)


@dataclass(frozen=True)
class _Operation:
    """What FastAPI cannot know of one operation."""

    answer: Json
    problems: Iterable[int] = (500,)
    body: str = ""
    options: type[BaseModel] | None = None
    created: bool = False
    accepted: Json | None = None
    headers: Json = field(default_factory=dict)
    parameters: list[Json] = field(default_factory=list)
    openai: bool = False
    oip: bool = False
    binary: bool = False
    answer_type: str = "application/json"


def document(app: FastAPI) -> Json:
    """Return the app's OpenAPI document, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = _document(app)
    return app.openapi_schema


def _document(app: FastAPI) -> Json:
    spec = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        description=_DESCRIPTION,
        routes=app.routes,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    _, schema = models_json_schema(
        [(model, "validation") for model in _MODELS],
        ref_template="#/components/schemas/{model}",
        schema_generator=_WithoutNull,
    )
    definitions = schema["$defs"]
    definitions["OpenAIError"] = _openai_error()
    statuses = sorted({kind["status"] for kind in problem_types().values()})
    spec["components"] = {
        "schemas": definitions,
        "responses": {f"Problem{status}": _problem_response(status) for status in statuses},
    }
    spec["components"]["securitySchemes"] = _SCHEMES
    operations = _operations()
    for path, methods in spec["paths"].items():
        for method, item in methods.items():
            _complete(item, operations[item["operationId"]], definitions)
            _lock(item, ACCESS[operation_name(method.upper(), path)], operations[item["operationId"]].openai)
    return spec


def _lock(item: Json, scopes: Sequence[str], openai: bool) -> None:
    """Say what a caller needs, where there are API keys; without them ({}) nothing is needed."""
    if not scopes:
        return
    item["security"] = [{}, *({scheme: [scope]} for scheme in _SCHEMES for scope in scopes)]
    for status in (401, 403):
        shape = {"$ref": f"#/components/responses/Problem{status}"}
        item["responses"][str(status)] = _openai_response() if openai else shape


def _complete(item: Json, operation: _Operation, definitions: Json) -> None:
    answer: Json = {"description": "The answer.", "headers": _headers(operation)}
    if operation.answer:
        answer["content"] = {operation.answer_type: {"schema": operation.answer}}
    if operation.binary:
        answer["content"]["application/octet-stream"] = {"schema": _BINARY}
    item["responses"] = {"200": answer}
    if operation.created:
        item["responses"]["201"] = {**answer, "description": "The name is new."}
    if operation.accepted is not None:
        content = {"application/json": {"schema": operation.accepted}}
        item["responses"]["202"] = {**answer, "description": "It goes on by itself.", "content": content}
    if item["operationId"] in ("getLabelSet", "getSample"):
        item["responses"]["304"] = {"description": "Not changed since (If-None-Match)."}
    if item["operationId"] == "deleteModel":
        del item["responses"]["200"]
    if item["operationId"] in ("deleteLabelSet", "cancelProbe"):
        item["responses"] = {"204": {"description": "It is gone."}}
    if item["operationId"] in ("readyz", "oipLive", "oipReady", "oipModelReady", "oipModelVersionReady"):
        item["responses"]["503"] = {**answer, "description": "Not now; the reason is in the body."}
    for status in operation.problems:
        shape = {"$ref": f"#/components/responses/Problem{status}"}
        item["responses"][str(status)] = (
            _openai_response() if operation.openai else _oip_response() if operation.oip else shape
        )
    if operation.body:
        item["requestBody"] = _request_body(operation, definitions)
    if operation.options is not None:
        item["parameters"] = _query_parameters(operation.options, definitions)
    if operation.parameters:
        item.setdefault("parameters", []).extend(copy.deepcopy(operation.parameters))
    for parameter in item.get("parameters", []):
        if parameter["in"] == "path":
            parameter["schema"] = {"type": "string", "minLength": 1}


def _operations() -> dict[str, _Operation]:
    one, failed = _ref("Classification"), _ref("Failed")
    classified = {"anyOf": [one, {"type": "array", "items": {"anyOf": [one, failed]}}]}
    etag = {"ETag": {"description": "The digest, in quotes.", "schema": {"type": "string"}}}
    match = [_header("If-Match", "Only if the set is in this version."), _header("If-None-Match", "`*`: only if new.")]
    cached = {"Cache-Status": {"description": "RFC 9211.", "schema": {"type": "string"}}}
    timeout = [
        _header("X-Request-Timeout-Ms", "Milliseconds that the caller waits.", {"type": "integer", "minimum": 1}),
        _header("Priority", "`u=4` to `u=7`: batch work, which interactive requests overtake.", {"type": "string"}),
    ]
    return {
        "classify": _Operation(
            classified, _READS, "ClassifyRequest", schemas.Options, headers=cached, parameters=timeout
        ),
        "embed": _Operation(
            _ref("EmbedResponse"), _READS, "EmbedRequest", schemas.EmbedOptions, headers=cached, parameters=timeout
        ),
        "listLabelSets": _Operation(_ref("LabelSetList"), (500, 503)),
        "getLabelSet": _Operation(
            _ref("LabelSetStored"), (404, 500, 503), headers=etag, parameters=[_header("If-None-Match", "ETags known.")]
        ),
        "putLabelSet": _Operation(
            _ref("LabelSetSummary"),
            (400, 409, 412, 413, 415, 422, 429, 500, 503),
            "LabelSetDocument",
            created=True,
            headers=etag,
            parameters=match,
        ),
        "deleteLabelSet": _Operation({}, (404, 409, 412, 422, 500, 503), parameters=match),
        "listModels": _Operation(_OBJECT),
        "getModel": _Operation(_OBJECT, (404, 500, 503)),
        "putModel": _Operation(
            _ref("ModelStanding"),
            (400, 403, 409, 413, 415, 422, 429, 500, 503, 504),
            "ModelDocument",
            accepted=_ref("ModelStanding"),
            headers={"Location": {"description": "With 202: where it stands.", "schema": {"type": "string"}}},
        ),
        "promoteModel": _Operation(_ref("ModelStanding"), (404, 500)),
        "deleteCanary": _Operation(_ref("ModelStanding"), (404, 500)),
        "deleteModel": _Operation({}, (404, 409, 500), accepted=_ref("ModelStanding")),
        "openaiEmbeddings": _Operation(
            _ref("OpenAIEmbeddingResponse"), _READS, "OpenAIEmbeddingRequest", parameters=timeout, openai=True
        ),
        "openaiModels": _Operation(_OBJECT, openai=True),
        "openaiModel": _Operation(_OBJECT, (404, 500, 503), openai=True),
        "listSamples": _Operation(_ref("SampleList")),
        "getSample": _Operation(
            {"type": "string", "format": "binary"},
            (404, 500),
            headers=etag,
            parameters=[_header("If-None-Match", "ETags known.")],
            answer_type="image/*",
        ),
        "attackProbe": _Operation(
            {"anyOf": [_ref("ProbeAnswer"), _OBJECT]},
            _READS,
            "ProbeRequest",
            probe_schemas.ProbeFields,
            accepted=_ref("ProbeStarted"),
            parameters=[*timeout, _header("Prefer", "`respond-async`: answer 202 at once.")],
        ),
        "getProbe": _Operation(_ref("ProbeStanding"), (404, 500)),
        "cancelProbe": _Operation({}, (404, 500)),
        "followProbe": _Operation(
            {"type": "string"},
            (404, 500),
            parameters=[_header("Last-Event-ID", "Go on behind this one.")],
            answer_type="text/event-stream",
        ),
        "livez": _Operation(_ref("Status")),
        "readyz": _Operation(_ref("Status")),
        "metrics": _Operation({"type": "string"}, answer_type="text/plain"),
        "getProblem": _Operation(_OBJECT, (404, 500)),
        **_oip_operations(timeout),
    }


def _oip_operations(timeout: list[Json]) -> dict[str, _Operation]:
    header = _header("Inference-Header-Content-Length", "Bytes of the JSON, where binary data follows it.")
    infer = _Operation(
        _ref("InferResponse"), _READS_OIP, "InferRequest", parameters=[*timeout, header], oip=True, binary=True
    )
    model, ready = _ref("ModelMetadata"), _ref("ModelReady")
    return {
        "oipServer": _Operation(_ref("ServerMetadata"), oip=True),
        "oipLive": _Operation(_ref("Live"), oip=True),
        "oipReady": _Operation(_ref("Ready"), oip=True),
        "oipModels": _Operation(_ref("ModelNames"), oip=True),
        "oipModel": _Operation(model, (404, 500, 503), oip=True),
        "oipModelVersion": _Operation(model, (404, 500, 503), oip=True),
        "oipModelReady": _Operation(ready, (404, 500), oip=True),
        "oipModelVersionReady": _Operation(ready, (404, 500), oip=True),
        "oipInfer": infer,
        "oipInferVersion": infer,
    }


def _request_body(operation: _Operation, definitions: Json) -> Json:
    content: Json = {"application/json": {"schema": _ref(operation.body)}}
    if operation.binary:
        content["application/octet-stream"] = {"schema": _BINARY}
    if operation.options is not None:
        content["multipart/form-data"] = {"schema": _form(definitions[operation.options.__name__])}
        for kind in _IMAGE_TYPES:
            content[kind] = {"schema": {"type": "string", "format": "binary"}}
    return {"required": True, "content": content}


def _form(options: Json) -> Json:
    file = {"type": "string", "format": "binary"}
    return {
        "type": "object",
        "properties": {"image": file, "images": {"type": "array", "items": file}, **_flat(options)},
        "additionalProperties": False,
    }


def _flat(options: Json) -> Json:
    """The options as form fields and query parameters have them: texts, and lists of texts."""
    flat = {}
    for name, schema in options["properties"].items():
        description = {"description": schema["description"]} if "description" in schema else {}
        if name in ("labels", "templates"):
            flat[name] = {"type": "array", "items": {"type": "string", "minLength": 1}, **description}
        elif name in ("tree", "defence", "gallery"):
            flat[name] = {"type": "string", **description}
        else:
            flat[name] = {key: value for key, value in schema.items() if key != "title"}
    return flat


def _query_parameters(options: type[BaseModel], definitions: Json) -> list[Json]:
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": "With a bare image only. " + schema.get("description", ""),
            "schema": {key: value for key, value in schema.items() if key != "description"},
        }
        for name, schema in _flat(definitions[options.__name__]).items()
    ]


def _problem_response(status: int) -> Json:
    kinds = [kind for kind in problem_types().values() if kind["status"] == status]
    examples = {
        kind["code"]: {
            "summary": kind["title"],
            "value": {
                "type": f"/problems/{kind['code']}",
                "title": kind["title"],
                "status": status,
                "detail": kind["description"],
                "code": kind["code"],
                "instance": "urn:request:0af7651916cd43dd8448eb211c80319c",
            },
        }
        for kind in kinds
    }
    response: Json = {
        "description": "; ".join(f"`{kind['code']}`" for kind in kinds),
        "content": {PROBLEM_JSON: {"schema": _ref("Problem"), "examples": examples}},
    }
    if status in (429, 503):
        response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    if status in (401, 403):
        response["headers"] = {"WWW-Authenticate": {"description": "RFC 6750.", "schema": {"type": "string"}}}
    return response


def _openai_response() -> Json:
    return {"description": "OpenAI's error object.", "content": {"application/json": {"schema": _ref("OpenAIError")}}}


def _oip_response() -> Json:
    schema = _ref("OipError")
    return {"description": "The protocol's error object.", "content": {"application/json": {"schema": schema}}}


def _openai_error() -> Json:
    fields: Json = {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "string"}}
    fields["param"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    error = {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}


def _headers(operation: _Operation) -> Json:
    request_id = {"description": "Names this request in the log and in problems.", "schema": {"type": "string"}}
    return {"X-Request-Id": request_id, **operation.headers}


def _header(name: str, description: str, schema: Json | None = None) -> Json:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": schema or {"type": "string"},
    }


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
