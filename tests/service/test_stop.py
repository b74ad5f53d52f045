"""A stop signal: what is in hand is answered, whoever asks is told, and the process ends with 0."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn

from service import telemetry
from service.__main__ import _Server
from service.app import create_app
from service.settings import Settings
from tests.service import faulty
from tests.service.conftest import ServiceProcess, as_base64, launch_service, metric, until

IN_HAND = 12


@pytest.fixture(params=[0, 3], ids=["at once", "after a delay"])
def service(request: pytest.FixtureRequest, tiny_artifact: Path, tmp_path: Path) -> Iterator[ServiceProcess]:
    """A service whose model waits for `faulty.let_go`, with a delay before the port closes or without one."""
    started = launch_service(
        tmp_path,
        module="tests.service.faulty",
        encoders=f"tiny={tiny_artifact}",
        drain_delay_seconds=request.param,
        drain_seconds=120,
        request_timeout_ms=120_000,
        max_batch=4,
    )
    try:
        started.wait_ready()
        yield started
    finally:
        faulty.let_go(tmp_path)
        started.stop()


def listens(service: ServiceProcess) -> bool:
    try:
        socket.create_connection(("127.0.0.1", service.port), 10).close()
    except ConnectionRefusedError:
        return False
    return True


def test_what_is_in_hand_when_the_port_closes_is_answered(
    service: ServiceProcess, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """More than a batch of it: some is with the model, some waits for it, and none is answered before."""
    answers: list[httpx.Response] = []

    def ask(green: int) -> None:
        form = {"image": as_base64(faulty.picture(faulty.WAITS, green)), "labels": ["a", "b"]}
        answers.append(httpx.post(f"{service.url}/classify", json=form, timeout=180))

    with ThreadPoolExecutor(IN_HAND) as pool:
        asked = [pool.submit(ask, green) for green in range(IN_HAND)]
        queued = 'ironclip_queue_items{encoder="tiny",tower="image"}'
        # All have been decoded, and the model has taken some.
        until(lambda: metric(service.url, "ironclip_decode_seconds_count") == IN_HAND)
        until(lambda: 0 < metric(service.url, queued) < IN_HAND)
        service.process.send_signal(signal.SIGTERM)
        if "after a delay" in request.node.name:
            until(lambda: httpx.get(f"{service.url}/readyz").status_code == 503)
            assert httpx.get(f"{service.url}/readyz").json()["reason"] == "draining"
            assert httpx.get(f"{service.url}/livez").status_code == 200
        until(lambda: not listens(service))
        time.sleep(0.5)
        assert service.process.poll() is None
        assert answers == []
        faulty.let_go(tmp_path)
        for one in asked:
            one.result(60)
    assert [answer.status_code for answer in answers] == [200] * IN_HAND
    assert all(answer.json()["predictions"] for answer in answers)
    assert service.process.wait(30) == 0
    assert "Traceback" not in service.log.read_text()


def test_a_signal_takes_no_lock(tiny_artifact: Path, tmp_path: Path) -> None:
    """It may come while the very thread that it is handled in holds one, a metric's say: it would wait for ever."""
    settings = Settings(encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    app = create_app(settings)
    server = _Server(uvicorn.Config(app), app.state.service, settings)

    async def scenario() -> None:
        with telemetry.READY._value._lock:
            interrupted = threading.Thread(target=handle, args=(asyncio.get_running_loop(),), daemon=True)
            interrupted.start()
            interrupted.join(10)
            assert not interrupted.is_alive()
        while not server.should_exit:
            await asyncio.sleep(0.01)
        assert app.state.service.not_ready() == "draining"

    def handle(loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        server.handle_exit(signal.SIGTERM, None)

    asyncio.run(asyncio.wait_for(scenario(), 30))
