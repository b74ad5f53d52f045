"""Every error has its place in the table, its form on the wire, and a request that provokes it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from pydantic import SecretStr
from starlette.requests import Request
from starlette.testclient import TestClient

import ironclip.errors as lib
from service import telemetry
from service.app import create_app
from service.errors import STATUS, error_classes, problem_types, status_of
from service.problems import error_response, handle_error, problem
from service.settings import Settings
from tests.service.conftest import make_key, until, write_keys

LABELS = ["a", "b"]
# Raised while loading, before there is anybody to answer, or as the process ends; or only ever as one of their
# subclasses; or by a device that has too little memory (test_admission.py).
NEVER_ANSWERED = {
    "ironclip-error",
    "input-invalid",
    "image-error",
    "encoder-load-failed",
    "encoder-unknown",
    "weights-unavailable",
    "checksum-mismatch",
    "architecture-mismatch",
    "artifact-invalid",
    "settings-invalid",
    "worker-lost",
    "out-of-memory",
    "access-denied",
}
# Encoders that come and go need a service of their own: test_models.py and test_supervisor.py ask for these.
OF_MODELS = {
    "encoder-busy",
    "encoder-in-use",
    "encoder-spec-forbidden",
    "encoder-version-lost",
    "golden-mismatch",
}
# test_idempotency.py asks for these.
OF_KEYS = {"idempotency-conflict", "idempotency-key-reused"}
PROVOKED: set[str] = set()


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 80, 200)).save(buffer, "PNG")
    return buffer.getvalue()


GOOD = base64.b64encode(png()).decode()


def test_every_error_class_has_a_status_and_a_code_of_its_own() -> None:
    # The trainer's own errors, if its tests were imported in this run, never reach the service.
    classes = [kind for kind in error_classes() if not kind.__module__.startswith("training")]
    assert set(classes) == set(STATUS)
    codes = [kind.code for kind in classes]
    assert len(codes) == len(set(codes))
    assert all(kind.__doc__ for kind in classes)


def test_a_problem_carries_what_a_client_can_act_on() -> None:
    error = lib.Overloaded("The queue is full.", limit_name="queue-ms", retry_after=1.2, limit=512)
    form = problem(error, "request-1")
    assert form == {
        "type": "/problems/overloaded",
        "title": "The service is overloaded",
        "status": 429,
        "detail": "The queue is full.",
        "code": "overloaded",
        "instance": "urn:request:request-1",
        "limit": 512,
        "limit_name": "queue-ms",
        "retry_after_ms": 1200,
    }
    assert error_response(error, "/classify", None).headers["retry-after"] == "2"
    openai = json.loads(bytes(error_response(error, "/v1/embeddings", None).body))
    assert openai["error"]["type"] == "rate_limit_error"
    oip = error_response(error, "/v2/models/demo/infer", None)
    assert (json.loads(bytes(oip.body)), oip.headers["retry-after"]) == ({"error": "The queue is full."}, "2")
    assert b'"error"' not in error_response(error, "/v2x", None).body


def test_an_unlisted_subclass_has_the_status_of_the_class_above() -> None:
    class Odd(lib.ImageInvalid):
        code = "odd"

    try:
        assert status_of(Odd("x")) == 422
    finally:
        del Odd


@pytest.fixture(scope="module")
def small(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An app with narrow limits, in this process."""
    folder = tmp_path_factory.mktemp("small")
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=folder / "state",
        max_queue=1,
        max_images=1,
        decode_workers=1,
        max_labels=4,
        max_body_bytes=300_000,
        max_image_bytes=100_000,
        max_side=5000,
        cache_bytes=0,
        image_url_hosts=("localhost:1",),  # where nobody listens
        image_url_networks=("127.0.0.0/8", "::1/128"),
    )
    app = create_app(settings)

    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError("the caller's secret")

    with TestClient(app) as client:
        deadline = time.monotonic() + 60
        assert client.post("/classify", json={"image": GOOD, "labels": LABELS}).status_code in (200, 503)
        while client.get("/readyz").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield client


