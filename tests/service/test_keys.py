"""API keys: which routes they open, in which forms they are read, how they change, and that no log has them."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import SecretStr, ValidationError
from starlette.routing import Route
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from service.__main__ import main
from service.access import ACCESS, PUBLIC, operation
from service.app import ROUTERS, create_app
from service.keys import SCOPES, Keyring, parse_keys
from service.settings import Settings, SettingsInvalid
from tests.service.conftest import (
    ROOT,
    Locked,
    as_base64,
    free_port,
    make_key,
    metric,
    picture,
    write_keys,
)

LABELS = ["carrot", "rocket"]
Run = Callable[..., tuple[int, str, str]]


def settings_of(keys_file: Path, **others: object) -> Settings:
    return Settings(keys_file=keys_file, encoders={"demo": "demo"}, state_dir=keys_file.parent, **others)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> tuple[TestClient, dict[str, str]]:
    """The app with a key for each scope; its encoders are never loaded, so what is let through answers 503 or 4xx."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    keys = write_keys(path, {scope: make_key(f"{scope}1", "acme", scope) for scope in SCOPES})
    return TestClient(create_app(settings_of(path)), raise_server_exceptions=False), keys


def routes() -> list[tuple[str, str]]:
    """Method and path of every route of the app."""
    found = [*create_app(Settings()).routes, *(route for router in ROUTERS for route in router.routes)]
    every = [route for route in found if isinstance(route, Route)]
    return sorted({(method, one.path) for one in every for method in (one.methods or set()) - {"HEAD"}})


def test_every_route_is_in_the_table() -> None:
    missing = [f"{method} {path}" for method, path in routes() if operation(method, path) not in ACCESS]
    assert not missing, "enter them into ACCESS (service/access.py), or nobody with an API key may use them"
    documented = create_app(Settings()).openapi()["paths"]
    known = {path for _, path in routes()}
    assert set(documented) <= known, "routes that access does not see"


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_is_closed_without_the_scope_it_needs(
    stack: tuple[TestClient, dict[str, str]], method: str, path: str
) -> None:
    client, keys = stack
    needed = ACCESS[operation(method, path)]
    url = re.sub(r"{[^}]*}", "x", path)
    answer = client.request(method, url)
    if needed == PUBLIC:
        assert answer.status_code not in (401, 403)
        return
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer realm=")
    assert is_key_error(path, answer, "key-missing")
    for scope, key in keys.items():
        answer = client.request(method, url, headers={"x-api-key": key})
        if scope in needed:
            assert answer.status_code not in (401, 403), scope
        else:
            assert answer.status_code == 403, scope
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
            assert is_key_error(path, answer, "scope-missing")


def is_key_error(path: str, answer: httpx.Response, code: str) -> bool:
    """Whether the refusal has the form that belongs to the path."""
    form = answer.json()
    if path.startswith("/v1/"):
        return bool(form["error"]["code"] == code)
    if path.startswith("/v2"):
        return isinstance(form["error"], str)
    return answer.headers["content-type"] == "application/problem+json" and form["code"] == code


@pytest.mark.parametrize(
    "path", ["/nowhere", "/models/", "/v1/nothing", "/v2/models/x/nothing", "/docs/x", "/x//y", "/%2e"]
)
def test_a_path_that_is_not_there_is_told_to_those_with_a_key_alone(
    stack: tuple[TestClient, dict[str, str]], path: str
) -> None:
    client, keys = stack
    without = client.get(path)
    assert without.status_code == 401
    assert is_key_error(path, without, "key-missing")
    assert client.get(path, headers={"x-api-key": keys["infer"]}).status_code in (403, 404)


