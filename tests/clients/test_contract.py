"""The client does not fall behind the service: every field of its OpenAPI document is there, and every error's code."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from ironclip_client import (
    AsyncClient,
    AsyncLabelSets,
    Client,
    Conflict,
    DeadlineExceeded,
    ImageError,
    InvalidRequest,
    IronclipError,
    LabelError,
    LabelSets,
    NotFound,
    NotReady,
    Overloaded,
    ServerError,
    TooLarge,
    Unavailable,
    probes,
    results,
)
from ironclip_client.errors import Fault, Problem, error_kind

from service.errors import problem_types

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text(encoding="utf-8"))
SCHEMAS = DOCUMENT["components"]["schemas"]
# Operations that a client has no use for: OpenAI's client and metrics' collectors ask for theirs.
ELSEWHERE = ("/v1/", "/v2", "/metrics", "/livez", "/samples", "/problems/")
METHODS = {
    "classify": "classify",
    "embed": "embed",
    "attackProbe": "probe",
    "listProbes": "probes",
    "getProbe": "probe_get",
    "cancelProbe": "probe_cancel",
    "followProbe": "probe_follow",
    "listModels": "models",
    "getModel": "model",
    "putModel": "model_load",
    "promoteModel": "model_promote",
    "deleteCanary": "model_end_canary",
    "deleteModel": "model_unload",
    "readyz": "ready",
    "listLabelSets": "label_sets.list",
    "getLabelSet": "label_sets.get",
    "putLabelSet": "label_sets.put",
    "deleteLabelSet": "label_sets.delete",
}


def parameters(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters) - {"self", "options"}


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_") and callable(value)}


def test_every_operation_has_its_method() -> None:
    operations = {
        operation["operationId"]
        for path, methods in DOCUMENT["paths"].items()
        for operation in methods.values()
        if not path.startswith(ELSEWHERE)
    }
    assert operations == set(METHODS)
    for name in METHODS.values():
        holder, _, method = f"Client.{name}".rpartition(".")
        kind = LabelSets if holder.endswith("label_sets") else Client
        assert method in public(kind), name


@pytest.mark.parametrize(
    ("schema", "method", "other"),
    [
        ("ClassifyRequest", Client.classify, set()),
        ("EmbedRequest", Client.embed, set()),
        # Whether it runs at all is the choice of a method, not an option.
        ("ProbeRequest", Client.probe, {"dry_run"}),
        ("LabelSetDocument", LabelSets.put, set()),
        ("ModelDocument", Client.model_load, set()),
    ],
)
def test_every_field_of_a_request_can_be_given(schema: str, method: Any, other: set[str]) -> None:
    assert set(SCHEMAS[schema]["properties"]) - other <= parameters(method)
    assert other <= set(SCHEMAS[schema]["properties"])


def test_nothing_is_offered_that_the_service_does_not_take() -> None:
    own = {"timeout", "request_id", "wait", "images"}
    for schema, method in (("ClassifyRequest", Client.classify), ("ProbeRequest", Client.probe)):
        assert parameters(method) - set(SCHEMAS[schema]["properties"]) <= own


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ("Classification", results.Classification),
        ("Prediction", results.Prediction),
        ("EncoderRef", results.EncoderRef),
        ("LabelSetRef", results.LabelSetRef),
        ("PreprocessingRef", results.Preprocessing),
        ("DomainRef", results.Domain),
        ("LabelSetSummary", results.LabelSetSummary),
        ("LabelSetStored", results.LabelSet),
        ("ModelVersion", results.ModelVersion),
        ("ModelStanding", results.ModelVersions),
        ("ProbeAnswer", probes.ProbeResult),
        ("ProbePoint", probes.ProbePoint),
        ("ProbeClean", probes.ProbeClean),
        ("ProbeStanding", probes.ProbeStanding),
        ("ProbeSummary", probes.ProbeSummary),
        ("ProbeList", probes.ProbeList),
        ("Fault", Fault),
    ],
)
def test_every_field_of_an_answer_can_be_read(schema: str, kind: type) -> None:
    fields = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    assert set(SCHEMAS[schema]["properties"]) <= fields
    optional = set(SCHEMAS[schema]["properties"]) - set(SCHEMAS[schema].get("required", []))
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    needed = {one.name for one in dataclasses.fields(kind) if (one.default, one.default_factory) == missing}  # type: ignore[arg-type]
    assert not optional & needed, "an answer may lack them"


def test_every_part_of_a_problem_is_told() -> None:
    example = {
        "type": "/problems/x",
        "title": "t",
        "status": 422,
        "detail": "d",
        "code": "x",
        "instance": "urn:request:abc",
        "errors": [{"pointer": "/a", "code": "y", "detail": "z"}],
        "limit": 3.5,
        "limit_name": "queue-ms",
        "retry_after_ms": 1500,
    }
    assert set(example) == set(SCHEMAS["Problem"]["properties"])
    found = Problem.parse(example)
    assert found == Problem("x", "t", "d", 422, (Fault("/a", "y", "z"),), 3.5, "queue-ms", 1.5, "abc")
    assert found.raw == example


def test_every_code_of_the_service_has_its_class() -> None:
    """By the nearest that a caller would tell apart; a code that is newer goes by its status."""
    kinds = {code: error_kind(code, entry["status"]) for code, entry in problem_types().items()}
    assert IronclipError not in kinds.values()
    expected: dict[str, type[IronclipError]] = {
        "image-invalid": ImageError,
        "image-unsupported": ImageError,
        "image-too-large": ImageError,
        "labels-invalid": LabelError,
        "labels-too-many": LabelError,
        "tree-invalid": LabelError,
        "input-too-large": TooLarge,
        "option-invalid": InvalidRequest,
        "request-invalid": InvalidRequest,
        "body-malformed": InvalidRequest,
        "encoder-not-found": NotFound,
        "label-set-not-found": NotFound,
        "probe-not-found": NotFound,
        "precondition-failed": Conflict,
        "label-set-read-only": Conflict,
        "too-many-label-sets": Conflict,
        "encoder-busy": Conflict,
        "encoder-in-use": Conflict,
        "overloaded": Overloaded,
        "not-ready": NotReady,
        "unavailable": Unavailable,
        "deadline-exceeded": DeadlineExceeded,
        "internal-error": ServerError,
    }
    assert {code: kinds[code] for code in expected} == expected


@pytest.mark.parametrize(("kind", "other"), [(Client, AsyncClient), (LabelSets, AsyncLabelSets)])
def test_both_clients_have_the_same_methods(kind: type, other: type) -> None:
    names = {"aclose": "close"}
    theirs = {names.get(name, name): method for name, method in public(other).items()}
    assert public(kind).keys() == theirs.keys()
    for name, method in public(kind).items():
        assert inspect.signature(method).parameters == inspect.signature(theirs[name]).parameters, name


def test_signatures_name_every_option() -> None:
    shown = inspect.signature(Client.probe)
    assert {"labels", "max_eps", "timeout", "request_id"} <= set(shown.parameters)
    assert not [one for one in shown.parameters.values() if one.kind is one.VAR_KEYWORD]
