"""Options made to mislead, to fault or to hold up the service: each is answered right, and in time, or refused."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from service import answers, plans
from service.app import create_app
from service.core import Service
from service.errors import RequestInvalid
from service.label_sets import Registered, parse_document
from service.routes import classify
from service.schemas import Options
from service.settings import Settings
from tests.service.conftest import as_base64, picture

LABELS = ["carrot", "rocket"]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def app(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The service in this process, for looking at what it keeps."""
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=tmp_path_factory.mktemp("hostile"),
        max_labels=40_000,
    )
    with TestClient(create_app(settings)) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield client


def service_in(app: TestClient) -> Service:
    service: Service = app.app.state.service  # type: ignore[attr-defined]
    return service


def problem_of(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text[:500]
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    return body


@pytest.mark.parametrize("set_first", [True, False])
def test_labels_that_read_like_a_registered_set_are_not_taken_for_it(app: TestClient, set_first: bool) -> None:
    service, name = service_in(app), f"twin-{set_first}".lower()
    digest = app.put(f"/label-sets/{name}", json={"labels": LABELS}).json()["digest"]
    asks = [(Options(label_set=name), LABELS), (Options(labels=[name, digest]), [name, digest])]
    for options, wanted in asks if set_first else asks[::-1]:
        assert app.portal is not None
        assert list(app.portal.call(partial(service.plan, options, tenant="")).label_set.names) == wanted


NESTED = '{"a":' * 400 + "1" + "}" * 400


@pytest.mark.parametrize(
    "option",
    [{"tree": '{"parents":{"cat":"\\ud800"}}'}, {"defence": '{"name":"none","x":"\\udfff"}'}, {"tree": NESTED}],
    ids=["tree", "defence", "nested"],
)
def test_json_in_a_field_that_no_json_may_hold(client: httpx.Client, option: dict[str, str]) -> None:
    form = client.post("/classify", files={"image": picture(1)}, data={"labels": LABELS, **option})
    problem_of(form, 422, "request-invalid")
    raw = client.post(
        "/classify", params={"labels": LABELS, **option}, content=picture(1), headers={"content-type": "image/png"}
    )
    problem_of(raw, 422, "request-invalid")


@pytest.mark.parametrize(("charset", "status"), [("unicode_escape", 400), ("utf-7", 400), ("UTF-8", 200)])
def test_a_form_is_utf_8(client: httpx.Client, charset: str, status: int) -> None:
    parts = [("labels", b"cat\\ud800"), ("labels", b"dog")]
    body = b"".join(
        b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n.encode(), v) for n, v in parts
    )
    body += b'--b\r\ncontent-disposition: form-data; name="image"; filename="x"\r\n\r\n%s\r\n--b--\r\n' % picture(1)
    kind = f"multipart/form-data; boundary=b; charset={charset}"
    response = client.post("/classify", content=body, headers={"content-type": kind})
    assert response.status_code == status, response.text


def test_options_that_cannot_be_written_as_json_are_the_callers_fault(app: TestClient) -> None:
    service = service_in(app)
    with pytest.raises(RequestInvalid):
        plans.plan_key(service.encoder("tiny"), Options(labels=["a\ud800"]), None)


def test_a_body_of_very_many_values_is_refused_before_it_is_parsed(client: httpx.Client) -> None:
    image = as_base64(picture(1))
    many = b"{}," * 6_000_000 + b"{}"
    bodies = [
        ("/classify", b'{"image":"%s","labels":[%s]}' % (image.encode(), many)),
        ("/embed", b'{"texts":[%s]}' % many),
        ("/v1/embeddings", b'{"input":[%s]}' % many),
        ("/classify", b"{" + b",".join(b'"%d":1' % i for i in range(600_000)) + b"}"),
    ]
    for path, body in bodies:
        start = time.perf_counter()
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == 413, response.text
        assert "500000" in response.text
        assert time.perf_counter() - start < 4
    problem_of(client.put("/label-sets/many", content=b'{"labels":[%s]}' % many, headers=JSON), 413, "input-too-large")
    form = client.post(
        "/classify", files={"image": picture(1)}, data={"labels": LABELS, "tree": '{"a":[' + "0," * 600_000 + "0]}"}
    )
    problem_of(form, 413, "input-too-large")


