"""What operators and machines see: health, metrics, logs, documents, and an orderly end."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import jsonschema_rs
import pytest
from PIL import Image
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import ServiceProcess, metric

ROOT = Path(__file__).parents[2]


def picture(width: int = 40, height: int = 40, colour: tuple[int, int, int] = (9, 80, 200)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE = base64.b64encode(picture()).decode()


def test_health(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    "path", ["/", "/livez", "/readyz", "/metrics", "/models", "/label-sets/emoji", "/samples", "/docs", "/nowhere"]
)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    same = ("content-type", "etag") if path in ("/metrics", "/nowhere") else ("content-type", "content-length", "etag")
    assert [head.headers.get(name) for name in same] == [get.headers.get(name) for name in same]
    assert client.get("/livez").json() == {"status": "ok"}  # the connection is still in step


def test_where_head_is_answered(client: httpx.Client) -> None:
    assert client.post("/livez").headers["allow"] == "GET, HEAD"
    assert client.head("/classify").status_code == 405
    assert client.head("/classify").headers["allow"] == "POST"


def test_a_traceback_on_a_terminal_shows_no_locals() -> None:
    code = """
from service import telemetry
telemetry.configure_logging("info", "console")
def fault(text):
    try:
        raise ValueError("broken")
    except ValueError:
        telemetry.get_logger().exception("fault")
        import logging; logging.getLogger("uvicorn.error").exception("fault")
fault("what a " + "caller sent")
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stderr.count("ValueError: broken") == 2
    assert "what a caller sent" not in result.stderr


def test_models_tell_what_is_served(client: httpx.Client) -> None:
    listed = client.get("/models").json()
    (model,) = listed["models"]
    assert listed["default"] == "tiny"
    assert (model["dim"], model["resolution"], model["head"], model["dtype"]) == (32, 32, "cosine", "float32")
    assert set(model["capabilities"]) == {"classify", "embed-image", "embed-text"}
    assert model["provenance"]["name"] == "tiny"
    assert model["dtype_report"]["chosen"] == "float32"
    assert listed["limits"]["max_images"] == 64
    assert "none" in listed["defences"]
    assert client.get("/models/default").json() == model


@pytest.mark.parametrize("given", ["my-request-0001", "A.b_c-12345678"])
def test_a_request_id_is_taken_over(client: httpx.Client, given: str) -> None:
    assert client.get("/livez", headers={"x-request-id": given}).headers["x-request-id"] == given
    problem = client.get("/nowhere", headers={"x-request-id": given}).json()
    assert problem["instance"] == f"urn:request:{given}"


@pytest.mark.parametrize(
    "given", ["short", "x" * 129, "with space 1", "newline\\n12345", "ünïcödé-12345", '"},{"x":"y-1']
)
def test_another_request_id_is_replaced(client: httpx.Client, given: str) -> None:
    answer = client.get("/livez", headers=[(b"x-request-id", given.encode())])
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


def test_answers_are_not_sniffed(client: httpx.Client) -> None:
    assert client.get("/nowhere").headers["x-content-type-options"] == "nosniff"


def test_metrics_count_and_stay_few(client: httpx.Client) -> None:
    name = 'ironclip_requests_total{code="200",op="classify"}'
    before = metric(str(client.base_url).rstrip("/"), name)
    client.post("/classify", json={"image": IMAGE, "labels": ["a"]})
    assert metric(str(client.base_url).rstrip("/"), name) == before + 1
    client.get("/x")
    lines = len(client.get("/metrics").text.splitlines())
    for i in range(50):
        client.get(f"/path-{i}/{i}")
        client.post("/classify", json={"image": IMAGE, "labels": [f"label {i}"], "encoder": f"e{i}"})
    # Two series may be new: the first 404 of an operation, with its error code.
    assert len(client.get("/metrics").text.splitlines()) < lines + 30
    for family in ("stage_seconds", "batch_size", "queue_items", "queue_seconds_estimate", "cache_total", "model_info"):
        assert f"ironclip_{family}" in client.get("/metrics").text
    assert metric(str(client.base_url).rstrip("/"), 'ironclip_stage_seconds_count{stage="queue"}') > 0
    # What alerts look for the rise of is there before its first event, or that one would be no rise.
    for reason in ("died", "hung", "fails"):
        assert f'ironclip_worker_restarts_total{{encoder="tiny",reason="{reason}",tower="text"}} 0.0' in (
            client.get("/metrics").text
        )