def check(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    PROVOKED.add(code)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["instance"] == f"urn:request:{response.headers['x-request-id']}"
    assert set(body) <= {
        *["type", "title", "status", "detail", "code", "instance", "errors", "limit", "limit_name", "retry_after_ms"]
    }
    return body


def classify(small: TestClient, **change: Any) -> httpx.Response:
    asked = {"image": GOOD, "labels": LABELS, **change}
    return small.post("/classify", json={key: value for key, value in asked.items() if value is not None})


@pytest.mark.parametrize(
    ("change", "status", "code", "pointer"),
    [
        ({"image": "####"}, 422, "image-invalid", "/image"),
        ({"image": base64.b64encode(b"GIF89a" + b"\0" * 40).decode()}, 422, "image-unsupported", "/image"),
        ({"image": f"data:image/jpeg;base64,{GOOD}"}, 415, "image-type-mismatch", "/image"),
        ({"image": f"data:image/avif;base64,{GOOD}"}, 415, "image-type-mismatch", "/image"),
        ({"image": "https://elsewhere.test/a.png"}, 422, "image-url-refused", "/image"),
        ({"image": "https://localhost:1/a.png"}, 424, "image-url-failed", "/image"),
        ({"image": base64.b64encode(png(5001, 1)).decode()}, 413, "image-too-large", "/image"),
        ({"image": "A" * 200_000}, 413, "image-too-large", "/image"),
        ({"labels": ["a", "a"]}, 422, "labels-invalid", "/labels/1"),
        ({"labels": []}, 422, "labels-invalid", "/labels"),
        ({"labels": [""]}, 422, "labels-invalid", "/labels/0"),
        ({"labels": [{"nom": "a"}]}, 422, "labels-invalid", "/labels/0"),
        ({"labels": ["word " * 40, "b"]}, 422, "labels-invalid", None),
        ({"templates": ["no place"]}, 422, "labels-invalid", "/templates/0"),
        ({"labels": list("abcde")}, 422, "labels-too-many", "/labels"),
        ({"tree": {"parents": {"a": "b", "b": "a"}}}, 422, "tree-invalid", None),
        ({"tree": {"parents": {"a": "x"}}}, 422, "tree-invalid", None),
        ({"tree": "a b c d"}, 422, "tree-invalid", None),
        ({"levels": "rollup"}, 422, "option-invalid", "/levels"),
        ({"defence": "armour"}, 422, "option-invalid", "/defence/name"),
        ({"defence": {"name": "none", "n": 3}}, 422, "option-invalid", "/defence"),
        ({"defence": {}}, 422, "option-invalid", "/defence/name"),
        ({"images": [GOOD]}, 422, "request-invalid", ""),
        ({"image": None}, 422, "request-invalid", ""),
        ({"labels": None}, 422, "request-invalid", None),
        ({"label_set": "emoji"}, 422, "request-invalid", None),
        ({"top_k": 0}, 422, "request-invalid", "/top_k"),
        ({"top_k": "3"}, 422, "request-invalid", "/top_k"),
        ({"levels": "sideways"}, 422, "request-invalid", "/levels"),
        ({"lables": ["a"]}, 422, "request-invalid", "/lables"),
        ({"image": None, "images": [GOOD, GOOD]}, 413, "input-too-large", "/images"),
        ({"encoder": "../../etc/passwd"}, 404, "encoder-not-found", None),
        ({"labels": None, "label_set": "nope"}, 404, "label-set-not-found", None),
        ({"labels": None, "label_set": "../x"}, 404, "label-set-not-found", None),
        ({"labels": None, "label_set": "emoji@" + "0" * 64}, 404, "label-set-not-found", None),
    ],
)
def test_what_a_caller_can_get_wrong(
    small: TestClient, change: dict[str, Any], status: int, code: str, pointer: str | None
) -> None:
    body = check(classify(small, **change), status, code)
    if pointer is not None:
        assert body["errors"][0]["pointer"] == pointer
    assert classify(small).status_code == 200


def test_an_unknown_defence_is_answered_with_those_there_are(small: TestClient) -> None:
    assert "there are: none, cola, ttc, clipure" in classify(small, defence="armour").json()["detail"]


def test_a_refusal_does_not_repeat_what_was_sent(small: TestClient) -> None:
    secret = "patient-4711"
    for change in ({"top_k": secret}, {"encoder": secret}, {"label_set": secret, "labels": None}, {"image": secret}):
        assert secret not in classify(small, **change).text


@pytest.mark.parametrize(("path", "shape"), [("/nowhere", "code"), ("/v1/nowhere", "error"), ("/v2/nowhere", "error")])
def test_a_refusal_needs_no_url(path: str, shape: str) -> None:
    """None can be made of a Host or a query that is none; what is refused for other reasons is refused all the same."""
    scope = {"type": "http", "method": "GET", "scheme": "http", "path": path, "state": {}}
    scope |= {"headers": [(b"host", b"[:::")], "query_string": b"a=\xff", "server": ("127.0.0.1", 80)}
    answer = asyncio.run(handle_error(Request(scope), lib.NotFound("There is nothing.")))
    assert answer.status_code == 404
    assert shape in json.loads(bytes(answer.body))


def test_bodies_that_cannot_be_read(small: TestClient) -> None:
    json_type = {"content-type": "application/json"}
    for body in (b"{", b"", b"\xff\xfe", b'{"image": "\\ud800"}', b"[" * 100_000):
        assert small.post("/classify", content=body, headers=json_type).json()["code"] == "body-malformed"
    check(small.post("/classify", content=b"{", headers=json_type), 400, "body-malformed")
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "multipart/form-data; charset=idna; boundary=x",
    ):
        check(small.post("/classify", content=b"--x\r\n\xff", headers={"content-type": kind}), 400, "body-malformed")
    check(
        small.post("/classify", content=b"a=b", headers={"content-type": "text/plain"}), 415, "media-type-unsupported"
    )
    check(small.post("/classify", content=b"x"), 415, "media-type-unsupported")
    check(small.post("/embed", json={"texts": ["a"]}, headers={"accept": "text/html"}), 406, "not-acceptable")
    bare = check(small.post("/classify?labels=a&labels=b", content=b"x"), 415, "media-type-unsupported")
    assert "image/png" in bare["detail"]  # that is what is missing: the query is right
    for declared in ("image/gif", "image/svg+xml", "image/avif"):
        refused = small.post("/classify?labels=a", content=png(), headers={"content-type": declared})
        assert "image/webp" in check(refused, 415, "media-type-unsupported")["detail"]
    packed = {"content-type": "application/json", "content-encoding": "gzip"}
    check(small.post("/classify", content=b"x", headers=packed), 415, "content-encoding-unsupported")
    check(small.post("/classify?top_k=1", json={"image": GOOD, "labels": LABELS}), 422, "request-invalid")
    check(
        small.post("/classify?labels=a&frobnicate=1", content=png(), headers={"content-type": "image/png"}),
        422,
        "request-invalid",
    )