def test_a_list_beyond_every_setting_is_refused(client: httpx.Client) -> None:
    body = problem_of(client.post("/embed", json={"texts": ["x"] * 70_000}), 422, "request-invalid")
    assert body["errors"][0]["pointer"] == "/texts"
    problem_of(client.post("/embed", json={"images": [""] * 5000}), 422, "request-invalid")


def test_very_many_unknown_fields_are_counted_not_listed(client: httpx.Client) -> None:
    body = problem_of(client.post("/classify", json={str(i): 1 for i in range(50_000)}), 422, "request-invalid")
    assert "errors" not in body
    assert "50001" in body["detail"] or "50000" in body["detail"]


def test_a_long_key_is_not_sent_back(client: httpx.Client) -> None:
    key = "k~/" * 70_000
    response = client.post("/classify", json={"image": as_base64(picture(1)), "labels": LABELS, key: 1})
    body = problem_of(response, 422, "request-invalid")
    assert len(response.content) < 2000
    assert body["errors"][0]["pointer"].startswith("/k~0~1k")


def test_a_bad_picture_is_told_before_the_labels_are_worked_on(
    app: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("planned for a picture that cannot be used")

    monkeypatch.setattr(service_in(app)._plans, "get", never)
    problem_of(app.post("/classify", json={"image": "####", "labels": LABELS}), 422, "image-invalid")


def test_texts_go_with_a_form_too(client: httpx.Client) -> None:
    image = picture(2)
    sent = client.post("/embed", json={"images": [as_base64(image)], "texts": ["a cat", "a dog"]}).json()
    form = client.post("/embed", files={"images": image}, data={"texts": ["a cat", "a dog"]}).json()
    assert form == sent
    raw = client.post(
        "/embed", params={"texts": ["a cat", "a dog"]}, content=image, headers={"content-type": "image/png"}
    ).json()
    assert raw["texts"] == sent["texts"]


def tree_over(count: int, nodes: int, levels: int) -> dict[str, dict[str, str]]:
    """`count` labels under a chain of levels, each with `nodes` nodes at most."""
    parents = {f"label {i}": f"1/{i % nodes}" for i in range(count)}
    for level in range(1, levels):
        parents |= {f"{level}/{i}": f"{level + 1}/{i}" for i in range(nodes)}
    return {"parents": parents}


def test_the_answers_size_is_bounded_with_its_levels(app: TestClient) -> None:
    labels = [f"label {i}" for i in range(200)]
    images = [as_base64(picture(i)) for i in range(45)]
    trees = {f"t{i}": tree_over(200, 100, 3) for i in range(16)}
    asked = {"images": images, "labels": labels, "top_k": 200}
    body = problem_of(app.post("/classify", json={**asked, "tree": trees}), 422, "option-invalid")
    assert body["errors"][0]["pointer"] == "/top_k"
    fewer = app.post("/classify", json={**asked, "tree": trees, "top_k": 2})
    assert fewer.status_code == 200
    assert len(fewer.json()[0]["levels"]) == 48
    assert app.post("/classify", json=asked).status_code == 200


def test_trees_times_levels_are_bounded(app: TestClient) -> None:
    trees = {f"t{i}": tree_over(3, 3, 5) for i in range(16)}
    labels = [f"label {i}" for i in range(3)]
    body = problem_of(
        app.post("/classify", json={"image": as_base64(picture(1)), "labels": labels, "tree": trees}),
        422,
        "tree-invalid",
    )
    assert body["limit"] == 64


def test_one_picture_may_have_all_its_predictions(client: httpx.Client) -> None:
    answer = client.post("/classify", json={"image": as_base64(picture(1)), "label_set": "emoji", "top_k": 1_000_000})
    assert answer.status_code == 200, answer.text
    rows = answer.json()["predictions"]
    assert len(rows) > 1800
    assert rows == sorted(rows, key=lambda row: -row["score"])
    three = [as_base64(picture(i)) for i in range(3)]
    several = client.post("/classify", json={"images": three, "label_set": "emoji", "top_k": 1_000_000}).json()
    assert several[1]["predictions"] == rows


def test_a_registered_set_with_the_callers_templates_costs_what_it_holds(app: TestClient) -> None:
    labels = [f"label {i}" for i in range(1000)]
    app.put("/label-sets/costly", json={"labels": labels, "tree": tree_over(1000, 100, 2)}).raise_for_status()
    while service_in(app)._warming:
        time.sleep(0.05)
    kept = service_in(app)._plans
    before = kept.bytes_kept
    asked = {"image": as_base64(picture(1)), "label_set": "costly", "templates": ["the {}"], "top_k": 1}
    app.post("/classify", json=asked).raise_for_status()
    templated = kept.bytes_kept - before
    assert templated > 1000 * 300
    app.post("/classify", json={**asked, "templates": ["that {}"], "levels": "rollup"}).raise_for_status()
    assert kept.bytes_kept - before - templated > templated + 1000 * 300  # the tree's edges
    body = problem_of(app.post("/classify", json={**asked, "templates": ["no place"]}), 422, "labels-invalid")
    assert body["errors"][0]["pointer"] == "/templates/0"


def where_planned(app: TestClient, monkeypatch: pytest.MonkeyPatch, entry: Registered | None, size: int) -> bool:
    """Whether a plan was made on the event loop."""
    service, threads = service_in(app), []
    make = plans.parse_defence

    def parse_defence(value: Any) -> Any:
        threads.append(threading.get_ident())
        return make(value)

    monkeypatch.setattr(plans, "parse_defence", parse_defence)
    options = Options(label_set="x", defence="none") if entry is not None else Options(labels=LABELS, defence="none")
    plan = asyncio.run(plans.Plans(service.label_limits, 16).get(service.encoder("tiny"), options, entry, size))
    assert "key" in vars(plan)  # its digests too were not left for the loop
    return threads == [threading.get_ident()]


def test_what_is_large_is_not_planned_on_the_event_loop(app: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    small = parse_document("x", {"labels": ["label 0"], "tree": tree_over(1, 1, 1)})
    wide = parse_document("x", {"labels": ["label 0"], "tree": tree_over(3000, 10, 1)})
    assert where_planned(app, monkeypatch, small, 0)
    assert not where_planned(app, monkeypatch, wide, 0)
    assert where_planned(app, monkeypatch, None, 1000)
    assert not where_planned(app, monkeypatch, None, 1_000_000)


def test_a_sets_json_is_made_off_the_event_loop(app: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    document = Registered.document

    def noted(self: Registered) -> dict[str, Any]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            threads.add(threading.get_ident())
        else:
            raise AssertionError("on the event loop")
        return document(self)

    monkeypatch.setattr(Registered, "document", noted)
    app.put("/label-sets/dumped", json={"labels": LABELS}).raise_for_status()
    assert json.loads(app.get("/label-sets/dumped").content)["labels"] == LABELS
    assert threads


def test_levels_count_in_what_is_decided_and_written_off_the_event_loop(
    app: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_loop = []

    def watch(module: ModuleType, name: str) -> None:
        work = getattr(module, name)

        def watched(*args: Any) -> Any:
            on_loop.append(asyncio._get_running_loop() is not None)
            return work(*args)

        monkeypatch.setattr(module, name, watched)

    watch(answers, "_judge")
    watch(classify, "render")
    monkeypatch.setattr(answers, "_THREAD_SCORES", 60)
    monkeypatch.setattr(classify, "_THREAD_PREDICTIONS", 60)
    asked = {"image": as_base64(picture(3)), "labels": [f"label {i}" for i in range(50)]}
    for tree, expected in (({}, True), ({"tree": tree_over(50, 40, 3)}, False)):
        on_loop.clear()
        assert app.post("/classify", json={**asked, **tree}).status_code == 200
        assert on_loop == [expected, expected]