def test_another_method_of_a_closed_path_is_closed_too(stack: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = stack
    for method in ("GET", "OPTIONS", "PATCH", "HEAD", "TRACE"):
        assert client.request(method, "/classify").status_code == 401
    assert client.get("/classify", headers={"x-api-key": keys["infer"]}).status_code == 405
    assert client.post("/livez").status_code == 405


def test_a_route_that_is_missing_from_the_table_is_open_to_nobody(
    stack: tuple[TestClient, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, keys = stack
    monkeypatch.delitem(ACCESS, "GET /models")
    monkeypatch.delitem(ACCESS, "GET /livez")
    for key in keys.values():
        assert client.get("/models", headers={"x-api-key": key}).status_code == 403
        assert client.get("/livez", headers={"x-api-key": key}).status_code == 403
    assert client.get("/livez").status_code == 401


def test_a_route_added_behind_the_layers_back_is_open_to_nobody(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.toml", {"all": make_key("all1", "acme", *SCOPES)})
    app = create_app(settings_of(tmp_path / "keys.toml"))
    app.add_api_route("/forgotten", lambda: "secret")
    client = TestClient(app)
    assert client.get("/forgotten").status_code == 401
    assert client.get("/forgotten", headers={"x-api-key": keys["all"]}).status_code == 404


def test_the_forms_in_which_a_key_is_read(locked: Locked) -> None:
    key, other = locked.keys["acme"], locked.keys["beta"]
    identity, secret = key.split("_")[1:]
    for headers in (
        {"authorization": f"Bearer {key}"},
        {"authorization": f"bEARER   {key}"},
        {"x-api-key": key},
        {"x-api-key": key, "authorization": f"Bearer {key}"},
        {"x-api-key": key, "authorization": "Basic abc"},
    ):
        assert httpx.get(f"{locked.url}/models", headers=headers).status_code == 200, headers
    for headers, code in (
        ({}, "key-missing"),
        ({"authorization": f"Basic {key}"}, "key-missing"),
        ({"authorization": key}, "key-missing"),
        ({"x-api-key": ""}, "key-missing"),
        ({"x-api-key": other, "authorization": f"Bearer {key}"}, "key-unknown"),
        ({"x-api-key": f"ick_{identity}_{'0' * 64}"}, "key-unknown"),
        ({"x-api-key": f"ick_nobody_{secret}"}, "key-unknown"),
        ({"x-api-key": f"ick_beta1_{secret}"}, "key-unknown"),
        ({"x-api-key": key.upper()}, "key-unknown"),
        ({"x-api-key": key + "0"}, "key-unknown"),
        ({"x-api-key": secret}, "key-unknown"),
        ({"x-api-key": "x" * 5000}, "key-unknown"),
        ({"x-api-key": locked.keys["expired"]}, "key-expired"),
    ):
        answer = httpx.get(f"{locked.url}/models", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, code), headers
    for query in (f"api_key={key}", f"access_token={key}", f"x-api-key={key}"):
        assert httpx.get(f"{locked.url}/models?{query}").status_code == 401


def test_openais_client_sends_its_key_as_it_always_does(locked: Locked) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=locked.keys["acme"], max_retries=0)
    assert len(client.embeddings.create(model="default", input=["a", "b"]).data) == 2
    wrong = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="ick_acme1_" + "0" * 64, max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="not known"):
        wrong.embeddings.create(model="default", input=["a"])
    prober = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=locked.keys["prober"], max_retries=0)
    with pytest.raises(openai.PermissionDeniedError, match="scope infer"):
        prober.embeddings.create(model="default", input=["a"])


def test_whoever_has_no_key_is_refused_before_the_body_is_read(locked: Locked) -> None:
    head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 50000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", locked.service.port), 10) as sock:
        sock.sendall(head.encode())  # and nothing of the body
        assert b" 401 " in sock.recv(4096).splitlines()[0]


def eventually(condition: Callable[[], bool], seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `python -m service keys` in this process; returns status, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(["keys", *arguments])
        return status, *capsys.readouterr()

    return run


def test_keys_come_and_go_without_a_restart_and_a_broken_file_changes_nothing(locked: Locked, run: Run) -> None:
    def status(key: str) -> int:
        return httpx.get(f"{locked.url}/models", headers={"x-api-key": key}).status_code

    before = locked.keys_file.read_text(encoding="utf-8")
    _, made, _ = run("new", "--tenant", "late", "--append", str(locked.keys_file), "--comment", 'a "late" one')
    key = made.strip()
    assert re.fullmatch(r"ick_[a-z0-9]{10}_[0-9a-f]{64}", key)
    try:
        assert eventually(lambda: status(key) == 200)
        locked.keys_file.write_text("[[keys]\n", encoding="utf-8")
        assert eventually(lambda: metric(locked.metrics_url, "ironclip_keys_file_ok") == 0)
        assert status(key) == 200
        assert "the keys stay as they were" in locked.service.log.read_text()
        locked.keys_file.write_text("", encoding="utf-8")  # may be one that is still being written
        time.sleep(1.5)
        assert status(key) == 200
        locked.keys_file.write_text("keys = []\n", encoding="utf-8")
        assert eventually(lambda: status(key) == 401)
        assert status(locked.keys["acme"]) == 401
        assert metric(locked.metrics_url, "ironclip_keys_file_ok") == 1
    finally:
        locked.keys_file.write_text(before, encoding="utf-8")
    assert eventually(lambda: status(locked.keys["acme"]) == 200)
    assert status(key) == 401
    assert metric(locked.metrics_url, "ironclip_keys_file_ok") == 1


def test_a_mounted_secret_is_another_file_under_the_same_name(tmp_path: Path) -> None:
    """As Kubernetes does it: a link to a folder is replaced, everything else looks the same, times and sizes too."""
    made = [make_key(f"key{i}", "acme", "infer") for i in range(2)]
    for i, (_, entry) in enumerate(made):
        folder = tmp_path / f"..{i}"
        folder.mkdir()
        (folder / "keys.toml").write_text(entry, encoding="utf-8")
        os.utime(folder / "keys.toml", ns=(1, 1))
    (tmp_path / "..data").symlink_to("..0")
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    ring = Keyring(tmp_path / "keys.toml")
    assert ring.caller(made[0][0]).key == "key0"
    (tmp_path / "new").symlink_to("..1")
    (tmp_path / "new").rename(tmp_path / "..data")
    ring.look()
    assert ring.caller(made[1][0]).key == "key1"
    with pytest.raises(Exception, match="not known"):
        ring.caller(made[0][0])
    (tmp_path / "..data").unlink()
    ring.look()
    assert ring.caller(made[1][0]).key == "key1"


def test_the_command_makes_a_key_and_its_entry_and_checks_them(tmp_path: Path, run: Run) -> None:
    asked = ["--tenant", "acme", "--scopes", "infer", "probe", "--points-per-minute", "60", "--expires", "2999-01-31"]
    _, shown, _ = run("new", *asked, "--id", "shop1")
    key = re.search(r"ick_shop1_[0-9a-f]{64}", shown)
    assert key is not None
    entry = shown[shown.index("[[keys]]") :]
    path = tmp_path / "keys.toml"
    path.write_text(entry, encoding="utf-8")
    caller = Keyring(path).caller(key.group())
    assert (caller.tenant, caller.scopes, caller.points_per_minute) == ("acme", {"infer", "probe"}, 60)
    assert caller.burst == 60
    assert key.group().rpartition("_")[2] not in entry
    status, listed, _ = run("check", str(path))
    assert status == 0
    assert "shop1  acme    infer probe  60 a minute, burst 60  2999-01-31 00:00 UTC" in listed
    status, _, fault = run("new", *asked, "--id", "shop1", "--append", str(path))
    assert status == 2
    assert "the id is there twice" in fault
    assert path.read_text(encoding="utf-8") == entry
    status, _, fault = run("check", str(tmp_path / "none.toml"))
    assert (status, "cannot be read" in fault) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--tenant", "Acme Ltd"], "tenant"),
        (["--tenant", "acme", "--burst", "5"], "burst needs points_per_minute"),
        (["--tenant", "acme", "--expires", "soon"], "2027-01-31"),
        (["--tenant", "acme", "--expires", "2020-01-01"], "past"),
        (["--tenant", "acme", "--expires", "2999-01-01T00:00:00"], "time zone"),
        (["--tenant", "acme", "--points-per-minute", "0"], "points_per_minute"),
        (["--tenant", "acme", "--id", "a_b"], "--id"),
        (["--tenant", "acme", "--append", "/nowhere/keys.toml"], "cannot be written to"),
    ],
)
def test_the_command_makes_no_key_that_the_file_could_not_hold(run: Run, arguments: list[str], fault: str) -> None:
    status, shown, said = run("new", *arguments)
    assert status == 2
    assert fault in said
    assert "ick_" not in shown