def test_a_picture_of_another_type_than_it_is_said_to_be(small: TestClient) -> None:
    bare = small.post("/classify?labels=a", content=png(), headers={"content-type": "image/jpeg"})
    assert "image/jpeg" in check(bare, 415, "image-type-mismatch")["detail"]
    form = small.post("/classify", files={"image": ("x.jpg", png(), "image/jpeg")}, data={"labels": LABELS})
    check(form, 415, "image-type-mismatch")
    # What is no picture that is read stays one, whatever it is said to be.
    gif = small.post("/classify", files={"image": ("x", b"GIF89a" + bytes(40), "image/gif")}, data={"labels": LABELS})
    check(gif, 422, "image-unsupported")
    # One of several fails alone.
    asked = {"images": [f"data:image/jpeg;base64,{GOOD}"], "labels": LABELS}
    answer = small.post("/classify", json=asked)
    assert (answer.status_code, answer.json()[0]["error"]["status"]) == (200, 415)


def test_whoever_cannot_be_answered_now_is_told_when_to_ask_again() -> None:
    for error in (lib.NotReady("The service is stopping."), lib.OutOfMemory("No memory."), lib.Unavailable("Later.")):
        answer = error_response(error, "/classify", None)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert problem(error)["retry_after_ms"] == 1000
        assert error_response(error, "/v1/embeddings", None).headers["retry-after"] == "1"
    assert problem(lib.NotReady("Later.", retry_after=7))["retry_after_ms"] == 7000
    for known in (lib.DeadlineExceeded("Too late.", limit=5), lib.Overloaded("Full.")):
        assert "retry-after" not in error_response(known, "/classify", None).headers


