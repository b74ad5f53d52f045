"""The OpenAPI document says what comes: headers, statuses, and an example of each main answer."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema_rs
import pytest

from service.answer_examples import ACCEPTED, ANSWERS
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import Locked, as_base64, picture, until

EVERYWHERE = {"X-Request-Id", "traceparent", "Server-Timing", "RateLimit", "RateLimit-Policy"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(create_app(Settings()).openapi()))
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["operationId"]: one for methods in document["paths"].values() for one in methods.values()}


def resolved(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in value:
        return value
    found: Any = document
    for part in value["$ref"].removeprefix("#/").split("/"):
        found = found[part]
    return dict(found)


def test_every_answer_says_which_headers_it_has(document: dict[str, Any]) -> None:
    for name, operation in operations(document).items():
        for status, response in operation["responses"].items():
            headers = resolved(document, response)["headers"]
            assert set(headers) >= EVERYWHERE, (name, status)
            for header in headers.values():
                assert resolved(document, header)["schema"]["type"] in ("string", "integer")
            if status in ("429", "503") and "content" in response and name not in ("readyz", "oipLive", "oipReady"):
                assert "Retry-After" in headers or name.endswith("Ready"), (name, status)
    accepted = operations(document)["attackProbe"]["responses"]["202"]["headers"]
    assert {"Location", "Retry-After", "Preference-Applied", "Idempotent-Replayed"} <= set(accepted)


@pytest.mark.parametrize(
    ("name", "status"),
    [("getProbe", 503), ("cancelProbe", 503), ("followProbe", 503), ("putLabelSet", 504)],
)
def test_statuses_of_a_store_that_is_away_or_slow(document: dict[str, Any], name: str, status: int) -> None:
    assert str(status) in operations(document)[name]["responses"]


def test_examples_have_the_form_that_they_stand_for(document: dict[str, Any]) -> None:
    shown = 0
    for name, operation in operations(document).items():
        for status, examples in (("200", ANSWERS), ("201", ANSWERS), ("202", ACCEPTED)):
            content = operation["responses"].get(status, {}).get("content", {}).get("application/json", {})
            assert ("example" in content) == (name in examples and bool(content)), (name, status)
            if "example" in content:
                schema = {**content["schema"], "components": document["components"]}
                jsonschema_rs.validator_for(schema).validate(content["example"])
                shown += 1
    assert shown >= len(ANSWERS) + len(ACCEPTED)
    main = {"classify", "embed", "attackProbe", "listProbes", "listLabelSets", "getLabelSet", "listModels"}
    assert main | {"openaiEmbeddings"} <= set(ANSWERS)


def test_what_is_always_there_may_be_null_and_what_may_be_left_out_is_not(document: dict[str, Any]) -> None:
    def valid(name: str, value: object) -> bool:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        return bool(jsonschema_rs.validator_for(schema).is_valid(value))

    running = {**ANSWERS["getProbe"], "status": "running", "result": None}
    assert valid("ProbeStanding", running)
    assert valid("ProbeAnswer", {**ANSWERS["attackProbe"], "broken_at": None, "label_set": None})
    assert valid("ClassifyRequest", {"image": "AAAA", "labels": ["a"]})
    assert not valid("ClassifyRequest", {"image": "AAAA", "labels": ["a"], "top_k": None})
    parameters = document["components"]["schemas"]["InferParameters"]["properties"]
    assert parameters
    assert not any({"type": "null"} in one.get("anyOf", ()) for one in parameters.values())


def test_what_comes_has_no_header_that_is_not_said(document: dict[str, Any], locked: Locked) -> None:
    """Of a limited key, whose answers have the most of them."""
    plain = {"content-length", "content-type", "date", "server", "x-content-type-options", "cache-control", "vary"}
    plain |= {"connection", "tracestate", "x-accel-buffering", "allow"}
    body = {"image": as_base64(picture(70)), "labels": ["a", "b"]}
    with locked.client("modest") as client:

        def check(name: str, answer: httpx.Response) -> None:
            response = operations(document)[name]["responses"][str(answer.status_code)]
            said = {header.lower() for header in resolved(document, response)["headers"]}
            said |= {"x-ironclip-encoder"}
            assert set(answer.headers) - plain <= said, name
            assert "ratelimit" in answer.headers, name

        check("classify", client.post("/classify", json=body))
        check("classify", client.post("/classify", json={}))
        check("embed", client.post("/embed", json={"texts": ["a"]}))
        check("openaiEmbeddings", client.post("/v1/embeddings", json={"input": ["a"]}))
        check("openaiEmbeddings", client.post("/v1/embeddings", json={"input": []}))
        check("listLabelSets", client.get("/label-sets"))
        check("getProbe", client.get("/probes/nowhere"))
        probe = {**body, "eps": [1], "gradients": 1, "effort": "quick", "attack": "fgsm"}
        answer = client.post("/attack-probe", json=probe, headers={"prefer": "respond-async"})
        assert answer.status_code == 202, answer.text
        check("attackProbe", answer)
        where = answer.headers["location"]
        until(lambda: client.get(where).json()["status"] in ("done", "failed"))
        check("getProbe", client.get(where))
        check("listProbes", client.get("/probes"))
        check("listProbes", client.get("/probes?limit=0"))
        check("cancelProbe", client.delete(where))
