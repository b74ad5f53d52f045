"""The OpenAPI 3.1 document: what the routes read from raw bytes, said to people and to generators of clients.

FastAPI contributes paths, summaries and path parameters; bodies, answers and problems are put in here
(`service.operations`), because the routes parse bodies themselves.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
from service.answer_examples import ACCEPTED, ANSWERS
from service.errors import problem_types
from service.operations import GIVEN, OPERATIONS, Json, Operation, ref
from service.problems import PROBLEM_JSON

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
    probe_schemas.ProbeList,
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
# Of every answer, whatever its status.
_HEADERS: Json = {
    "X-Request-Id": {"description": "Names this request in the log and in problems."},
    "traceparent": {"description": "W3C trace context of this request."},
    "Server-Timing": {"description": "Milliseconds of each stage, where there was work."},
    "RateLimit": {"description": 'Of a limited API key: points left, and seconds until all are, `"points";r=;t=`.'},
    "RateLimit-Policy": {"description": 'Of a limited API key: points at most, and seconds, `"points";q=;w=`.'},
}
_RETRY_AFTER: Json = {"description": "Seconds.", "schema": {"type": "integer"}}
_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `ick_ID_SECRET`. The names beside the scheme are the scopes it needs to have.",
    },
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key."},
}


class _WithoutNull(GenerateJsonSchema):
    """What may be left out is left out here, not sent as null; what is always there may be null."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        if schema.get("default", 0) is not None:
            return super().default_schema(schema)
        inner: Any = schema["schema"]
        while inner["type"].startswith("function-"):  # validators, which take nothing from the form
            inner = inner["schema"]
        return self.generate_inner(inner["schema"] if inner["type"] == "nullable" else schema["schema"])


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
        "headers": {name: {**about, "schema": {"type": "string"}} for name, about in _HEADERS.items()},
    }
    spec["components"]["securitySchemes"] = _SCHEMES
    for path, methods in spec["paths"].items():
        for method, item in methods.items():
            _complete(item, OPERATIONS[item["operationId"]], definitions)
            _lock(item, ACCESS[operation_name(method.upper(), path)], OPERATIONS[item["operationId"]].openai)
    return spec


def _lock(item: Json, scopes: Sequence[str], openai: bool) -> None:
    """Say what a caller needs, where there are API keys; without them ({}) nothing is needed."""
    if not scopes:
        return
    item["security"] = [{}, *({scheme: [scope]} for scheme in _SCHEMES for scope in scopes)]
    for status in (401, 403):
        shape = {"$ref": f"#/components/responses/Problem{status}"}
        item["responses"][str(status)] = _openai_response(status) if openai else shape


def _complete(item: Json, operation: Operation, definitions: Json) -> None:
    name = item["operationId"]
    item["responses"] = {str(status): _given(name, operation, status) for status in operation.gives}
    for status in operation.problems:
        shape = {"$ref": f"#/components/responses/Problem{status}"}
        item["responses"][str(status)] = (
            _openai_response(status) if operation.openai else _oip_response(status) if operation.oip else shape
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


def _given(name: str, operation: Operation, status: int) -> Json:
    """One answer that is no problem."""
    given: Json = {"description": GIVEN[status], "headers": {**_everywhere(), **operation.headers}}
    if status in (204, 304):
        return given
    if status == 202:
        given["headers"] |= operation.accepted_headers
        given["content"] = {"application/json": {"schema": operation.accepted, **_example(ACCEPTED, name)}}
    else:
        given["content"] = {operation.answer_type: {"schema": operation.answer, **_example(ANSWERS, name)}}
        for form in (*operation.forms, *(["application/octet-stream"] if operation.binary else [])):
            given["content"][form] = {"schema": _BINARY}
    return given


def _everywhere() -> Json:
    """The headers of every answer."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS}


def _example(of: Json, name: str) -> Json:
    return {"example": of[name]} if name in of else {}


def _request_body(operation: Operation, definitions: Json) -> Json:
    content: Json = {"application/json": {"schema": ref(operation.body)}}
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
    return {
        "description": "; ".join(f"`{kind['code']}`" for kind in kinds),
        "headers": _problem_headers(status),
        "content": {PROBLEM_JSON: {"schema": ref("Problem"), "examples": examples}},
    }


def _problem_headers(status: int) -> Json:
    headers = _everywhere()
    if status in (409, 429, 503):
        headers["Retry-After"] = _RETRY_AFTER
    if status in (401, 403):
        headers["WWW-Authenticate"] = {"description": "RFC 6750.", "schema": {"type": "string"}}
    return headers


def _openai_response(status: int) -> Json:
    content = {"application/json": {"schema": ref("OpenAIError")}}
    return {"description": "OpenAI's error object.", "headers": _problem_headers(status), "content": content}


def _oip_response(status: int) -> Json:
    content = {"application/json": {"schema": ref("OipError")}}
    return {"description": "The protocol's error object.", "headers": _problem_headers(status), "content": content}


def _openai_error() -> Json:
    fields: Json = {"message": {"type": "string"}, "type": {"type": "string"}, "code": {"type": "string"}}
    fields["param"] = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    error = {"type": "object", "properties": fields, "required": sorted(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}