def test_logs_are_json_and_hold_nothing_of_the_callers(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    secret = "patient-4711"
    client.get(f"/{secret}")
    client.post("/classify", json={"image": IMAGE, "labels": [secret, "b"]})
    client.post(
        "/classify", json={"image": secret, "labels": [secret, secret]}, headers={"x-request-id": "find-me-please"}
    )
    client.post("/embed", json={"texts": [secret]})
    log = tiny_service.log.read_text()
    assert secret not in log
    line = next(json.loads(line) for line in log.splitlines() if "find-me-please" in line)
    assert (line["op"], line["status"]) == ("classify", 422)
    assert line["code"]


def test_documentation_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    for name in re.findall(r"docs/assets/[\w.-]+", page):
        asset = client.get(f"/{name}")
        assert asset.status_code == 200
        assert len(asset.content) > 100
    assert client.get("/docs/assets/..%2F__init__.py").status_code == 404


def test_the_committed_openapi_document_is_current() -> None:
    current = json.loads(json.dumps(create_app(Settings()).openapi()))
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    assert committed == current, "run `python -m service openapi > docs/openapi.json`"


def test_answers_have_the_documented_form(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()

    def check(name: str, value: object) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema_rs.validator_for(schema).validate(value)

    asked = {"image": IMAGE, "labels": ["a", "b"], "tree": {"parents": {"a": "x", "b": "x"}}}
    check("Classification", client.post("/classify", json=asked).json())
    check("Failed", client.post("/classify", json={"images": ["?"], "labels": ["a"]}).json()[0])
    check("EmbedResponse", client.post("/embed", json={"images": [IMAGE, "?"], "texts": ["a", ""]}).json())
    check("OpenAIEmbeddingResponse", client.post("/v1/embeddings", json={"input": ["a"]}).json())
    check("OpenAIError", client.post("/v1/embeddings", json={"input": []}).json())
    check("LabelSetList", client.get("/label-sets").json())
    check("LabelSetSummary", client.put("/label-sets/formed", json={"labels": ["a"]}).json())
    check("LabelSetStored", client.get("/label-sets/formed").json())
    check("LabelSetStored", client.get("/label-sets/emoji").json())
    check("ProbeList", client.get("/probes").json())
    check("SampleList", client.get("/samples").json())
    check("Problem", client.get("/nowhere").json())
    check("Status", client.get("/readyz").json())


def test_a_long_list_of_label_sets_comes_in_pages(client: httpx.Client) -> None:
    for name in ("page-a", "page-b", "page-c"):
        client.put(f"/label-sets/{name}", json={"labels": ["cat", "dog"]}).raise_for_status()
    whole = client.get("/label-sets").json()
    assert "next" not in whole
    names, path = [], "/label-sets?limit=2"
    while path:
        page = client.get(path).json()
        assert 1 <= len(page["label_sets"]) <= 2
        names += [row["name"] for row in page["label_sets"]]
        if names[-1] == "page-b":
            client.delete("/label-sets/page-b").raise_for_status()  # where the next page begins
        path = page.get("next", "")
    assert names == sorted(row["name"] for row in whole["label_sets"])
    for wrong in ("limit=0", "limit=many", "limit=1001", "cursor=Not%20A%20Name"):
        assert client.get(f"/label-sets?{wrong}").status_code == 422, wrong


def test_label_sets_over_http(client: httpx.Client) -> None:
    url, document = "/label-sets/over-http", {"labels": ["cat", "dog"]}
    first = client.put(url, json=document, headers={"if-none-match": "*"})
    assert first.status_code == 201
    etag = first.headers["etag"]
    assert etag == f'"{first.json()["digest"]}"'
    assert client.put(url, json=document).status_code == 200
    assert client.put(url, json=document, headers={"if-none-match": "*"}).status_code == 412
    assert client.get(url, headers={"if-none-match": etag}).status_code == 304
    assert client.get(url).json()["labels"] == ["cat", "dog"]
    changed = client.put(url, json={"labels": ["newt"]}, headers={"if-match": etag})
    assert changed.status_code == 200
    assert client.put(url, json=document, headers={"if-match": etag}).status_code == 412
    assert client.get(f"{url}@{first.json()['digest']}").json()["labels"] == ["cat", "dog"]
    assert client.delete(url, headers={"if-match": etag}).status_code == 412
    assert client.delete(url).status_code == 204
    assert client.delete(url).status_code == 404


def test_preconditions_are_read_as_they_are_defined(client: httpx.Client) -> None:
    """RFC 9110: If-Match compares strongly, If-None-Match weakly (13.1), and lines of one name are one list (5.3)."""
    url, document = "/label-sets/preconditions", {"labels": ["cat", "dog"]}
    etag = client.put(url, json=document).headers["etag"]
    for lines in ([f"W/{etag}"], ['"other"', f"W/{etag}"], ['"other"', 'W/"another", "third"'], [f'"a,{etag[1:]}']):
        refused = client.put(url, json=document, headers=[("if-match", line) for line in lines])
        assert refused.status_code == 412, lines
    for lines in ([etag], ['"other"', etag], [f'W/"other", {etag}'], ['"a, b"', "*"], [etag.strip('"')]):
        assert client.put(url, json=document, headers=[("if-match", line) for line in lines]).status_code == 200, lines
        asked = [("if-none-match", line) for line in lines]
        assert client.get(url, headers=asked).status_code == 304, lines
        assert client.put(url, json=document, headers=asked).status_code == 412, lines
    assert client.get(url, headers=[("if-none-match", '"other"'), ("if-none-match", f"W/{etag}")]).status_code == 304
    assert client.get(url, headers=[("if-none-match", '"other"'), ("if-none-match", '"third"')]).status_code == 200
    page = client.get("/").headers["etag"]
    assert client.get("/", headers=[("if-none-match", '"other"'), ("if-none-match", page)]).status_code == 304
    assert client.delete(url, headers=[("if-match", '"other"'), ("if-match", etag)]).status_code == 204


def test_a_client_that_goes_away_is_counted_and_harms_nobody(
    client: httpx.Client, tiny_service: ServiceProcess
) -> None:
    before = metric(str(client.base_url).rstrip("/"), 'ironclip_requests_total{code="499",op="classify"}')
    body = json.dumps({"image": base64.b64encode(picture(4900, 4900)).decode(), "labels": ["a"]}).encode()
    head = (
        f"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", tiny_service.port)) as sock:
            sock.sendall(head.encode() + body)
            time.sleep(0.02)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if metric(str(client.base_url).rstrip("/"), 'ironclip_requests_total{code="499",op="classify"}') > before:
            break
        time.sleep(0.05)
    else:
        pytest.fail("nobody noticed")
    assert client.post("/classify", json={"image": IMAGE, "labels": ["a"]}).status_code == 200


def test_a_client_that_expects_to_be_let_in_is_refused_before_it_sends(tiny_service: ServiceProcess) -> None:
    head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n"
    with socket.create_connection(("127.0.0.1", tiny_service.port), 10) as sock:
        sock.sendall((head + "Expect: 100-continue\r\n\r\n").encode())
        assert b"413" in sock.recv(4096).splitlines()[0]


def test_an_encoder_that_does_not_exist_ends_the_program_with_3_and_the_reason(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "service", "--encoders", f"x={tmp_path / 'nothing'}", "--port", "0"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 3
    assert "An encoder cannot be loaded" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_program_explains_itself() -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "service", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "IRONCLIP_CONFIG" in run("--help")
    assert "| `IRONCLIP_PORT` | `8000` |" in run("settings", "--markdown")
    assert "IRONCLIP_PORT" in run("settings")


def test_a_body_that_does_not_arrive_is_not_waited_for(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500\r\n"
    with socket.create_connection(("127.0.0.1", tiny_service.port), 10) as sock:
        sock.sendall((head + "X-Request-Timeout-Ms: 200\r\n\r\nonly this").encode())
        assert b"504" in sock.recv(4096).splitlines()[0]
    assert client.get("/readyz").status_code == 200


def test_a_dead_worker_is_told_on_readyz_and_to_whoever_asks(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    app = create_app(settings)
    with TestClient(app) as client:
        deadline = time.monotonic() + 60
        while REGISTRY.get_sample_value("ironclip_ready") != 1:  # whether or not anybody asks /readyz
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert client.get("/readyz").status_code == 200
        assert client.portal is not None
        client.portal.call(app.state.service.encoder("tiny").images.stop)
        assert REGISTRY.get_sample_value("ironclip_ready") == 0
        refused = client.get("/readyz")
        assert (refused.status_code, refused.json()["reason"]) == (503, "a worker of tiny is not running or not moving")
        answer = client.post("/classify", json={"image": IMAGE, "labels": ["a"]})
        assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
        assert client.get("/livez").status_code == 200


def test_pages_may_send_and_read_what_the_protocols_need() -> None:
    client = TestClient(create_app(Settings(cors_origins=("https://app.example",))))
    origin = {"origin": "https://app.example"}
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "inference-header-content-length",
    }
    assert client.options("/v2/models/default/infer", headers={**origin, **asked}).status_code == 200
    exposed = client.get("/livez", headers=origin).headers["access-control-expose-headers"].lower().split(", ")
    wanted = {"allow", "inference-header-content-length", "ratelimit", "retry-after", "www-authenticate"}
    assert wanted <= set(exposed)