def test_a_service_that_stops_says_when_to_ask_again(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    app = create_app(settings)
    with TestClient(app) as client:
        until(lambda: client.get("/readyz").status_code == 200, 60)
        app.state.service.drain()
        app.state.service.end_probes()
        answer = client.post("/attack-probe", json={"image": GOOD, "labels": LABELS})
        body = check(answer, 503, "not-ready")
        assert (answer.headers["retry-after"], body["retry_after_ms"]) == ("1", 1000)


def test_forms_that_say_things_twice_or_not_at_all(small: TestClient) -> None:
    image = ("x.png", png(), "image/png")
    for files, data in (
        ([("image", image)], {"labels": LABELS, "encoder": ["tiny", "tiny"]}),
        ([("image", image)], {"labels": LABELS, "tree": "{not json"}),
        ([("labels", image)], {}),
        ([("x", ("", b"", "text/plain"))], {"labels": LABELS}),
    ):
        check(small.post("/classify", files=files, data=data), 422, "request-invalid")


def test_bytes_are_counted_as_they_arrive(small: TestClient) -> None:
    def forever() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    json_type = {"content-type": "application/json"}
    body = check(small.post("/classify", content=b" " * 300_001, headers=json_type), 413, "input-too-large")
    assert body["limit"] == 300_000
    check(small.post("/classify", content=forever(), headers=json_type), 413, "input-too-large")
    check(
        small.post("/classify?labels=a", content=forever(), headers={"content-type": "image/png"}),
        413,
        "input-too-large",
    )
    openai = small.post("/v1/embeddings", content=b" " * 300_001, headers=json_type)
    assert openai.status_code == 413
    assert openai.json()["error"]["code"] == "input-too-large"


def test_bodies_together_are_bounded_too(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, state_dir=tmp_path, max_held_bytes=100_000)
    refused = telemetry.REFUSED.labels("held-bytes")
    with TestClient(create_app(settings)) as client:
        before = refused._value.get()
        for _ in range(3):
            response = client.post("/embed", content=b"x" * 100_001, headers={"content-type": "image/png"})
            check(response, 429, "overloaded")
            assert response.headers["retry-after"] == "1"
        assert refused._value.get() == before + 3
        response = client.post("/embed", content=b"x" * 90_000, headers={"content-type": "image/png"})
        assert response.status_code != 429  # what was refused is not held any longer


@pytest.mark.parametrize(
    ("kind", "query", "whole"),
    [
        ("application/json", b"", False),
        ("image/png", b"labels=a", False),
        ("multipart/form-data; boundary=b", b"", False),
        ("image/png", b"labels=a", True),
    ],
)
def test_a_caller_who_breaks_off_is_counted_once(small: TestClient, kind: str, query: bytes, whole: bool) -> None:
    """While the body is sent, or while the answer is made."""
    body = png(300, 300) if whole else b"--b\r\nContent-Dispo"
    coming = [{"type": "http.request", "body": body, "more_body": not whole}]
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return coming.pop() if coming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    dropped = telemetry.DROPPED.labels("disconnect")
    before = dropped._value.get()
    scope = {"type": "http", "method": "POST", "path": "/classify", "raw_path": b"/classify", "query_string": query}
    headers = [(b"content-type", kind.encode())]
    assert small.portal is not None
    small.portal.call(small.app, {**scope, "headers": headers, "root_path": "", "http_version": "1.1"}, receive, send)
    assert statuses[0] == 499
    assert dropped._value.get() == before + 1


def test_so_many_inputs_that_none_is_looked_at(small: TestClient) -> None:
    answer = small.post("/v1/embeddings", json={"input": ["a"] * 2000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "input")


def test_one_keys_bodies_leave_room_for_others(tiny_artifact: Path, tmp_path: Path) -> None:
    made = {name: make_key(name, name, "infer") for name in ("greedy", "other")}
    keys = write_keys(tmp_path / "keys.toml", made)
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        state_dir=tmp_path,
        keys_file=tmp_path / "keys.toml",
        max_body_bytes=50_000,
        max_held_bytes=200_000,
    )
    app = create_app(settings)

    async def held(key: str, statuses: list[int]) -> None:
        """A request whose body does not end, until it is refused or the test is over."""
        first = True

        async def receive() -> dict[str, Any]:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": b"x" * 40_000, "more_body": True}
            await asyncio.sleep(1)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-type", b"image/png"), (b"x-api-key", keys[key].encode())]
        scope = {"type": "http", "method": "POST", "path": "/embed", "raw_path": b"/embed", "query_string": b""}
        await app({**scope, "headers": headers, "root_path": "", "http_version": "1.1"}, receive, send)

    async def scenario() -> tuple[list[int], list[int]]:
        async with app.router.lifespan_context(app):
            greedy, other = list[int](), list[int]()
            tasks = [asyncio.create_task(held("greedy", greedy)) for _ in range(3)]
            await asyncio.sleep(0.2)
            tasks.append(asyncio.create_task(held("other", other)))
            await asyncio.sleep(0.2)
            refused = list(greedy), list(other)
            await asyncio.gather(*tasks)
            return refused

    assert asyncio.run(scenario()) == ([429, 429], [])


def test_paths_and_methods(small: TestClient) -> None:
    check(small.get("/nowhere"), 404, "route-not-found")
    response = small.get("/classify")
    check(response, 405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
    check(small.get("/problems/nonsense"), 404, "not-found")
    check(small.get("/models/nope"), 404, "encoder-not-found")
    assert small.get("/v1/models/nope").json()["error"]["code"] == "encoder-not-found"
    assert small.get("/v1/nowhere").json()["error"]["code"] == "route-not-found"


def test_label_set_preconditions(small: TestClient) -> None:
    url, document = "/label-sets/errors", {"labels": LABELS}
    check(small.put(url, json=document, headers={"if-match": '"nothing"'}), 412, "precondition-failed")
    check(small.put("/label-sets/emoji", json=document), 409, "label-set-read-only")
    check(small.put("/label-sets/Not-A-Name", json=document), 422, "labels-invalid")
    check(small.get(url), 404, "label-set-not-found")
    check(small.put(url, json=document, headers={"if-match": ""}), 422, "request-invalid")


def test_no_more_label_sets_than_are_kept(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, state_dir=tmp_path, max_label_sets=1)
    with TestClient(create_app(settings)) as client:
        assert client.put("/label-sets/one", json={"labels": LABELS}).status_code == 201
        body = check(client.put("/label-sets/two", json={"labels": LABELS}), 409, "too-many-label-sets")
        assert body["limit"] == 1


def test_a_fault_of_ours_is_a_problem_without_details(small: TestClient) -> None:
    response = small.get("/broken")
    body = check(response, 500, "internal-error")
    assert "secret" not in json.dumps(body)


def test_a_full_queue_says_when_to_come_back(small: TestClient) -> None:
    big = base64.b64encode(png(4900, 4900)).decode()
    assert len(big) < 133_000
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: classify(small, image=big), range(8)))
    refused = [response for response in responses if response.status_code != 200]
    assert refused
    assert len(refused) < 8
    for response in refused:
        body = check(response, 429, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        assert body["retry_after_ms"] >= 0


def test_a_deadline_is_kept(small: TestClient) -> None:
    image = base64.b64encode(png(4900, 4900)).decode()
    asked = {"image": image, "labels": LABELS}
    start = time.perf_counter()
    response = small.post("/classify", json=asked, headers={"x-request-timeout-ms": "5"})
    assert check(response, 504, "deadline-exceeded")["limit"] == 5
    assert time.perf_counter() - start < 5
    for wrong in ("0", "-1", "soon", "1.5", "9" * 30, "١"):
        headers = [(b"x-request-timeout-ms", wrong.encode())]
        check(small.post("/classify", json=asked, headers=headers), 422, "request-invalid")


def test_before_the_encoders_are_loaded(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        response = client.post("/classify", json={"image": GOOD, "labels": LABELS})
        check(response, 503, "not-ready")
        assert response.headers["retry-after"] == "1"
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").json() == {"status": "unavailable", "reason": "loading"}


def test_an_encoder_that_cannot_be_loaded_ends_in_a_reason(tmp_path: Path) -> None:
    failures: list[lib.IronclipError] = []
    settings = Settings(encoders={"x": str(tmp_path / "nothing")}, state_dir=tmp_path)
    with TestClient(create_app(settings, on_fatal=failures.append)) as client:
        deadline = time.monotonic() + 20
        while not failures and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [error.code for error in failures] == ["encoder-unknown"]
        assert client.get("/readyz").json()["reason"] == "the encoder 'x' cannot be loaded (encoder-unknown)"


def test_a_store_that_is_away(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)}, state_dir=tmp_path, redis_url=SecretStr("redis://127.0.0.1:1/0")
    )
    with TestClient(create_app(settings)) as client:
        response = client.put("/label-sets/x", json={"labels": LABELS})
        check(response, 503, "unavailable")
        assert response.headers["retry-after"] == "1"
        assert client.get("/label-sets/emoji-groups").status_code == 200


