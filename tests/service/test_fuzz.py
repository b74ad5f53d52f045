"""No client input, however wrong, makes the service fault: schemathesis over every operation, and hostile pictures."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.service.conftest import Locked, ServiceProcess, as_base64, picture

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
LABELS = ["carrot", "rocket"]


DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text(encoding="utf-8"))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
# Whatever stands in a path or a header is a text, and no text is a wrong one: only a body or a query can be.
FALLIBLE = [label for label, operation in OPERATIONS.items() if operation.body or operation.query]
CASES = [(label, GenerationMode.POSITIVE) for label in OPERATIONS]
CASES += [(label, GenerationMode.NEGATIVE) for label in FALLIBLE]


def fuzz(label: str, mode: GenerationMode, url: str, examples: int, headers: dict[str, str] | None = None) -> None:
    """Ask an operation so many times; Hypothesis raises Unsatisfiable where there is nothing to ask."""

    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: schemathesis.Case) -> None:
        # A deadline of a millisecond is a 504 that the caller asked for; test_errors.py has it.
        case.headers.pop("X-Request-Timeout-Ms", None)
        case.call_and_validate(base_url=url, headers=headers, checks=CHECKS, timeout=30)

    ask()


@pytest.mark.parametrize(("label", "mode"), CASES)
def test_every_operation_takes_whatever_comes(tiny_service: ServiceProcess, label: str, mode: GenerationMode) -> None:
    fuzz(label, mode, tiny_service.url, 30)


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label != "GET /metrics"])  # on a port of its own
def test_every_operation_takes_whatever_comes_with_a_key(locked: Locked, label: str) -> None:
    """Tenants, scopes and points are on the way of every request then."""
    headers = {"Authorization": f"Bearer {locked.keys['fuzzing']}"}
    fuzz(label, GenerationMode.POSITIVE, locked.url, 4, headers)


def test_what_nothing_can_be_made_for_does_not_pass_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPERATIONS["GET /livez"], "as_strategy", lambda **_: st.nothing(), raising=False)
    with pytest.raises(Unsatisfiable):
        fuzz("GET /livez", GenerationMode.POSITIVE, "http://127.0.0.1:9", 4)
    assert {"POST /classify", "POST /v2/models/{model}/infer", "GET /label-sets"} <= set(FALLIBLE)


def test_each_malformed_picture_gets_its_problem_and_the_next_request_its_answer(
    client: httpx.Client, malformed_images: dict[str, bytes]
) -> None:
    assert len(malformed_images) >= 40
    asked = {"image": as_base64(picture(1)), "labels": LABELS}
    wanted = client.post("/classify", json=asked).json()
    for name, data in malformed_images.items():
        forms = [
            client.post("/classify", json={**asked, "image": as_base64(data)}),
            client.post("/classify", files={"image": ("x", data, "application/octet-stream")}, data={"labels": LABELS}),
            client.post("/embed", json={"images": [as_base64(data)]}),
        ]
        for response in forms[:2]:
            assert response.status_code in (413, 422), name
            assert response.headers["content-type"] == "application/problem+json", name
            assert response.json()["code"] == name.partition("/")[0], name
        assert forms[2].json()["images"][0]["error"]["code"] == name.partition("/")[0], name
        assert client.post("/classify", json=asked).json() == wanted, name
    assert client.get("/readyz").status_code == 200


def test_odd_but_honest_pictures_are_answered(client: httpx.Client, odd_images: dict[str, bytes]) -> None:
    for name, data in odd_images.items():
        response = client.post("/classify", files={"image": ("x", data)}, data={"labels": LABELS})
        assert response.status_code == 200, (name, response.text)


@given(st.binary(max_size=400), st.sampled_from(["image/png", "application/json", "multipart/form-data; boundary=b"]))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_arbitrary_bytes_are_a_4xx(client: httpx.Client, body: bytes, kind: str) -> None:
    response = client.post("/classify", content=body, headers={"content-type": kind})
    assert 400 <= response.status_code < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.sampled_from(["labels", "templates", "tree", "levels", "defence", "top_k", "encoder", "label_set"]),
        json_values,
        max_size=5,
    )
)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_arbitrary_options_are_an_answer_or_a_4xx(client: httpx.Client, options: dict[str, object]) -> None:
    body = json.dumps({"image": as_base64(picture(1)), "labels": LABELS, **options})
    response = client.post("/classify", content=body, headers={"content-type": "application/json"})
    assert response.status_code < 500, (options, response.text)
    assert response.status_code == 200 or response.headers["content-type"] == "application/problem+json"