GOOD = {"id": "good", "sha256": "0" * 64, "tenant": "acme", "scopes": ["infer"]}


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([], "no [[keys]]"),
        ([GOOD | {"scope": "infer"}], "unknown field 'scope'"),
        ([GOOD | {"scopes": []}], "scopes"),
        ([GOOD | {"scopes": ["root"]}], "scopes"),
        ([GOOD | {"sha256": "hunter2"}], "sha256"),
        ([GOOD | {"tenant": "../acme"}], "tenant"),
        ([GOOD, GOOD | {"sha256": "1" * 64}], "the id is there twice"),
        ([GOOD, GOOD | {"id": "other"}], "the sha256 is there twice"),
        ([{name: value for name, value in GOOD.items() if name != "tenant"}], "tenant"),
    ],
)
def test_what_a_keys_file_must_not_hold(entries: list[dict[str, object]], fault: str) -> None:
    def written(value: object) -> str:
        return json.dumps(value)

    text = "\n".join(
        "[[keys]]\n" + "\n".join(f"{name} = {written(value)}" for name, value in entry.items()) for entry in entries
    )
    with pytest.raises(SettingsInvalid) as caught:
        parse_keys(text)
    assert fault in caught.value.detail
    assert "hunter2" not in caught.value.detail


def test_a_file_that_lets_nobody_in_says_so(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("keys = []\n", encoding="utf-8")
    status, said, _ = run("check", str(path))
    assert status == 0
    assert "nobody is let in" in said
    status, shown, fault = run("new", "--tenant", "acme", "--append", str(path))
    assert status == 2
    assert "take that line out first" in fault
    assert "ick_" not in shown


def test_settings_that_would_leave_a_door_open_end_the_program(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    write_keys(path, {"a": make_key("key1", "acme", "infer")})
    with pytest.raises(ValidationError, match="has to be signed"):
        settings_of(path, redis_url="redis://127.0.0.1")
    with pytest.raises(ValidationError, match="at least 32 characters"):
        settings_of(path, redis_url="redis://127.0.0.1", redis_mac_key="short")
    with pytest.raises(ValidationError, match="name the origins"):
        settings_of(path, cors_origins=("*",))
    for origin in ("app.example", "https://app.example/", "https://app.example/path", "null", "https://*.example"):
        with pytest.raises(ValidationError, match="is not an origin"):
            Settings(cors_origins=(origin,))
    with pytest.raises(ValidationError, match="same as port"):
        Settings(port=8000, metrics_port=8000)
    with pytest.raises(SettingsInvalid, match=r"IRONCLIP_KEYS_FILE.*cannot be read, it is not there; `.* keys new"):
        create_app(settings_of(tmp_path / "missing.toml"))


@pytest.mark.parametrize(("host", "level"), [("127.0.0.1", "info"), ("0.0.0.0", "warning")])
def test_a_service_without_keys_is_as_open_as_ever_and_says_so_once(
    tiny_artifact: Path, tmp_path: Path, host: str, level: str
) -> None:
    settings = Settings(host=host, encoders={"tiny": str(tiny_artifact)}, dtype="float32", state_dir=tmp_path)
    with capture_logs() as log, TestClient(create_app(settings)) as client:
        assert client.get("/models", headers={"x-api-key": "ick_whatever"}).status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.get("/nowhere").status_code == 404
    assert [line["log_level"] for line in log if "no API keys" in line["event"]] == [level]


@pytest.mark.parametrize("secret", ["", "m" * 32])
def test_a_redis_whose_values_are_not_signed_is_told_of(tiny_artifact: Path, tmp_path: Path, secret: str) -> None:
    settings = Settings(
        encoders={"tiny": str(tiny_artifact)},
        dtype="float32",
        state_dir=tmp_path,
        redis_url=SecretStr("redis://127.0.0.1:1"),
        redis_mac_key=SecretStr(secret),
    )
    with capture_logs() as log, TestClient(create_app(settings)):
        pass
    said = [line["log_level"] for line in log if "IRONCLIP_REDIS_MAC_KEY" in line["event"]]
    assert said == ([] if secret else ["warning"])


def test_metrics_have_a_port_of_their_own_and_nothing_else_is_on_it(locked: Locked) -> None:
    answer = httpx.get(f"{locked.metrics_url}/metrics")
    assert answer.status_code == 200
    assert "ironclip_requests_total" in answer.text
    assert httpx.head(f"{locked.metrics_url}/metrics").status_code == 200
    for path in ("/", "/models", "/classify", "/metrics/x"):
        assert httpx.get(f"{locked.metrics_url}{path}").status_code == 404
    assert httpx.post(f"{locked.metrics_url}/metrics").status_code == 501
    assert httpx.get(f"{locked.url}/metrics").status_code == 401
    with locked.client("watcher") as client:
        assert client.get("/metrics").status_code == 404
    assert TestClient(create_app(Settings(metrics_port=free_port()))).get("/metrics").status_code == 404


def test_other_pages_may_ask_where_they_are_listed(locked: Locked) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    allowed = httpx.options(f"{locked.url}/classify", headers={"origin": "https://app.example", **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in allowed.headers
    refused = httpx.options(f"{locked.url}/classify", headers={"origin": "https://evil.example", **asked})
    assert "access-control-allow-origin" not in refused.headers
    # A page can read why it was refused.
    answer = httpx.post(f"{locked.url}/classify", headers={"origin": "https://app.example"})
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    plain = TestClient(create_app(Settings()))
    assert plain.get("/livez", headers={"origin": "https://app.example"}).headers.get("vary") is None
    assert (
        "access-control-allow-origin"
        not in plain.options("/classify", headers={"origin": "https://x", **asked}).headers
    )


def test_no_log_has_a_key_a_header_or_a_picture(locked: Locked) -> None:
    """Twenty kinds of requests, the failing ones among them; then the log of the real service is searched."""
    key, image = locked.keys["acme"], as_base64(picture(1))
    token, uri = {"x-api-key": key}, f"data:image/png;base64,{image}"
    marks = {"user-agent": "agent-m4711z", "x-forwarded-for": "hidden-m4711z", "cookie": "c=cookie-m4711z"}
    identity, secret = key.split("_")[1:]
    good = {"image": uri, "labels": LABELS}
    with httpx.Client(base_url=locked.url, headers=marks, timeout=30) as client:
        kinds: list[Callable[[], httpx.Response]] = [
            lambda: client.post("/classify", json=good, headers=token),
            lambda: client.post("/classify", json=good, headers={"authorization": f"Bearer {key}"}),
            lambda: client.post("/classify", json=good),
            lambda: client.post("/classify", json=good, headers={"x-api-key": key + "x"}),
            lambda: client.post("/classify", json=good, headers={"authorization": f"Basic {key}"}),
            lambda: client.post("/classify", json=good, headers={**token, "x-request-id": key}),
            lambda: client.post("/classify", json={**good, "labels": [key]}, headers=token),
            lambda: client.post("/classify", json={**good, "encoder": key}, headers=token),
            lambda: client.post("/classify", json={"image": uri[:-20], "labels": LABELS}, headers=token),
            lambda: client.post(
                "/classify", content=b"{" + key.encode(), headers={**token, "content-type": "application/json"}
            ),
            lambda: client.post("/classify", content=uri.encode(), headers={**token, "content-type": "text/" + secret}),
            lambda: client.post(
                "/classify", files={"image": (key, picture(2))}, data={"labels": LABELS}, headers=token
            ),
            lambda: client.post(
                f"/classify?labels={key}", content=picture(3), headers={**token, "content-type": "image/png"}
            ),
            lambda: client.get(f"/{key}", headers=token),
            lambda: client.get(f"/models?api_key={key}"),
            lambda: client.get(f"/label-sets/{key}", headers=token),
            lambda: client.get(f"/probes/{key}", headers=token),
            lambda: client.put(f"/label-sets/log-{identity}", json={"labels": [key, uri]}, headers=token),
            lambda: client.post("/embed", json={"images": [uri, uri[:-9]], "texts": [key]}, headers=token),
            lambda: client.post("/v1/embeddings", json={"input": [uri, key], "model": key}, headers=token),
            lambda: client.post("/attack-probe", json={**good, "label": key}, headers=token),
            lambda: client.request("BREW", "/classify", headers=token),
            lambda: client.get("/models", headers={**token, "x-request-timeout-ms": key}),
        ]
        statuses = [ask().status_code for ask in kinds]
    assert {200, 401, 404, 422} <= set(statuses)
    assert all(status < 500 for status in statuses)
    log = locked.service.log.read_text()
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    named = [line for line in lines if line.get("key") == identity]
    assert len(named) >= 15
    assert {line["tenant"] for line in named} == {"acme"}
    for hidden in (secret, key, image[:40], "m4711z", *(other.rpartition("_")[2] for other in locked.keys.values())):
        assert hidden not in log


def test_an_exception_with_a_key_in_its_text_is_logged_without_it() -> None:
    key, _ = make_key("key1", "acme", "infer")
    for form in ("json", "console"):
        code = f"""
import logging
from service import telemetry
telemetry.configure_logging("info", {form!r})
try:
    raise ValueError("a header was {key}, a picture data:image/png;base64,AAAABBBB== or so")
except ValueError:
    telemetry.get_logger().exception("fault")
    logging.getLogger("library").exception("fault with %s", "{key}")
"""
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
        assert result.stderr.count("a header was [redacted], a picture [redacted] or so") == 2
        assert key.rpartition("_")[2] not in result.stderr
        assert "AAAABBBB" not in result.stderr
