"""/attack-probe: what it finds is what is served, side by side with others, streamed, cancelled, and cut short."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_client
import torch
from PIL import Image
from starlette.testclient import TestClient

from ironclip.classifier import Classifier
from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.probe import ProbeOptions, probe
from service.app import create_app
from service.settings import Settings
from tests.service.conftest import RedisServer, ServiceProcess, as_base64, launch_service, metric, picture, until

LABELS = ["carrot", "rocket", "cat face", "horse", "boat"]
TREE = {
    "levels": ["name", "kind"],
    "parents": {"carrot": "thing", "rocket": "thing", "boat": "thing", "cat face": "animal", "horse": "animal"},
}
MANY = [{"name": f"label {i}", "descriptions": [f"it is {j}" for j in range(30)]} for i in range(200)]
LONG = {"effort": "thorough", "eps": [1, 2], "seconds": 30}


@pytest.fixture(scope="module")
def encoder(tiny_artifact: Path) -> Encoder:
    return load_encoder(str(tiny_artifact)).served()


@pytest.fixture(scope="module")
def small(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        max_probes=2,
        probe_max_gradients=100_000,
        state_dir=tmp_path_factory.mktemp("state"),
    )
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            pass
        yield client


def ask(client: Any, seed: int, **options: Any) -> httpx.Response:
    body = {"image": as_base64(picture(seed)), "labels": LABELS, **options}
    response: httpx.Response = client.post("/attack-probe", json=body)
    return response


def start(client: httpx.Client, seed: int, **options: Any) -> str:
    body = {"image": as_base64(picture(seed)), "labels": LABELS, **options}
    response = client.post("/attack-probe", json=body, headers={"Prefer": "respond-async"})
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/probes/{response.json()['id']}"
    return str(response.json()["id"])


def ended(client: httpx.Client, identity: str, seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        form: dict[str, Any] = client.get(f"/probes/{identity}").json()
        if form["status"] in ("done", "failed", "cancelled"):
            return form
        time.sleep(0.05)
    raise AssertionError(f"the probe did not end: {form}")


def events(client: httpx.Client, identity: str, **headers: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    with client.stream("GET", f"/probes/{identity}/events", headers=headers, timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        number, kind = 0, ""
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                number = int(value)
            elif name == "event":
                kind = value
            elif name == "data":
                found.append((number, kind, json.loads(value)))
    return found


@pytest.mark.parametrize("name", ["none", "cola", "ttc"])
def test_the_probe_is_the_librarys(client: httpx.Client, encoder: Encoder, name: str) -> None:
    # Not waited for in one request: on a busy machine that would end it with what is known.
    found = ended(client, start(client, 50, eps=[4, 12, 40], defence=name, seconds=60), 90)["result"]
    classifier = Classifier(encoder, LabelSet.parse(LABELS), defence=make_defence(name))
    pixels, _ = encoder.preprocessing(Image.open(io.BytesIO(picture(50))))
    expected = probe(classifier, pixels, ProbeOptions(eps=(4, 12, 40), seconds=600))
    brief = [(point["eps"], point["broken"], point["steps"]) for point in found["points"]]
    assert brief == [(point["eps"], point["broken"], point["steps"]) for point in expected["points"]]
    assert (found["robust_to"], found["broken_at"]) == (expected["robust_to"], expected["broken_at"])
    assert found["clean"]["label"] == expected["clean"]["label"]
    assert found["defence"]["name"] == name
    assert found["encoder"]["digest"] == encoder.digest
    assert found["attack"]["adaptive"]
    assert "certificate" in found["statement"]
    assert "artefacts" not in found
    assert any(warning["code"] == "resized" for warning in found["warnings"])  # 48 x 40 pixels were sent


def test_the_adversarial_picture_gives_its_label_to_classify(client: httpx.Client) -> None:
    """Fifty probes: what /classify says of the PNG is what the probe said it would."""

    def one(seed: int) -> bool:
        found = ask(client, seed, eps=[24], artefacts=["adversarial", "perturbation"]).json()
        if found["broken_at"] is None:
            return False
        uri = found["artefacts"]["adversarial"]
        answer = client.post("/classify", json={"image": uri, "labels": LABELS}).json()
        said = answer["predictions"][0]
        worst = found["points"][-1]
        assert said["label"] == worst["label"] != found["label"]
        assert said["score"] == pytest.approx(worst["score"], abs=1e-3)
        assert not answer["preprocessing"]["warnings"]
        size = Image.open(io.BytesIO(base64.b64decode(found["artefacts"]["perturbation"].partition(",")[2]))).size
        assert size == (32, 32)
        return True

    with ThreadPoolExecutor(8) as pool:
        broken = list(pool.map(one, range(500, 550)))
    assert sum(broken) >= 40


def test_an_attack_with_options_is_run_as_it_is(client: httpx.Client) -> None:
    attack = {"name": "pgd", "iterations": 3}
    found = ask(client, 50, eps=[1], attack=attack).json()
    assert found["attack"] == found["attack"] | {"name": "pgd", "options": {"iterations": 3, "seed": 0}}
    assert found["cost"]["gradients"] <= 3  # by its bare name it makes the effort's twenty
    form = {"labels": LABELS, "eps": ["1"], "attack": json.dumps(attack)}
    sent = client.post("/attack-probe", data=form, files={"image": picture(50)})
    assert sent.status_code == 200, sent.text
    assert sent.json()["points"] == found["points"]
    whole = ask(client, 50, attack={"name": "pgd", "iterations": 7, "restarts": 2}, dry_run=True).json()
    assert whole["dry_run"]["steps_a_radius_at_most"] == 2 * (7 + 1)  # and a look at where each start ended


def test_many_at_once_find_what_each_finds_alone(client: httpx.Client) -> None:
    options = {"eps": [3, 6, 12], "seconds": 60, "attack": "apgd-ce"}
    alone = {seed: ended(client, start(client, seed, **options))["result"]["points"] for seed in (700, 707)}
    started = [start(client, seed, **options) for seed in range(700, 716)]
    together = [ended(client, identity)["result"]["points"] for identity in started]
    assert together[0] == alone[700]
    assert together[7] == alone[707]


def test_a_stream_tells_everything_and_may_be_taken_up_again(client: httpx.Client) -> None:
    identity = start(client, 51, max_eps=24, artefacts=["adversarial"])
    told = events(client, identity)
    kinds = [kind for _, kind, _ in told]
    assert kinds[0] == "started"
    assert kinds[-1] == "done"
    assert {"point", "progress", "artefacts"} <= set(kinds)
    numbers = [number for number, _, _ in told]
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    answer = told[-1][2]
    last: dict[float, dict[str, Any]] = {data["eps"]: data for _, kind, data in told if kind == "point"}
    for point in answer["points"]:
        assert last[point["eps"]]["broken"] == point["broken"]
    radii = [data["eps"] for _, kind, data in told if kind == "artefacts"]
    assert radii == sorted(radii, reverse=True)
    assert radii[-1] == answer["broken_at"]
    # Late, and from the middle: the last of each thing.
    kept = {(kind, data.get("eps") if kind == "point" else None): (number, kind, data) for number, kind, data in told}
    assert events(client, identity) == sorted(kept.values(), key=lambda one: one[0])
    middle = numbers[len(numbers) // 2]
    later = [one for one in sorted(kept.values(), key=lambda one: one[0]) if one[0] > middle]
    assert events(client, identity, **{"Last-Event-ID": str(middle)}) == later
    # Behind the end there is nothing: 204 keeps an EventSource from asking again and again.
    over = client.get(f"/probes/{identity}/events", headers={"Last-Event-ID": str(numbers[-1])})
    assert (over.status_code, over.content) == (204, b"")
    form = client.get(f"/probes/{identity}").json()
    assert form["status"] == "done"
    assert form["result"] == answer
    assert form["points"] == [last[eps] for eps in sorted(last)]


def test_probes_are_listed_newest_first_and_in_pages(client: httpx.Client) -> None:
    started = [start(client, 57, eps=[1], attack="fgsm", artefacts=["adversarial"]) for _ in range(3)]
    whole = client.get("/probes?limit=1000").json()
    assert [row["id"] for row in whole["probes"][:3]] == started[::-1]
    assert whole["partial"] is False
    assert "next" not in whole
    found, path = [], "/probes?limit=2"
    while path:
        page = client.get(path).json()
        assert 1 <= len(page["probes"]) <= 2
        found += [row["id"] for row in page["probes"]]
        path = page.get("next", "")
    assert found == [row["id"] for row in whole["probes"]]
    form = ended(client, started[0])
    (row,) = [row for row in client.get("/probes").json()["probes"] if row["id"] == started[0]]
    assert (row["status"], row["error"]) == ("done", None)
    for field in ("robust_to", "broken_at", "label", "encoder", "defence"):
        assert row[field] == form["result"][field], field
    assert row["created"] <= row["started"]
    assert "data:image" not in json.dumps(row)
    for wrong in ("limit=0", "limit=many", "limit=1001", "cursor=1", "cursor=x-y", f"cursor={'9' * 16}-a"):
        assert client.get(f"/probes?{wrong}").status_code == 422, wrong


def test_a_cancelled_probe_ends(client: httpx.Client) -> None:
    identity = start(client, 52, **LONG)
    until(lambda: client.get(f"/probes/{identity}").json()["status"] == "running")
    assert client.delete(f"/probes/{identity}").status_code == 204
    assert ended(client, identity, 5)["status"] == "cancelled"
    assert client.delete(f"/probes/{identity}").status_code == 204
    assert client.get(f"/probes/{identity}").json()["status"] == "cancelled"
    assert events(client, identity)[-1][1] == "cancelled"
    for method, path in (("GET", "/probes/unknown"), ("GET", "/probes/unknown/events"), ("DELETE", "/probes/unknown")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["code"]) == (404, "probe-not-found")


def test_work_stops_when_the_caller_has_gone(client: httpx.Client) -> None:
    url = str(client.base_url)
    running = 'ironclip_probes_running{encoder="tiny"}'
    until(lambda: metric(url, running) == 0)
    with contextlib.suppress(httpx.ReadTimeout):
        body = {"image": as_base64(picture(53)), "labels": LABELS, **LONG}
        httpx.post(f"{url}/attack-probe", json=body, timeout=httpx.Timeout(5, read=1.0))
        raise AssertionError("it should have taken longer")
    until(lambda: metric(url, running) == 0, 3)
    steps = metric(url, "ironclip_probe_steps_total")
    time.sleep(0.5)
    assert metric(url, "ironclip_probe_steps_total") == steps


def test_classifications_and_probes_leave_each_other_room(client: httpx.Client) -> None:
    # A cosine is never below -1: this one goes on until it is cancelled.
    identity = start(client, 54, objective="embedding", cosine_below=-1, effort="thorough", seconds=60)
    until(lambda: client.get(f"/probes/{identity}").json()["status"] == "running")
    until(lambda: "progress" in client.get(f"/probes/{identity}").json())
    stop, answered = threading.Event(), []

    def classify(first: int) -> None:
        seed = first
        while not stop.is_set():
            data = as_base64(picture(seed))
            answered.append(client.post("/classify", json={"image": data, "labels": LABELS}).status_code)
            seed += 1

    threads = [threading.Thread(target=classify, args=(10_000 + 1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    try:
        before = client.get(f"/probes/{identity}").json()["progress"]["gradients"]
        time.sleep(2)
        after = client.get(f"/probes/{identity}").json()["progress"]["gradients"]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        client.delete(f"/probes/{identity}")
    assert set(answered) == {200}
    assert len(answered) > 5
    assert after > before  # it does not starve


@pytest.mark.parametrize(
    ("options", "status", "pointer"),
    [
        ({"gradients": 1_000_000_000}, 422, "/gradients"),
        ({"seconds": 61}, 422, "/seconds"),
        ({"eps": [1, -2]}, 422, "/eps/1"),
        ({"max_eps": 900}, 422, "/max_eps"),
        ({"label": "carot"}, 422, "/label"),
        ({"target": "zebra"}, 422, "/target"),
        ({"attack": "deepfool"}, 422, "/attack"),
        ({"attack": "square", "target": "boat"}, 422, "/attack"),
        ({"attack": {"name": "square"}, "target": "boat"}, 422, "/attack"),
        ({"attack": {"name": "pgd", "steps": 3}}, 422, "/attack"),
        ({"attack": {"name": "pgd", "iterations": 0}}, 422, "/attack"),
        ({"attack": {"name": "square", "queries": 10**9}}, 422, "/attack"),
        ({"attack": {"name": "pgd", "iterations": 10**6, "restarts": 10**60}}, 422, "/attack"),
        ({"attack": {}}, 422, "/attack/name"),
        ({"tree": TREE, "level": "sort"}, 422, "/level"),
        ({"defence": {"name": "cola", "views": 99}}, 422, "/defence"),
        ({"norm": "l1"}, 422, "/norm"),
        ({"draws": "some"}, 422, "/draws"),
        ({"objective": "embedding", "gallery": [[1.0, 2.0], [2.0, 1.0]]}, 422, "/gallery/0"),
        ({"objective": "embedding", "gallery": []}, 422, "/gallery"),
        ({"labels": ["carrot"]}, 422, "/labels"),
        ({"label": "carrot", "target": "carrot"}, 422, "/target"),
        ({"max_eps": 0.5}, 422, "/max_eps"),
        ({"defence": {"name": "cola", "coupling": "exact", "views": 16}, "labels": MANY}, 413, "/defence"),
        ({"image": "AAAA"}, 422, "/image"),
        ({"labels": []}, 422, "/labels"),
    ],
)
def test_bad_asks_are_told_what_is_wrong(small: TestClient, options: dict[str, Any], status: int, pointer: str) -> None:
    answer = ask(small, 55, **options)
    assert answer.status_code == status, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_numbers_of_any_length_are_answered(small: TestClient) -> None:
    body = json.dumps({"image": as_base64(picture(55)), "labels": LABELS})[:-1]
    huge = "1" + 400 * "0"
    for extra in (
        f'"gradients": {huge}',
        f'"defence": {{"name": "cola", "temperature": {huge}}}',
        f'"max_eps": {huge}',
    ):
        for path in ("/attack-probe", "/classify"):
            if path == "/classify" and "defence" not in extra:
                continue
            answer = small.post(path, content=f"{body}, {extra}}}", headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 422), (path, extra[:40], answer.text)


def test_a_probe_that_fails_fails_alone(small: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from service import probe_job

    true = probe_job.result
    broken: list[str] = []

    def sometimes(probe: Any, **options: Any) -> dict[str, Any]:
        if probe.options.seed == 666:
            broken.append("here")
            raise ZeroDivisionError("on purpose")
        return true(probe, **options)

    monkeypatch.setattr(probe_job, "result", sometimes)
    bad = {"image": as_base64(picture(55)), "labels": LABELS, "seed": 666, "eps": [1]}
    identity = small.post("/attack-probe", json=bad, headers={"Prefer": "respond-async"}).json()["id"]
    assert ask(small, 56, eps=[1]).status_code == 200
    until(lambda: small.get(f"/probes/{identity}").json()["status"] == "failed")
    assert small.get(f"/probes/{identity}").json()["error"]["code"] == "internal-error"
    assert broken


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"objective": "embedding", "label": "carrot"}, "nothing is chosen"),
        ({"cosine_below": 0.3}, "belong to objective embedding"),
        ({"objective": "embedding", "top_k": 2}, "give one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(small: TestClient, options: dict[str, Any], says: str) -> None:
    answer = ask(small, 55, **options)
    assert answer.status_code == 422
    assert says in answer.json()["detail"]


def test_a_dry_run_says_the_cost_and_costs_nothing(client: httpx.Client) -> None:
    url = str(client.base_url)
    steps = metric(url, "ironclip_probe_steps_total")
    cost = ask(client, 56, dry_run=True, defence={"name": "cola", "views": 4}, draws="fresh").json()["dry_run"]
    # APGD-CE and APGD-DLR of 20 steps and a start each, and a look at the picture as it is.
    assert cost["steps_a_radius_at_most"] == 2 * 21 + 1
    assert cost["gradients_at_most"] == 3 * 42 * cost["radii_at_most"] < 2000
    assert cost["tower_passes_per_gradient"] == 12
    assert cost["draws_a_step"] == 3
    one = ask(client, 56, dry_run=True, eps=[2]).json()["dry_run"]
    assert (one["radii_at_most"], one["gradients_at_most"]) == (1, 42)
    assert ask(client, 56, dry_run=True, eps=[2], gradients=10).json()["dry_run"]["tower_passes_at_most"] == 30
    # A gradient through many views counts as many against the server's limit.
    dear = {"dry_run": True, "defence": {"name": "cola", "views": 16}}
    assert ask(client, 56, effort="thorough", **dear).json()["dry_run"]["gradients_at_most"] == 200_000 // 16
    refused = ask(client, 56, gradients=20_000, **dear).json()
    assert refused["errors"][0]["pointer"] == "/gradients"
    assert "IRONCLIP_PROBE_MAX_GRADIENTS" in refused["detail"]
    assert metric(url, "ironclip_probe_steps_total") == steps


def test_time_that_is_up_gives_what_is_known(client: httpx.Client) -> None:
    found = ask(client, 57, effort="thorough", eps=[1, 2], seconds=0.3).json()
    assert found["status"] == "budget_exhausted"
    assert {point["state"] for point in found["points"]} <= {"unknown", "held", "broken"}
    body = {"image": as_base64(picture(57)), "labels": LABELS, "effort": "thorough", "eps": [1, 2]}
    short = client.post("/attack-probe", json=body, headers={"X-Request-Timeout-Ms": "1500"})
    assert short.status_code == 200  # the probe ends before the request does
    assert short.json()["status"] == "budget_exhausted"


def test_levels_targets_and_forms(client: httpx.Client) -> None:
    data = picture(58)
    form = client.post(
        "/attack-probe",
        files={"image": data},
        data={
            "labels": LABELS,
            "tree": json.dumps(TREE),
            "level": "kind",
            "eps": ["2", "30"],
            "artefacts": "adversarial",
        },
        timeout=60,
    ).json()
    assert form["label"] in ("thing", "animal")
    assert form["level"] == "kind"
    assert [point["eps"] for point in form["points"]] == [2, 30]
    if form["broken_at"]:
        answer = client.post(
            "/classify",
            json={"image": form["artefacts"]["adversarial"], "labels": LABELS, "tree": TREE, "levels": "rollup"},
        ).json()
        assert answer["levels"]["kind"][0]["label"] != form["label"]
    raw = client.post(
        "/attack-probe",
        params={"labels": LABELS, "target": "boat", "max_eps": 40},
        content=data,
        headers={"Content-Type": "image/png"},
        timeout=60,
    ).json()
    assert raw["target"] == "boat"
    assert raw["points"][-1]["label"] == "boat"


def test_an_embedding_is_attacked_itself(client: httpx.Client, encoder: Encoder) -> None:
    data = picture(59)
    body = {
        "image": as_base64(data),
        "objective": "embedding",
        "cosine_below": 0.8,
        "max_eps": 60,
        "artefacts": ["adversarial"],
    }
    found = client.post("/attack-probe", json=body, timeout=60).json()
    assert found["label_set"] is None
    vectors = client.post("/embed", json={"images": [as_base64(data), found["artefacts"]["adversarial"]]}).json()
    first, second = (torch.tensor(one["embedding"]) for one in vectors["images"])
    assert float(first @ second) < 0.8
    generator = torch.Generator().manual_seed(0)
    gallery = [first.tolist(), *torch.randn(5, encoder.dim, generator=generator).tolist()]
    changed = client.post(
        "/attack-probe",
        json={"image": as_base64(data), "objective": "embedding", "gallery": gallery, "top_k": 2, "max_eps": 60},
        timeout=60,
    ).json()
    assert changed["broken_at"]
    without = client.post("/attack-probe", json={"image": as_base64(data), "objective": "embedding", "defence": "cola"})
    assert without.status_code == 422
    assert without.json()["errors"][0]["pointer"] == "/label_set"


def test_too_many_probes_are_turned_away(small: TestClient) -> None:
    # A cosine is never below -1: these go on until they are cancelled.
    endless = {"objective": "embedding", "cosine_below": -1, "effort": "thorough", "gradients": 50_000, "seconds": 60}
    started = []
    for seed in (60, 61):
        body = {"image": as_base64(picture(seed)), **endless}
        answer = small.post("/attack-probe", json=body, headers={"Prefer": "respond-async"})
        assert answer.status_code == 202
        started.append(answer.json()["id"])
    turned_away = ask(small, 62)
    assert turned_away.status_code == 429
    assert "IRONCLIP_MAX_PROBES" in turned_away.json()["detail"]
    assert int(turned_away.headers["retry-after"]) >= 1
    for identity in started:
        small.delete(f"/probes/{identity}")
    until(lambda: ask(small, 62, eps=[1]).status_code == 200, 30)


def test_a_service_may_have_no_probes(tiny_artifact: Path, tmp_path: Path) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, probes=False, dtype="float32", state_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            pass
        answer = ask(client, 63)
        assert (answer.status_code, answer.json()["code"]) == (404, "route-not-found")
        assert "/attack-probe" not in client.get("/openapi.json").json()["paths"]


def test_a_probe_ends_with_what_it_knows_when_the_service_stops(tiny_artifact: Path, tmp_path: Path) -> None:
    service = launch_service(tmp_path, encoders=f"tiny={tiny_artifact}", dtype="float32")
    try:
        service.wait_ready()
        with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=service.url) as client:
            waiting = pool.submit(ask, client, 64, **LONG)
            until(lambda: metric(service.url, "ironclip_probe_steps_total") > 5)
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            answer = waiting.result(30)
        assert answer.status_code == 200
        assert answer.json()["status"] == "budget_exhausted"
        assert time.monotonic() - began < 10
        assert service.process.wait(30) == 0
    finally:
        service.stop()


@pytest.fixture
def replicas(tiny_artifact: Path, tmp_path: Path, redis_server: RedisServer) -> Iterator[list[ServiceProcess]]:
    common = {
        "encoders": f"tiny={tiny_artifact}",
        "dtype": "float32",
        "redis_url": redis_server.url,
        "redis_mac_key": "s",
    }
    found = [launch_service(tmp_path, **common) for _ in range(2)]
    try:
        for one in found:
            one.wait_ready()
        yield found
    finally:
        for one in found:
            one.stop()


def test_any_replica_tells_of_a_probe_and_cancels_it(replicas: list[ServiceProcess], redis_server: RedisServer) -> None:
    with httpx.Client(base_url=replicas[0].url) as here, httpx.Client(base_url=replicas[1].url) as there:
        identity = start(here, 65, max_eps=20)
        told = events(there, identity)
        assert told[-1][1] == "done"
        assert ended(there, identity)["result"] == ended(here, identity)["result"]
        long = start(here, 66, **LONG)
        until(lambda: there.get(f"/probes/{long}").json().get("status") == "running")
        assert there.delete(f"/probes/{long}").status_code == 204
        assert ended(here, long, 5)["status"] == "cancelled"
        until(lambda: here.get("/probes").json() == there.get("/probes").json())
        listed = there.get("/probes").json()
        assert [(row["id"], row["status"]) for row in listed["probes"]] == [(long, "cancelled"), (identity, "done")]
        # What somebody else writes there is not told.
        other = redis_client.Redis(port=redis_server.port)
        other.hset(f"ironclip:probe:{identity}", "failed", '0 [1000, "failed", {"error": {}}]')
        assert there.get(f"/probes/{identity}").json()["status"] == "done"
        # Without Redis a probe is still told of where it runs.
        redis_server.kill()
        last = start(here, 67, eps=[3])
        assert ended(here, last)["status"] == "done"
        # Elsewhere it is not known what became of it, which is not to say that there is none.
        for method, path in (("GET", last), ("GET", f"{last}/events"), ("DELETE", last)):
            answer = there.request(method, f"/probes/{path}")
            assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
            assert int(answer.headers["retry-after"]) >= 1
        assert there.get("/probes").json() == {"probes": [], "partial": True}
        assert [row["id"] for row in here.get("/probes").json()["probes"]] == [last, long, identity]


def test_a_replica_that_is_killed_takes_its_probes_along_and_redis_alone_does_not(
    replicas: list[ServiceProcess], redis_server: RedisServer
) -> None:
    endless = {"objective": "embedding", "cosine_below": -1, "effort": "thorough"}
    with (
        httpx.Client(base_url=replicas[0].url) as here,
        httpx.Client(base_url=replicas[1].url) as there,
        ThreadPoolExecutor(2) as pool,
    ):
        short = start(here, 68, **endless, seconds=8)
        long = start(here, 69, **endless, seconds=60)
        followed = pool.submit(events, there, short)
        until(lambda: there.get(f"/probes/{long}").json().get("status") == "running")
        # A Redis that says nothing for a while ends no stream, and makes nobody doubt the replica.
        redis_server.send(signal.SIGSTOP)
        time.sleep(3)
        redis_server.send(signal.SIGCONT)
        assert followed.result(60)[-1][1] == "done"
        until(lambda: there.get(f"/probes/{long}").status_code == 200)
        assert there.get(f"/probes/{long}").json()["status"] == "running"
        followed = pool.submit(events, there, long)
        replicas[0].process.kill()
        told = followed.result(60)
        assert told[-1][1] == "failed"
        form = there.get(f"/probes/{long}").json()
        assert (form["status"], form["error"]["code"]) == ("failed", "not-ready")
        assert "is gone" in form["error"]["detail"]
        over = there.get(f"/probes/{long}/events", headers={"Last-Event-ID": str(told[-1][0])})
        assert over.status_code == 204
        assert there.get(f"/probes/{short}").json()["status"] == "done"  # it had ended
