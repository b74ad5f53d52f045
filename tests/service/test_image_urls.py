"""Pictures by URL: the good way over real TLS, and everything that a hostile URL, name server or host may try."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import trustme
from starlette.testclient import TestClient

from ironclip.errors import InputTooLarge
from service.app import create_app
from service.container import ImageLimits
from service.forms import Picture
from service.image_addresses import read_rule
from service.image_urls import ImageUrls
from service.settings import Settings
from tests.service.conftest import ServiceProcess, as_base64, launch_service, metric, picture, until

LIMITS = ImageLimits(max_bytes=100_000, urls=True)
LOOPBACK = [ip_network("127.0.0.0/8")]
LABELS = ["one", "two"]
PICTURE = picture(1)


class Host:
    """A web server on loopback, with TLS if it is given a certificate; what it answers stands in `pages`."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, headers, body = host.pages.get(self.path.partition("?")[0], (404, {}, b"no"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port: int = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def put(self, path: str, body: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = (status, {"Content-Type": kind, **named} if kind else named, body)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@contextlib.contextmanager
def raw_server(speak: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that says what `speak` says, byte by byte; yields its port."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(4096)
                speak(self.request)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def names(*answers: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """A name server that gives these answers one after the other, the last for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def fetch(
    url: str | list[str], port: int, *, resolve: Any = None, networks: Any = LOOPBACK, hold: Any = None, **options: Any
) -> list[Picture]:
    """Fetch with `pictures.test` and everything below `.pictures.test` allowed."""
    given = [url] if isinstance(url, str) else url

    async def run() -> list[Picture]:
        rules = [read_rule(f"pictures.test:{port}"), read_rule(f".pictures.test:{port}")]
        chosen: dict[str, Any] = {"plain": True, "limits": LIMITS, "seconds": 5.0, **options}
        urls = ImageUrls(rules, networks, resolve=resolve or names(["127.0.0.1"]), **chosen)
        try:
            pictures = [Picture(url=one, pointer=f"/images/{i}") for i, one in enumerate(given)]
            return await urls.pictures(pictures, hold or (lambda size: None))
        finally:
            await urls.close()

    return asyncio.run(run())


def code(found: list[Picture]) -> str:
    (one,) = found
    assert one.error is not None
    assert one.data == b""
    return one.error.code


def test_a_picture_is_fetched_once_and_nothing_of_ours_is_told(host: Host) -> None:
    host.put("/a.png", PICTURE)
    base = f"http://pictures.test:{host.port}"
    first, again, inline = fetch([f"{base}/a.png?x=1", f"{base}/a.png?x=1", f"{base}/b.png"], host.port)
    assert first.data == again.data == PICTURE
    assert first.digest and first.pointer == "/images/0" and again.pointer == "/images/1"  # noqa: PT018
    assert inline.error is not None
    assert inline.error.code == "image-url-failed"
    assert inline.error.pointer == "/images/2"
    path, headers = host.asked[0]
    assert path == "/a.png?x=1"
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding"}
    assert headers["host"] == f"pictures.test:{host.port}"


def test_a_name_server_that_changes_its_mind_changes_nothing(host: Host) -> None:
    """The answer that was allowed is the one that is dialled: the next one, the host itself, is never asked for."""
    host.put("/a.png", PICTURE)
    asked: list[str] = []

    async def rebinding(name: str, port: int) -> list[str]:
        asked.append(name)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]

    url = f"http://pictures.test:{host.port}/a.png"
    public = [ip_network("127.0.0.2/32")]  # stands for it: nobody listens there, and nothing is sent out
    found = fetch(url, host.port, resolve=rebinding, networks=public)
    assert code(found) == "image-url-failed"
    assert asked == ["pictures.test"]
    assert host.asked == []
    # And the other way round: by the time of the second question, the answer is looked at again.
    assert code(fetch(url, host.port, resolve=rebinding, networks=public)) == "image-url-refused"
    assert host.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["::1"],
        ["::ffff:127.0.0.1"],
        ["169.254.169.254"],
        ["fe80::1%lo"],
    ],
)
def test_one_private_answer_is_enough_to_dial_none(answer: list[str], host: Host) -> None:
    host.put("/a.png", PICTURE)
    found = fetch(f"http://pictures.test:{host.port}/a.png", host.port, resolve=names(answer), networks=[])
    assert code(found) == "image-url-refused"
    assert host.asked == []


def test_redirects_are_looked_at_like_the_first_url(host: Host) -> None:
    base = f"http://pictures.test:{host.port}"
    host.put("/a.png", PICTURE)
    host.put("/0", b"", status=302, Location="/1")
    host.put("/1", b"", status=307, Location=f"http://www.pictures.test:{host.port}/2")
    host.put("/2", b"", status=301, Location=f"//pictures.test:{host.port}/a.png")
    host.put("/more", b"", status=302, Location="/0")
    assert fetch(f"{base}/0", host.port)[0].data == PICTURE
    assert code(fetch(f"{base}/more", host.port)) == "image-url-failed"
    asked = len(host.asked)
    for target in (
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:127.0.0.1]/",
        f"http://127.0.0.1:{host.port}/a.png",
        f"http://evil.test:{host.port}/a.png",
        f"http://user@pictures.test:{host.port}/a.png",
        "file:///etc/passwd",
    ):
        host.put("/away", b"", status=302, Location=target)
        assert code(fetch(f"{base}/away", host.port)) == "image-url-refused", target
    assert len(host.asked) == asked + 6, "only the redirects themselves were asked for"


def test_every_refusal_reads_the_same(host: Host) -> None:
    """Whether a name is not on the list, or on it and inside, is not to be told apart."""
    base = f"http://pictures.test:{host.port}"
    errors = [
        *fetch(["http://evil.test/", "https://x@y/", "gopher://a/", f"{base}0/"], host.port),
        *fetch(f"{base}/", host.port, networks=[]),
        *fetch(f"{base}/", host.port, plain=False),
    ]
    assert len({(one.error.code, one.error.detail) for one in errors if one.error is not None}) == 1
    assert all(one.error is not None for one in errors)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PICTURE, {"kind": "text/html"}),
        (PICTURE, {"kind": "application/json"}),
        (PICTURE, {"kind": "image/png", "Content_Encoding": "gzip"}),
        (PICTURE, {"status": 500}),
        (PICTURE, {"status": 404}),
        (PICTURE, {"status": 206}),
        (PICTURE, {"status": 302}),
    ],
)
def test_what_is_no_picture_by_its_headers_is_not_read(body: bytes, headers: dict[str, Any], host: Host) -> None:
    host.put("/a", body, **headers)
    assert code(fetch(f"http://pictures.test:{host.port}/a", host.port)) == "image-url-failed"


def test_what_is_no_picture_by_its_bytes_is_told_as_ever(host: Host) -> None:
    host.put("/a", b"GIF89a" + bytes(50))
    assert code(fetch(f"http://pictures.test:{host.port}/a", host.port)).startswith("image-")
    host.put("/b", PICTURE, kind="")
    assert fetch(f"http://pictures.test:{host.port}/b", host.port)[0].data == PICTURE


def test_a_body_without_end_is_cut_and_a_long_one_not_begun(host: Host) -> None:
    sent = 0

    def endless(connection: socket.socket) -> None:
        nonlocal sent
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
        while True:
            sent += connection.send(bytes(65536))

    with raw_server(endless) as port:
        assert code(fetch(f"http://pictures.test:{port}/", port)) == "image-too-large"
    assert sent < 20_000_000
    host.put("/long", bytes(200_000))
    assert code(fetch(f"http://pictures.test:{host.port}/long", host.port)) == "image-too-large"


def test_a_slow_drip_ends_when_the_time_is_up() -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5000\r\n\r\n")
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    def silence(connection: socket.socket) -> None:
        time.sleep(30)

    def informs(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            time.sleep(0.01)

    for speak in (drip, silence, informs):
        with raw_server(speak) as port:
            began = time.monotonic()
            assert code(fetch(f"http://pictures.test:{port}/", port, seconds=0.5)) == "image-url-failed"
            assert time.monotonic() - began < 10


def test_what_is_not_http_or_not_there_is_the_other_sides_fault() -> None:
    with raw_server(lambda connection: connection.sendall(b"SSH-2.0-x\r\n\r\n")) as port:
        assert code(fetch(f"http://pictures.test:{port}/", port)) == "image-url-failed"
    assert code(fetch(f"http://pictures.test:{port}/", port)) == "image-url-failed"  # nobody listens now

    async def unknown(name: str, number: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    assert code(fetch(f"http://pictures.test:{port}/", port, resolve=unknown)) == "image-url-failed"
    assert code(fetch(f"http://pictures.test:{port}/", port, resolve=names([]))) == "image-url-failed"


def test_what_is_fetched_counts_like_what_is_sent(host: Host) -> None:
    host.put("/a.png", PICTURE)
    held = 0

    def hold(size: int) -> None:
        nonlocal held
        held += size
        if held > len(PICTURE) * 2:
            raise InputTooLarge("enough")

    urls = [f"http://pictures.test:{host.port}/a.png?{i}" for i in range(5)]
    with pytest.raises(InputTooLarge):
        fetch(urls, host.port, hold=hold)
    held = 0
    assert len(fetch(urls[:2], host.port, hold=hold)) == 2
    assert held == 2 * len(PICTURE)


def test_one_request_does_not_take_all_places() -> None:
    """Sixteen places, and a request of thirty slow pictures has four of them."""
    now, most, lock = 0, 0, threading.Lock()

    def slow(connection: socket.socket) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        connection.sendall(b"HTTP/1.1 404 no\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with raw_server(slow) as port:
        fetch([f"http://pictures.test:{port}/{i}" for i in range(30)], port)
    assert 2 <= most <= 4


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def _context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def secure(authority: trustme.CA) -> Iterator[Host]:
    host = Host(_context(authority, "localhost"))
    yield host
    host.close()


@pytest.fixture(scope="module")
def fetching(
    secure: Host, authority: trustme.CA, tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """A service that may fetch from `localhost`, and trusts an authority of its own; a proxy is named, and not used."""
    folder = tmp_path_factory.mktemp("fetching")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(folder / "ca.pem"))
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        service = launch_service(
            folder,
            encoders=f"tiny={tiny_artifact}",
            log_format="json",
            image_url_hosts=f"localhost:{secure.port}",
            image_url_networks="127.0.0.0/8,::1/128",
            max_body_bytes=100_000,
        )
    try:
        service.wait_ready()
        yield service
    finally:
        service.stop()


def test_the_certificate_has_to_be_the_names(
    authority: trustme.CA, secure: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is dialled, and the name is what TLS asks for: another name's certificate is not taken for it."""
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    right, plain = Host(_context(authority, "pictures.test")), Host()
    try:
        for one in (right, secure, plain):
            one.put("/a.png", PICTURE)
        asked = len(secure.asked)
        url = f"https://pictures.test:{right.port}/a.png"
        assert code(fetch(url, right.port)) == "image-url-failed"  # nobody knows the authority
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert fetch(url, right.port, plain=False)[0].data == PICTURE
        assert right.asked[0][1]["host"] == f"pictures.test:{right.port}"
        assert code(fetch(f"https://pictures.test:{secure.port}/a.png", secure.port)) == "image-url-failed"
        assert code(fetch(f"https://pictures.test:{plain.port}/a.png", plain.port)) == "image-url-failed"
        assert len(secure.asked) == asked
    finally:
        right.close()
        plain.close()


def test_pictures_by_url_wherever_a_picture_is_a_text(fetching: ServiceProcess, secure: Host) -> None:
    secure.put("/one.png", picture(5))
    url = f"https://localhost:{secure.port}/one.png"
    with httpx.Client(base_url=fetching.url, timeout=30, trust_env=False) as client:
        sent = client.post("/classify", json={"image": as_base64(picture(5)), "labels": LABELS}).json()
        answer = client.post("/classify", json={"image": url, "labels": LABELS})
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"] == sent["predictions"]
        assert answer.headers["cache-status"] == "ironclip; hit"  # the same bytes, however they came
        assert "fetch;dur=" in answer.headers["server-timing"]
        # Another picture under the same URL has its own answer.
        secure.put("/one.png", picture(6))
        other = client.post("/classify", json={"image": url, "labels": LABELS})
        assert other.json()["predictions"] != sent["predictions"]
        mixed = client.post(
            "/classify", json={"images": [as_base64(picture(6)), url, "https://evil.test/"], "labels": LABELS}
        )
        inline, by_url, refused = mixed.json()
        assert inline["predictions"] == by_url["predictions"] == other.json()["predictions"]
        assert refused["error"]["code"] == "image-url-refused"
        assert refused["error"]["errors"][0]["pointer"] == "/images/2"
        vector = client.post("/embed", json={"images": [url, as_base64(picture(6))]}).json()["images"]
        assert vector[0]["embedding"] == vector[1]["embedding"]
        part = {"type": "image_url", "image_url": {"url": url}}
        openai = client.post("/v1/embeddings", json={"model": "tiny", "input": [part]}).json()
        assert openai["data"][0]["embedding"] == vector[0]["embedding"]
        form = client.post("/classify", files=[("image", (None, url)), *[("labels", (None, x)) for x in LABELS]])
        assert form.json()["predictions"] == other.json()["predictions"]
        probe = client.post("/attack-probe", json={"image": url, "labels": LABELS, "eps": [1], "gradients": 10})
        assert probe.status_code == 200, probe.text
        assert all("localhost" not in line for line in fetching.log.read_text().splitlines() if "audit" in line)


def test_nothing_is_fetched_for_whom_there_is_no_room(host: Host, tiny_artifact: Path, tmp_path: Path) -> None:
    """A replica that has too much to do would load pictures in vain, and answer 429 then."""
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=tmp_path,
        max_queue=4,
        max_probes=1,
        image_url_hosts=(f"localhost:{host.port}",),
        image_url_networks=("127.0.0.0/8", "::1/128"),
        image_url_http=True,
    )
    app = create_app(settings)
    host.put("/a.png", PICTURE)
    url = f"http://localhost:{host.port}/a.png"
    part = {"type": "image_url", "image_url": {"url": url}}
    asked = {
        "/classify": {"images": [url], "labels": LABELS},
        "/embed": {"images": [url]},
        "/v1/embeddings": {"input": [part]},
    }
    with TestClient(app) as client:
        until(lambda: client.get("/readyz").status_code == 200, 60)
        with app.state.service.encoder("tiny").images.reserve(4):
            for path, form in asked.items():
                answer = client.post(path, json=form)
                assert answer.status_code == 429, (path, answer.text)
                assert "IRONCLIP_MAX_QUEUE" in answer.text
                assert int(answer.headers["retry-after"]) >= 1
            assert host.asked == []
        for path, form in asked.items():
            assert client.post(path, json=form).status_code == 200
        assert len(host.asked) == len(asked)
        endless = {"objective": "embedding", "cosine_below": -1, "gradients": 50_000, "seconds": 60}
        form = {"image": as_base64(picture(1)), **endless}
        started = client.post("/attack-probe", json=form, headers={"Prefer": "respond-async"}).json()["id"]
        answer = client.post("/attack-probe", json={"image": url, "labels": LABELS})
        assert answer.status_code == 429
        assert "IRONCLIP_MAX_PROBES" in answer.text
        assert len(host.asked) == len(asked)
        assert client.delete(f"/probes/{started}").status_code == 204


def test_faults_of_urls_have_their_codes(fetching: ServiceProcess, secure: Host) -> None:
    bad = {
        f"https://localhost:{secure.port}/nothing": (424, "image-url-failed"),
        "https://localhost/one.png": (422, "image-url-refused"),
        f"http://localhost:{secure.port}/one.png": (422, "image-url-refused"),
        f"https://127.0.0.1:{secure.port}/one.png": (422, "image-url-refused"),
        f"https://user@localhost:{secure.port}/one.png": (422, "image-url-refused"),
        "file:///etc/passwd": (422, "image-url-refused"),
        "/etc/passwd": (422, "image-invalid"),
        "file:/etc/passwd": (422, "image-invalid"),
    }
    for url, expected in bad.items():
        answer = httpx.post(f"{fetching.url}/classify", json={"image": url, "labels": LABELS}, timeout=30)
        assert (answer.status_code, answer.json()["code"]) == expected, url
        assert url not in answer.text
    secure.put("/long.png", picture(1) + bytes(90_000))
    urls = [f"https://localhost:{secure.port}/long.png?{i}" for i in range(3)]
    answer = httpx.post(f"{fetching.url}/classify", json={"images": urls, "labels": LABELS}, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (413, "input-too-large")
    binary = {"name": "images", "datatype": "BYTES", "shape": [1], "data": [f"https://localhost:{secure.port}/one.png"]}
    protocol = httpx.post(f"{fetching.url}/v2/models/tiny/infer", json={"inputs": [binary]}, timeout=30)
    assert protocol.status_code == 422
    assert "not fetched" in cast(str, protocol.json()["error"])
    assert metric(fetching.url, 'ironclip_image_urls_total{result="refused"}') >= 5
    log = fetching.log.read_text()
    assert "localhost:" not in log.replace("127.0.0.1", "")
    assert "/one.png" not in log
    assert '"reason":"scheme"' in log


def test_without_hosts_no_url_is_fetched(client: httpx.Client, secure: Host) -> None:
    asked = len(secure.asked)
    answer = client.post("/classify", json={"image": f"https://localhost:{secure.port}/one.png", "labels": LABELS})
    assert (answer.status_code, answer.json()["code"]) == (422, "image-unsupported")
    assert len(secure.asked) == asked
