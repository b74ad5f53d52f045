"""Lists of items: what is an item's own stays with it, what is the service's ends the request, and is not paid for."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from ironclip.errors import DeadlineExceeded, ImageInvalid, LabelError, NotReady, OutOfMemory
from service import telemetry
from service.app import create_app
from service.settings import Settings
from service.together import fault_of, is_paid_for
from tests.service import faulty
from tests.service.conftest import (
    ServiceProcess,
    as_base64,
    launch_service,
    make_key,
    picture,
    until,
    write_keys,
)

LABELS = ["a", "b"]


@pytest.fixture(scope="module")
def limited(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServiceProcess, str]]:
    """A service whose model has faults for pictures of some colours, and a key whose points come back slowly."""
    folder = tmp_path_factory.mktemp("limited")
    made = {
        "paying": make_key("paying1", "acme", "infer", points_per_minute=1, burst=10_000),
        "watcher": make_key("watcher1", "", "metrics"),
    }
    keys = write_keys(folder / "keys.toml", made)
    service = launch_service(
        folder,
        module="tests.service.faulty",
        encoders=f"tiny={tiny_artifact}",
        keys_file=folder / "keys.toml",
        worker_timeout_seconds=1.5,
        worker_restarts=50,
        probes=0,
    )
    try:
        service.wait_ready()
        yield service, keys["paying"]
    finally:
        service.stop()


@pytest.fixture
def client(limited: tuple[ServiceProcess, str]) -> Iterator[httpx.Client]:
    service, key = limited
    until(lambda: httpx.get(f"{service.url}/readyz").status_code == 200)
    with httpx.Client(base_url=service.url, headers={"x-api-key": key}, timeout=30) as client:
        # So that the labels' texts, which are paid for once, are there.
        client.post("/classify", json={"image": as_base64(faulty.picture(10)), "labels": LABELS})
        yield client


def left(client: httpx.Client) -> int:
    """Points left of the key."""
    form = re.match(r'"points";r=(\d+)', client.get("/models").headers["ratelimit"])
    assert form is not None
    return int(form.group(1))


def spent(client: httpx.Client, before: int) -> int:
    """Points spent since, for lists of four pictures or none: one or two may have come back by time."""
    return 4 * math.ceil((before - left(client)) / 4)


def ask(client: httpx.Client, path: str, pictures: list[bytes]) -> httpx.Response:
    """The same list by each of the ways that take one."""
    images = [as_base64(data) for data in pictures]
    forms: dict[str, dict[str, Any]] = {
        "/classify": {"images": images, "labels": LABELS},
        "/embed": {"images": images},
        "/v1/embeddings": {"input": [f"data:image/png;base64,{image}" for image in images]},
        "/v2/models/tiny/infer": {
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [len(images)], "data": images}],
            "parameters": {"labels": LABELS},
        },
    }
    return client.post(path, json=forms[path])


def good(first: int) -> list[bytes]:
    """Three pictures that nobody has sent before."""
    return [faulty.picture(20, first, blue) for blue in range(3)]


PATHS = ["/classify", "/embed", "/v1/embeddings", "/v2/models/tiny/infer"]


@pytest.mark.parametrize("path", PATHS)
def test_a_hang_under_a_list_ends_the_request_and_points_come_back(client: httpx.Client, path: str) -> None:
    before = left(client)
    number = PATHS.index(path)
    answer = ask(client, path, [*good(number), faulty.picture(faulty.HANGS, number)])
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert "hung" in answer.text
    assert spent(client, before) == 0


@pytest.mark.parametrize("path", PATHS)
def test_what_memory_never_suffices_for_is_the_services_lack(client: httpx.Client, path: str) -> None:
    before = left(client)
    number = 10 + PATHS.index(path)
    answer = ask(client, path, [*good(number), faulty.picture(faulty.NEVER_MEMORY, number)])
    assert (answer.status_code, "no memory" in answer.text) == (503, True)
    assert spent(client, before) == 0
    # What was done meanwhile is kept: to ask again for the others costs no second forward.
    if path == "/classify":
        again = ask(client, path, good(number))
        assert (again.status_code, again.headers["cache-status"]) == (200, "ironclip; hit")


def test_a_picture_that_kills_the_worker_keeps_its_error_and_the_others_their_answers(client: httpx.Client) -> None:
    def killing(number: int) -> list[bytes]:
        assert ask(client, "/embed", good(number)).status_code == 200
        time.sleep(0.6)  # the supervisor sees that the worker does well, and makes no pause before the next start
        return [*good(number + 1), faulty.picture(faulty.DIES)]

    pictures, before = killing(20), left(client)
    found = ask(client, "/classify", pictures)
    assert found.status_code == 200, found.text
    assert ["predictions" in one for one in found.json()] == [True, True, True, False]
    error = found.json()[3]["error"]
    assert (error["code"], error["errors"][0]["pointer"]) == ("not-ready", "/images/3")
    assert spent(client, before) == 4
    # Where an answer has no room for one item's error it ends the request, which then costs nothing.
    pictures, before = killing(22), left(client)
    assert ask(client, "/v1/embeddings", pictures).status_code == 503
    assert spent(client, before) == 0
    pictures, before = killing(24), left(client)
    single = client.post("/classify", json={"image": as_base64(pictures[3]), "labels": LABELS})
    assert single.status_code == 503
    assert spent(client, before) == 0


def test_a_broken_picture_keeps_its_error_and_is_paid_for(client: httpx.Client) -> None:
    before = left(client)
    found = ask(client, "/classify", [*good(30), b"\x89PNG\r\n\x1a\n broken"])
    assert [("predictions" in one) for one in found.json()] == [True, True, True, False]
    assert found.json()[3]["error"]["code"] == "image-invalid"
    assert spent(client, before) == 4


def test_which_of_several_faults_is_told() -> None:
    image, text, memory = ImageInvalid("broken"), LabelError("long"), OutOfMemory("none")
    hung, killed, broken = NotReady("hung"), NotReady("stopped"), ValueError("odd")
    killed.by_item = True
    given_up, late = DeadlineExceeded("given up"), DeadlineExceeded("late")
    given_up.unbegun = True
    assert fault_of([1.0, image, text, killed]) is None
    assert fault_of([]) is None
    assert fault_of([image, late, hung, memory]) is hung
    assert fault_of([late, memory]) is memory
    assert fault_of([late, hung, broken]) is broken
    assert fault_of([given_up, image]) is given_up
    assert not is_paid_for(given_up)
    assert fault_of([given_up, 1.0]) is given_up
    assert is_paid_for(given_up)  # a part of it was done


def test_a_list_that_the_queue_gives_up_is_one_request_told_how_to_do_better(
    tiny_artifact: Path, tmp_path: Path
) -> None:
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path, cache_bytes=0)
    app = create_app(settings)
    with TestClient(app) as client:
        deadline = time.monotonic() + 60
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        form = {"images": [as_base64(picture(7000 + i)) for i in range(4)], "labels": LABELS}
        assert client.post("/classify", json=form).status_code == 200  # so that the texts are there
        # A machine that has become so slow that nothing can be in time: one is tried all the same, three are not begun.
        for _ in range(60):
            app.state.service.encoder("tiny").images.pace.observe(1, 1e9)
        dropped, expired = telemetry.DROPPED.labels("deadline"), telemetry.EXPIRED.labels("image")
        before = dropped._value.get(), expired._value.get()
        answer = client.post("/classify", json=form, headers={"x-request-timeout-ms": "20000"})
        problem = answer.json()
        assert (answer.status_code, problem["code"], problem["limit"]) == (504, "deadline-exceeded", 20_000)
        assert problem["retry_after_ms"] > 0
        assert int(answer.headers["retry-after"]) >= 1
        assert "IRONCLIP_REQUEST_TIMEOUT_MS" in problem["detail"]
        assert (dropped._value.get() - before[0], expired._value.get() - before[1]) == (1, 3)