def test_a_probe_that_is_not_known_is_not_found(small: TestClient) -> None:
    check(small.get("/probes/nowhere"), 404, "probe-not-found")


def test_without_the_right_key(tiny_artifact: Path, tmp_path: Path) -> None:
    made = {
        "prober": make_key("prober1", "acme", "probe"),
        "old": make_key("old1", "acme", "infer", expires="2020-01-01T00:00:00Z"),
        "poor": make_key("poor1", "acme", "infer", points_per_minute=1, burst=1),
    }
    keys = write_keys(tmp_path / "keys.toml", made)
    settings = Settings(
        keys_file=tmp_path / "keys.toml",
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=tmp_path,
    )
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.05)
        check(client.get("/models"), 401, "key-missing")
        check(client.get("/models", headers={"x-api-key": "no"}), 401, "key-unknown")
        check(client.get("/models", headers={"x-api-key": keys["old"]}), 401, "key-expired")
        check(client.get("/models", headers={"x-api-key": keys["prober"]}), 403, "scope-missing")
        poor = {"x-api-key": keys["poor"]}
        check(client.post("/embed", json={"texts": ["a"] * 9}, headers=poor), 413, "cost-too-high")
        assert client.post("/embed", json={"texts": ["a"] * 4}, headers=poor).status_code == 200
        check(client.post("/embed", json={"texts": ["a"] * 4}, headers=poor), 429, "rate-limited")


def test_every_code_can_be_looked_up(small: TestClient) -> None:
    for code, known in problem_types().items():
        assert small.get(f"/problems/{code}").json() == known
        assert known["description"]


def test_every_code_was_provoked() -> None:
    """Last in this file: the tests above have asked for each error that a caller can see."""
    assert set(problem_types()) - NEVER_ANSWERED - OF_MODELS - OF_KEYS - PROVOKED == set()
