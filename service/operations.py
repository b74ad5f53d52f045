"""What FastAPI cannot know of each operation: bodies, answers and problems; the table that `service.openapi` reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from service import probe_schemas, schemas
from service.vector_forms import BYTES, NPY

Json = dict[str, Any]


def ref(name: str) -> Json:
    """Point to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _header(name: str, description: str, schema: Json | None = None) -> Json:
    return {
        "name": name,
        "in": "header",
        "required": False,
        "description": description,
        "schema": schema or {"type": "string"},
    }


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        answer: schema of its answer; empty where it has none.
        problems: statuses that are errors.
        gives: statuses that are not; `GIVEN` says what each means.
        body: schema of a JSON body.
        options: what a bare picture's query and a form have beside the picture.
        accepted: schema of a 202.
        headers: of the answer.
        accepted_headers: of a 202, besides.
        parameters: of the request.
        openai, oip: whether it speaks OpenAI's API, or the Open Inference Protocol.
        binary: whether body and answer may have binary data behind the JSON.
        answer_type: media type of the answer.
        forms: binary media types that the answer may have besides, by `Accept`.
    """

    answer: Json
    problems: Iterable[int] = (500,)
    body: str = ""
    options: type[BaseModel] | None = None
    gives: tuple[int, ...] = (200,)
    accepted: Json | None = None
    headers: Json = field(default_factory=dict)
    accepted_headers: Json = field(default_factory=dict)
    parameters: list[Json] = field(default_factory=list)
    openai: bool = False
    oip: bool = False
    binary: bool = False
    answer_type: str = "application/json"
    forms: tuple[str, ...] = ()


GIVEN = {
    200: "The answer.",
    201: "The name is new.",
    202: "It goes on by itself.",
    204: "It is gone, or there is no more to tell.",
    304: "Not changed since (If-None-Match).",
    503: "Not now; the reason is in the body.",
}

_TEXT: Json = {"type": "string"}
_WHOLE: Json = {"type": "integer", "minimum": 1}
_KEY: Json = {"type": "string", "minLength": 1, "maxLength": 257}
_OBJECT: Json = {"type": "object", "additionalProperties": True}
_READS = (400, 404, 413, 415, 422, 424, 429, 500, 503, 504)
_READS_OIP = tuple(status for status in _READS if status != 424)
_ONE = ref("Classification")
_CLASSIFIED = {"anyOf": [_ONE, {"type": "array", "items": {"anyOf": [_ONE, ref("Failed")]}}]}
_ETAG = {"ETag": {"description": "The digest, in quotes.", "schema": {"type": "string"}}}
_CACHED = {
    "Cache-Status": {"description": "RFC 9211.", "schema": {"type": "string"}},
    "X-Ironclip-Encoder": {"description": "The encoder that answered, `name@digest`.", "schema": {"type": "string"}},
}
_AGAIN = {"Retry-After": {"description": "Seconds until it is worth asking how it stands.", "schema": _WHOLE}}
_UNTIL_ENDED = {"Retry-After": {"description": "While it has not ended: seconds.", "schema": _WHOLE}}
_WHERE = {"Location": {"description": "With 202: where it stands.", "schema": {"type": "string"}}}
_KNOWN = _header("If-None-Match", "ETags known.")
_MATCH = [_header("If-Match", "Only if the set is in this version."), _header("If-None-Match", "`*`: only if new.")]
_TIMEOUT = [
    _header("X-Request-Timeout-Ms", "Milliseconds that the caller waits.", {"type": "integer", "minimum": 1}),
    _header("Priority", "`u=4` to `u=7`: batch work, which interactive requests overtake.", {"type": "string"}),
]
_INFER = Operation(
    ref("InferResponse"),
    _READS_OIP,
    "InferRequest",
    parameters=[
        *_TIMEOUT,
        _header("Inference-Header-Content-Length", "Bytes of the JSON, where binary data follows it."),
    ],
    oip=True,
    binary=True,
)
_OIP_MODEL = Operation(ref("ModelMetadata"), (404, 500, 503), oip=True)
_OIP_MODEL_READY = Operation(ref("ModelReady"), (404, 500), gives=(200, 503), oip=True)

OPERATIONS: dict[str, Operation] = {
    "classify": Operation(
        _CLASSIFIED, _READS, "ClassifyRequest", schemas.Options, headers=_CACHED, parameters=_TIMEOUT
    ),
    "embed": Operation(
        ref("EmbedResponse"),
        (406, *_READS),
        "EmbedRequest",
        schemas.EmbedOptions,
        headers=_CACHED,
        parameters=_TIMEOUT,
        forms=(NPY, BYTES),
    ),
    "listLabelSets": Operation(ref("LabelSetList"), (422, 500, 503)),
    "getLabelSet": Operation(
        ref("LabelSetStored"), (404, 500, 503), gives=(200, 304), headers=_ETAG, parameters=[_KNOWN]
    ),
    "putLabelSet": Operation(
        ref("LabelSetSummary"),
        (400, 409, 412, 413, 415, 422, 429, 500, 503, 504),
        "LabelSetDocument",
        gives=(200, 201),
        headers=_ETAG,
        parameters=_MATCH,
    ),
    "deleteLabelSet": Operation({}, (404, 409, 412, 422, 500, 503), gives=(204,), parameters=_MATCH),
    "listModels": Operation(_OBJECT),
    "getModel": Operation(_OBJECT, (404, 500, 503)),
    "putModel": Operation(
        ref("ModelStanding"),
        (400, 403, 409, 413, 415, 422, 429, 500, 503, 504),
        "ModelDocument",
        gives=(200, 202),
        accepted=ref("ModelStanding"),
        headers=_WHERE,
        accepted_headers=_AGAIN,
    ),
    "promoteModel": Operation(ref("ModelStanding"), (404, 500)),
    "deleteCanary": Operation(ref("ModelStanding"), (404, 500)),
    "deleteModel": Operation({}, (404, 409, 500), gives=(202,), accepted=ref("ModelStanding")),
    "openaiEmbeddings": Operation(
        ref("OpenAIEmbeddingResponse"), _READS, "OpenAIEmbeddingRequest", parameters=_TIMEOUT, openai=True
    ),
    "openaiModels": Operation(_OBJECT, openai=True),
    "openaiModel": Operation(_OBJECT, (404, 500, 503), openai=True),
    "listSamples": Operation(ref("SampleList")),
    "getSample": Operation(
        {"type": "string", "format": "binary"},
        (404, 500),
        gives=(200, 304),
        headers=_ETAG,
        parameters=[_KNOWN],
        answer_type="image/*",
    ),
    "attackProbe": Operation(
        {"anyOf": [ref("ProbeAnswer"), _OBJECT]},
        (*_READS, 409),
        "ProbeRequest",
        probe_schemas.ProbeFields,
        gives=(200, 202),
        accepted=ref("ProbeStarted"),
        headers={"Idempotent-Replayed": {"description": "With 202: `true` of a repetition.", "schema": _TEXT}},
        accepted_headers={
            **_WHERE,
            **_AGAIN,
            "Preference-Applied": {"description": "`respond-async` (RFC 7240).", "schema": _TEXT},
        },
        parameters=[
            *_TIMEOUT,
            _header("Prefer", "`respond-async`: answer 202 at once."),
            _header(
                "Idempotency-Key",
                "With `respond-async`: for a day a repetition is answered with the first's probe.",
                _KEY,
            ),
        ],
    ),
    "listProbes": Operation(ref("ProbeList"), (422, 500)),
    "getProbe": Operation(ref("ProbeStanding"), (404, 500, 503), headers=_UNTIL_ENDED),
    "cancelProbe": Operation({}, (404, 500, 503), gives=(204,)),
    "followProbe": Operation(
        {"type": "string"},
        (404, 500, 503),
        gives=(200, 204),
        parameters=[_header("Last-Event-ID", "Go on behind this one.")],
        answer_type="text/event-stream",
    ),
    "livez": Operation(ref("Status")),
    "readyz": Operation(ref("Status"), gives=(200, 503)),
    "metrics": Operation({"type": "string"}, answer_type="text/plain"),
    "getProblem": Operation(_OBJECT, (404, 500)),
    "oipServer": Operation(ref("ServerMetadata"), oip=True),
    "oipLive": Operation(ref("Live"), gives=(200, 503), oip=True),
    "oipReady": Operation(ref("Ready"), gives=(200, 503), oip=True),
    "oipModels": Operation(ref("ModelNames"), oip=True),
    "oipModel": _OIP_MODEL,
    "oipModelVersion": _OIP_MODEL,
    "oipModelReady": _OIP_MODEL_READY,
    "oipModelVersionReady": _OIP_MODEL_READY,
    "oipInfer": _INFER,
    "oipInferVersion": _INFER,
}
