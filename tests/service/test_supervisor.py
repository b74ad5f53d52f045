"""A model worker that dies, hangs, has no memory, or is broken: the service tells it, mends it, or ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.service import faulty
from tests.service.conftest import ServiceProcess, as_base64, launch_service, metric, until

LABELS = ["a", "b"]


@pytest.fixture(scope="module")
def faulty_service(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """A service whose model has faults for pictures of some colours."""
    service = launch_faulty(
        tmp_path_factory.mktemp("faulty"),
        encoders=f"tiny={tiny_artifact}",
        worker_timeout_seconds=1.5,
        worker_restarts=3,
        probes=0,
        cache_bytes=0,
    )
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


def launch_faulty(folder: Path, **settings: object) -> ServiceProcess:
    return launch_service(folder, module="tests.service.faulty", **settings)


async def ask(url: str, pictures: list[bytes], **more: object) -> list[httpx.Response]:
    """One request for each picture, all at once."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        forms = [{"image": as_base64(data), "labels": LABELS, **more} for data in pictures]
        return list(await asyncio.gather(*(client.post("/classify", json=form) for form in forms)))


def good(count: int) -> list[bytes]:
    return [faulty.picture(10, green, 50) for green in range(count)]


def restarts(service: ServiceProcess, reason: str) -> float:
    return metric(service.url, f'ironclip_worker_restarts_total{{encoder="tiny",reason="{reason}",tower="image"}}')


def ready(service: ServiceProcess) -> bool:
    return httpx.get(f"{service.url}/readyz").status_code == 200


def test_a_death_loses_only_the_picture_that_caused_it(faulty_service: ServiceProcess) -> None:
    answers = asyncio.run(ask(faulty_service.url, [*good(4), faulty.picture(faulty.DIES), *good(8)[4:]]))
    assert [answer.status_code for answer in answers] == [200] * 4 + [503] + [200] * 4
    assert answers[4].json()["code"] == "not-ready"
    assert int(answers[4].headers["retry-after"]) >= 1
    until(lambda: ready(faulty_service))
    assert restarts(faulty_service, "died") >= 1
    (again,) = asyncio.run(ask(faulty_service.url, good(1)))
    assert again.json()["predictions"] == answers[0].json()["predictions"]


def test_a_hang_is_seen_and_the_next_are_answered(faulty_service: ServiceProcess) -> None:
    (lost,) = asyncio.run(ask(faulty_service.url, [faulty.picture(faulty.HANGS)]))
    assert (lost.status_code, lost.json()["code"]) == (503, "not-ready")
    assert "hung" in lost.json()["detail"]
    until(lambda: ready(faulty_service))
    assert restarts(faulty_service, "hung") == 1
    assert {answer.status_code for answer in asyncio.run(ask(faulty_service.url, good(8)))} == {200}
    assert httpx.get(f"{faulty_service.url}/livez").status_code == 200


def test_a_picture_that_the_model_does_not_like_fails_alone(faulty_service: ServiceProcess) -> None:
    pictures = [faulty.picture(faulty.RAISES, green) for green in range(4)]
    answers = asyncio.run(ask(faulty_service.url, [*pictures, *good(4)]))
    assert [answer.status_code for answer in answers] == [500] * 4 + [200] * 4
    for green in range(10):  # nothing but faults, one after another: the worker is looked at, and found well
        asyncio.run(ask(faulty_service.url, [faulty.picture(faulty.RAISES, 100 + green)]))
    until(lambda: ready(faulty_service))
    assert restarts(faulty_service, "fails") == 0


def test_pictures_that_memory_does_not_suffice_for_together_are_answered(faulty_service: ServiceProcess) -> None:
    pictures = [faulty.picture(faulty.NO_MEMORY, green) for green in range(4)]
    form = {"images": [as_base64(data) for data in pictures], "labels": LABELS}
    answer = httpx.post(f"{faulty_service.url}/classify", json=form, timeout=30)
    assert answer.status_code == 200
    assert all("predictions" in one for one in answer.json())
    assert metric(faulty_service.url, 'ironclip_batch_limit{encoder="tiny",tower="image"}') < 32


def test_a_decoder_that_is_stuck_is_told_and_ends_the_process(tiny_artifact: Path, tmp_path: Path) -> None:
    service = launch_faulty(
        tmp_path,
        encoders=f"tiny={tiny_artifact}",
        decode_workers=2,
        max_pixels=1_000_000,
        worker_timeout_seconds=8,
        drain_seconds=1,
        probes=0,
    )

    def ask(data: bytes, milliseconds: int) -> httpx.Response:
        form = {"image": as_base64(data), "labels": LABELS}
        limit = {"X-Request-Timeout-Ms": str(milliseconds)}
        return httpx.post(f"{service.url}/classify", json=form, headers=limit, timeout=60)

    try:
        service.wait_ready()
        assert ask(faulty.picture(faulty.STICKS, 1), 500).status_code == 504
        for green in range(3):  # a thread is left
            assert ask(faulty.picture(10, green), 30_000).status_code == 200
        assert ready(service)
        assert ask(faulty.picture(faulty.STICKS, 2), 500).status_code == 504
        assert ask(faulty.picture(10, 4), 500).status_code == 504
        until(lambda: not ready(service))
        assert "pictures are not being decoded" in httpx.get(f"{service.url}/readyz").json()["reason"]
        assert metric(service.url, "ironclip_ready") == 0
        assert service.process.wait(60) == 4
        assert "the decoder hangs" in service.log.read_text()
    finally:
        service.stop()


def test_what_no_restart_mends_ends_the_process(faulty_service: ServiceProcess) -> None:
    """The last test of the module: the service is gone afterwards."""
    broken = [faulty.picture(faulty.BROKEN_FOR_GOOD, green) for green in range(3)]
    for data in broken:
        (answer,) = asyncio.run(ask(faulty_service.url, [data]))
        assert answer.status_code in (500, 503)
    assert faulty_service.process.wait(60) == 4
    log = faulty_service.log.read_text()
    assert "the image worker of tiny fails" in log
    assert log.count('"worker restarted"') >= 3
