"""Nothing that a caller sent is in the log or in the metrics, at any level of the log, whatever was wrong with it."""

from __future__ import annotations

import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.conftest import ServiceProcess, as_base64, launch_service, picture

# What is sent in every place where a caller can put something; in letters that survive most encodings.
MARK = "marker4711zz"
LABELS = ["one", "two"]
PARENT = f"00-{'1' * 32}-{'1' * 16}-00"
HEADERS = (
    "x-api-key",
    "cookie",
    "user-agent",
    "referer",
    "x-forwarded-for",
    "forwarded",
    "accept",
    "prefer",
    "priority",
    "tracestate",
)
IMAGE = as_base64(picture(3))


@pytest.fixture(scope="module")
def chatty(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service that logs as much as it can, fetches pictures from a host that is not there, and is always slow."""
    service = launch_service(
        tmp_path_factory.mktemp("chatty"),
        encoders=f"tiny={tiny_artifact}",
        log_level="debug",
        log_format="json",
        slow_request_ms=1,
        image_url_hosts=f".{MARK}.invalid",
        image_url_timeout_ms=500,
        max_body_bytes=200_000,
    )
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


def _series(url: str) -> set[str]:
    """Names and labels of all series."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return {line.rpartition(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}


def _lines(service: ServiceProcess) -> list[dict[str, Any]]:
    """The log's lines, once those of all answered requests are there: they are written after the answers."""
    mark = secrets.token_hex(16)
    httpx.get(f"{service.url}/nothing", headers={"x-request-id": mark}, timeout=30)
    deadline = time.monotonic() + 20
    while mark not in service.log.read_text():
        assert time.monotonic() < deadline, "the log does not go on"
        time.sleep(0.05)
    time.sleep(0.2)  # two requests end in any order
    return [json.loads(line) for line in service.log.read_text().splitlines() if line.startswith("{")]


def _requests(client: httpx.Client) -> dict[str, Callable[[], httpx.Response]]:
    """Every way to send something bad, or something private that is good."""
    uri, good = f"data:image/png;base64,{IMAGE}", {"image": IMAGE, "labels": LABELS}
    tree = {"parents": {MARK: MARK}}
    json_type, form = {"content-type": "application/json"}, "multipart/form-data"
    few = {"eps": [1], "gradients": 5}
    tensor = {"name": MARK, "datatype": MARK, "shape": [1], "data": [MARK]}

    def post(path: str, body: object = None, **options: Any) -> Callable[[], httpx.Response]:
        return lambda: client.post(path, json=body, **options) if body is not None else client.post(path, **options)

    return {
        "good": post("/classify", {"image": uri, "labels": [MARK, "two"], "templates": [f"{MARK} {{}}"]}),
        "path": lambda: client.get(f"/{MARK}/{MARK}?{MARK}={MARK}"),
        "path in a route": lambda: client.get(f"/label-sets/{MARK}"),
        "path not utf-8": lambda: client.get(f"/label-sets/%ff%fe{MARK}%00%0d%0a"),
        "model": lambda: client.get(f"/models/{MARK}"),
        "openai model": lambda: client.get(f"/v1/models/{MARK}"),
        "oip model": post(f"/v2/models/{MARK}/infer", {"inputs": []}),
        "probe": lambda: client.get(f"/probes/{MARK}/events"),
        "cancel": lambda: client.delete(f"/probes/{MARK}"),
        "sample": lambda: client.get(f"/samples/{MARK}.png"),
        "problem": lambda: client.get(f"/problems/{MARK}"),
        "method": lambda: client.put(f"/classify?{MARK}", content=MARK),
        "no method": lambda: client.request(MARK.upper(), "/classify"),
        "headers": post("/classify", good, headers=dict.fromkeys(HEADERS, MARK)),
        "request id": post(
            "/classify", good, headers={"x-request-id": f"{MARK}!"}
        ),  # not of the form that is taken over
        "large": post("/classify", {**good, "labels": [MARK * 20_000]}),
        "authorization": post("/classify", good, headers={"authorization": f"Bearer {MARK}"}),
        "timeout": post("/classify", good, headers={"x-request-timeout-ms": MARK}),
        "traceparent": post("/classify", good, headers={"traceparent": f"00-{MARK}-{MARK}-01"}),
        "state": post("/classify", good, headers={"traceparent": PARENT, "tracestate": f"a={MARK}"}),
        "content type": post("/classify", content=b"x", headers={"content-type": f"image/{MARK}"}),
        "encoding": post("/classify", content=b"x", headers={"content-encoding": MARK, **json_type}),
        "charset": post("/classify", content=b"x", headers={"content-type": f"{form}; charset={MARK}; boundary=x"}),
        "no json": post("/classify", content=b'{"image": "' + MARK.encode(), headers=json_type),
        "bad utf-8": post("/classify", content=b'{"image": "\xff' + MARK.encode() + b'"}', headers=json_type),
        "deep": post("/classify", content=b'[{"' + MARK.encode() + b'":' * 1 + b"[" * 5000, headers=json_type),
        "field": post("/classify", {**good, MARK: MARK}),
        "type": post("/classify", {**good, "top_k": MARK}),
        "labels": post("/classify", {**good, "labels": [MARK, MARK]}),
        "long label": post("/classify", {**good, "labels": [MARK * 200]}),
        "label set": post("/classify", {"image": IMAGE, "label_set": MARK}),
        "pinned set": post("/classify", {"image": IMAGE, "label_set": f"{MARK}@{MARK}"}),
        "template": post("/classify", {**good, "templates": [MARK]}),
        "tree": post("/classify", {**good, "tree": tree, "levels": "rollup"}),
        "encoder": post("/classify", {**good, "encoder": MARK}),
        "defence": post("/classify", {**good, "defence": {"name": MARK}}),
        "defence option": post("/classify", {**good, "defence": {"name": "cola", MARK: MARK}}),
        "base64": post("/classify", {**good, "image": f"{MARK}!"}),
        "data uri": post("/classify", {**good, "image": f"data:image/{MARK};base64,{IMAGE}"}),
        "broken picture": post("/classify", {**good, "image": as_base64(picture(4)[:-30] + MARK.encode())}),
        "url refused": post("/classify", {**good, "image": f"https://user:{MARK}@{MARK}.example/{MARK}"}),
        "url failed": post("/classify", {**good, "image": f"https://a.{MARK}.invalid/{MARK}?{MARK}"}),
        "file": post("/classify", {**good, "image": f"file:///{MARK}"}),
        "form": post("/classify", files={MARK: (MARK, b"x")}, data={"labels": [MARK]}),
        "form field": post("/classify", files={"image": (MARK, picture(5))}, data={MARK: MARK}),
        "file name": post("/classify", files={"image": (MARK, picture(5))}, data={"labels": [MARK, "two"]}),
        "query": post(f"/classify?{MARK}={MARK}", content=picture(5), headers={"content-type": "image/png"}),
        "texts": post("/embed", {"texts": [MARK, MARK * 30], "images": [f"data:image/png;base64,{MARK}"]}),
        "openai": post("/v1/embeddings", {"input": [MARK, {"type": MARK}], "model": "default"}),
        "openai good": post("/v1/embeddings", {"input": MARK, "model": "default"}),
        "put": lambda: client.put(f"/label-sets/{MARK}", json={"labels": [MARK], "templates": [f"{MARK} {{}}"]}),
        "put again": lambda: client.put(f"/label-sets/{MARK}", json={"labels": []}, headers={"if-match": f'"{MARK}"'}),
        "delete": lambda: client.delete(f"/label-sets/{MARK}"),
        "probe label": post("/attack-probe", {**good, "label": MARK}),
        "probe good": post("/attack-probe", {**good, "labels": [MARK, "two"], "label": MARK, **few}),
        "oip": post("/v2/models/tiny/infer", {"id": MARK, "inputs": [tensor]}),
    }


def test_nothing_of_what_was_sent_is_logged_or_counted(chatty: ServiceProcess) -> None:
    with httpx.Client(base_url=chatty.url, timeout=30) as client:
        answers = {kind: ask() for kind, ask in _requests(client).items()}
    statuses = {kind: answer.status_code for kind, answer in answers.items()}
    assert not {kind: status for kind, status in statuses.items() if status >= 500}
    assert {200, 400, 404, 405, 413, 415, 422, 424} <= set(statuses.values()), statuses
    _lines(chatty)
    log, told = chatty.log.read_text(), httpx.get(f"{chatty.url}/metrics").text
    # The whole log, but for the line at the start that the operator's own setting is on.
    for hidden in (MARK, MARK.upper(), as_base64(MARK.encode())[:14], IMAGE[:40], "data:image"):
        for where in (log, told):
            found = where.find(hidden)
            assert found < 0, where[max(0, found - 300) : found + 100]
    lines = _lines(chatty)
    assert len([line for line in lines if line["event"] in ("request", "slow request")]) >= len(statuses)
    assert not [line for line in lines if line["level"] in ("error", "critical")]


def test_what_changes_things_has_an_audit_line_of_digests(chatty: ServiceProcess) -> None:
    name = f"audited-{secrets.token_hex(4)}"
    body = {"image": IMAGE, "labels": ["private-label", "two"], "eps": [1], "gradients": 5}
    with httpx.Client(base_url=chatty.url, timeout=30) as client:
        put = client.put(f"/label-sets/{name}", json={"labels": ["a", "b"]})
        gone = client.delete(f"/label-sets/{name}")
        probe = client.post("/attack-probe", json=body)
        refused = client.post("/attack-probe", json={**body, "labels": []})
    assert [answer.status_code for answer in (put, gone, probe)] == [201, 204, 200]
    lines = {line["request_id"]: line for line in _lines(chatty) if line["event"] == "audit"}
    of_put, of_gone = lines[put.headers["x-request-id"]], lines[gone.headers["x-request-id"]]
    assert (of_put["op"], of_put["status"], of_put["labels"]) == ("put_label_set", 201, put.json()["digest"])
    assert of_gone["op"] == "delete_label_set"
    assert of_put["name"] == of_gone["name"] != name
    of_probe = lines[probe.headers["x-request-id"]]
    assert of_probe["encoder"] == probe.json()["encoder"]["digest"]
    assert of_probe["labels"] == probe.json()["label_set"]["digest"]
    assert re.fullmatch("[0-9a-f]{64}", of_probe["picture"])
    assert lines[refused.headers["x-request-id"]]["status"] == 422
    (ended,) = [line for line in _lines(chatty) if line.get("probe") == of_probe["probe"] and line["event"] != "audit"]
    assert (ended["event"], ended["outcome"]) == ("probe ended", "done")
    assert ended["trace_id"] == of_probe["trace_id"]


def test_a_slow_request_says_where_its_time_went(chatty: ServiceProcess) -> None:
    answer = httpx.post(f"{chatty.url}/classify", json={"image": as_base64(picture(77)), "labels": LABELS}, timeout=30)
    (line,) = [one for one in _lines(chatty) if one.get("request_id") == answer.headers["x-request-id"]]
    assert (line["event"], line["level"]) == ("slow request", "warning")
    assert {"receive", "decode", "model"} <= set(line["stages"])
    assert all(0 <= part <= line["ms"] for part in line["stages"].values())


def test_ten_thousand_paths_make_no_series(chatty: ServiceProcess) -> None:
    """Paths, methods, parameters and headers at random: what is counted has the same labels afterwards."""
    httpx.get(f"{chatty.url}/{secrets.token_hex(4)}")
    httpx.request("BREW", f"{chatty.url}/classify")
    _series(chatty.url)  # the first question is counted by the second
    before = _series(chatty.url)
    port = int(chatty.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        reader = connection.makefile("rb")
        for _ in range(100):
            paths = [secrets.token_urlsafe(9) for _ in range(100)]
            asks = (
                f"GET /{path}?{path}={path} HTTP/1.1\r\nHost: {path}\r\nX-Request-Id: {path}\r\n\r\n" for path in paths
            )
            connection.sendall("".join(asks).encode())
            for _ in paths:
                assert b" 404 " in reader.readline()
                length = 0
                while (line := reader.readline()) not in (b"\r\n", b""):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                reader.read(length)
    assert _series(chatty.url) == before
