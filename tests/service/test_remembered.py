"""Answers given again whole: they are the same, they are paid for, and they end with what they were made of."""

from __future__ import annotations

import httpx
import pytest

from ironclip.errors import NotReady
from service.remembered import Memory, Terms, request_key
from tests.service.conftest import Locked, ServiceProcess, as_base64, metric, picture

LABELS = ["carrot", "rocket"]
REMEMBERED = 'ironclip_cache_total{cache="answers",result="hit"}'


def asked(client: httpx.Client, form: str, seed: int) -> httpx.Response:
    """The same question in one of the forms that are remembered."""
    data = picture(seed)
    if form == "classify-raw":
        return client.post("/classify", params={"labels": LABELS}, content=data, headers={"Content-Type": "image/png"})
    if form == "classify-json":
        return client.post("/classify", json={"images": [as_base64(data)], "labels": LABELS})
    if form == "embed-raw":
        return client.post("/embed", content=data, headers={"Content-Type": "image/png"})
    return client.post("/embed", json={"images": [as_base64(data)]})


@pytest.mark.parametrize("form", ["classify-raw", "classify-json", "embed-raw", "embed-json"])
def test_a_repeated_request_is_answered_as_before(
    client: httpx.Client, tiny_service: ServiceProcess, form: str
) -> None:
    seed = 7100 + len(form) + (form[0] == "e") * 50
    first, second = asked(client, form, seed), asked(client, form, seed)
    assert "hit" in second.headers["Cache-Status"]
    before = metric(tiny_service.url, REMEMBERED)
    third = asked(client, form, seed)
    assert metric(tiny_service.url, REMEMBERED) == before + 1
    assert third.status_code == 200
    assert third.json() == second.json() == first.json()
    same = ("content-type", "cache-status", "x-ironclip-encoder", "x-content-type-options")
    assert [third.headers[name] for name in same] == [second.headers[name] for name in same]
    assert third.headers["x-request-id"] != second.headers["x-request-id"]
    assert "cache" in third.headers["server-timing"]


def test_what_differs_in_anything_is_another_request(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    data = {"image": as_base64(picture(7200)), "labels": LABELS}
    for _ in range(3):
        one = client.post("/classify", json=data).json()
    for other in ({"top_k": 1}, {"labels": LABELS[::-1]}, {"templates": "a drawing of a {}"}):
        before = metric(tiny_service.url, REMEMBERED)
        answer = client.post("/classify", json={**data, **other}).json()
        assert metric(tiny_service.url, REMEMBERED) == before
        assert answer != one


def test_a_label_set_put_anew_is_heard_at_once(client: httpx.Client) -> None:
    data = {"image": as_base64(picture(7300)), "label_set": "remembered"}
    for labels in (LABELS, ["umbrella", "clock", "rocket"], LABELS):
        client.put("/label-sets/remembered", json={"labels": labels}).raise_for_status()
        answers = [client.post("/classify", json=data).json() for _ in range(3)]
        assert {one["label"] for one in answers[0]["predictions"]} == set(labels)
        assert answers[0] == answers[1] == answers[2]
    client.delete("/label-sets/remembered").raise_for_status()
    assert client.post("/classify", json=data).status_code == 404


def test_bad_headers_and_bad_pictures_are_not_remembered(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    data = {"image": as_base64(picture(7400)), "labels": LABELS}
    for _ in range(3):
        assert client.post("/classify", json=data).status_code == 200
    assert client.post("/classify", json=data, headers={"X-Request-Timeout-Ms": "soon"}).status_code == 422
    mixed = {"images": [as_base64(picture(7400)), as_base64(b"\x89PNG\r\n\x1a\n")], "labels": LABELS}
    before = metric(tiny_service.url, REMEMBERED)
    for _ in range(3):
        assert "error" in client.post("/classify", json=mixed).json()[1]
    assert metric(tiny_service.url, REMEMBERED) == before


def test_remembered_answers_cost_points_and_stay_with_their_tenant(locked: Locked) -> None:
    data = {"image": as_base64(picture(7500)), "labels": LABELS}

    def left(answer: httpx.Response) -> int:
        return int(answer.headers["ratelimit"].partition("r=")[2].partition(";")[0])

    with locked.client("paying") as client, locked.client("acme") as other:
        answers = [client.post("/classify", json=data) for _ in range(4)]
        before = metric(locked.metrics_url, REMEMBERED)
        stranger = other.post("/classify", json=data)
        assert metric(locked.metrics_url, REMEMBERED) == before
    assert [one.status_code for one in answers] == [200] * 4
    assert "hit" in answers[3].headers["Cache-Status"]
    assert left(answers[2]) - left(answers[3]) == 1
    assert stranger.headers["Cache-Status"] == "ironclip; fwd=miss"
    assert httpx.post(f"{locked.url}/classify", json=data).status_code == 401


class Served:
    """What a name stands for."""

    serial = 1


@pytest.mark.anyio
async def test_an_answer_ends_with_the_version_it_came_from() -> None:
    served, gone = Served(), False

    def encoder(name: str) -> Served:
        if gone:
            raise NotReady("gone")
        return served

    async def label_set(name: str, tenant: str) -> Served:
        raise AssertionError("no set was named")

    memory = Memory(encoder, label_set, 10_000, 60)  # type: ignore[arg-type]
    key = request_key("", ("/classify", "image/png", "", "00"), b"")
    memory.keep(key, Terms("default", served.serial), b"{}", {})
    assert await memory.find(key, "") is not None
    served.serial = 2
    assert await memory.find(key, "") is None
    served.serial, gone = 1, True
    assert await memory.find(key, "") is None
    gone = False
    for i in range(100):  # older ones make room
        memory.keep(bytes([i]), Terms("default", 1), b"{}", {})
    assert await memory.find(key, "") is None
    assert await memory.find(bytes([99]), "") is not None


def test_keys_of_different_requests_differ() -> None:
    parts = [("", "a"), ("/embed", "/classify"), ("image/png", "image/jpeg"), ("", "application/x-npy"), ("00", "01")]
    chosen = [[pair[i >> at & 1] for at, pair in enumerate(parts)] for i in range(32)]
    keys = {request_key(tenant, asked, query) for tenant, *asked in chosen for query in (b"", b"x=1")}
    assert len(keys) == 64


def test_another_form_of_the_answer_is_another_request(client: httpx.Client) -> None:
    body, kind = picture(7900), {"content-type": "image/png"}
    forms = ("application/json", "application/x-npy", "application/octet-stream")
    for _ in range(3):
        answers = [client.post("/embed", content=body, headers={**kind, "accept": form}) for form in forms]
        assert [answer.headers["content-type"] for answer in answers] == list(forms)
    assert all("hit" in answer.headers["cache-status"] for answer in answers)
    assert answers[1].content.endswith(answers[2].content)


def test_what_accept_does_not_change_is_the_same_request(client: httpx.Client, tiny_service: ServiceProcess) -> None:
    body = picture(7950)
    for path in ("/embed", "/classify?labels=a&labels=b"):
        for _ in range(2):
            client.post(path, content=body, headers={"content-type": "image/png", "accept": "application/json"})
        before = metric(tiny_service.url, REMEMBERED)
        for accept in ("*/*", "application/json;q=0.9, text/html", ""):
            client.post(path, content=body, headers={"content-type": "image/png", "accept": accept})
        assert metric(tiny_service.url, REMEMBERED) == before + 3
