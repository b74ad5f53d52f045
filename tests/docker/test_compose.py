"""compose.yaml as Docker Compose itself resolves it: includes, profiles, defaults, and what each service may do."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import redis
from compose_test import with_keys

from service.settings import Settings
from tests import needs

ROOT = Path(__file__).parents[2]
COMPOSE = Path(sysconfig.get_path("scripts")) / "docker-compose"
OURS = {"ironclip", "ironclip-gpu", "train"}


def _resolve(*options: str, folder: Path = ROOT, **variables: str) -> dict[str, Any]:
    """The whole model of the compose.yaml in a folder, with only the given variables in the environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables}
    command = [str(COMPOSE), "--env-file", os.devnull, *options, "config", "--format", "json"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "WARN" not in result.stderr.upper(), result.stderr  # a variable without a default, a key that is obsolete
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return _resolve("--profile", "*")


@pytest.mark.parametrize(
    ("profiles", "services"),
    [
        ((), {"ironclip", "redis"}),
        (("gpu",), {"ironclip", "redis", "ironclip-gpu"}),
        (("observe",), {"ironclip", "redis", "prometheus", "grafana"}),
        (("train",), {"ironclip", "redis", "train"}),
    ],
)
def test_profiles(profiles: tuple[str, ...], services: set[str]) -> None:
    """Plain `docker compose up` is the service and Redis; nobody needs a GPU for it."""
    found = _resolve(*(f"--profile={name}" for name in profiles))["services"]
    assert set(found) == services
    if not profiles:
        assert "devices" not in json.dumps(found)


def test_every_container_is_hardened(everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "cap_add" not in service, name
        assert not service.get("privileged"), name
        limits = service["deploy"]["resources"]["limits"]
        assert int(limits["memory"]) > 0, name
        assert int(limits["pids"]) > 0, name
        for mount in service.get("volumes", []):
            assert "docker.sock" not in mount.get("source", ""), name


def test_only_this_machine_reaches_the_ports(everything: dict[str, Any]) -> None:
    published = {}
    for name, service in everything["services"].items():
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
            assert port["published"] not in published.values(), f"{name}: two services on one port"
            published[name] = port["published"]
    assert published["ironclip"] == "8000"
    assert "redis" not in published


def test_redis_is_alone_with_the_service(everything: dict[str, Any]) -> None:
    """No password is needed where no other container, and nothing outside, has a way to it."""
    assert everything["networks"]["redis"]["internal"] is True
    members = {name for name, service in everything["services"].items() if "redis" in service["networks"]}
    assert members == {"redis", "ironclip", "ironclip-gpu"}
    assert list(everything["services"]["redis"]["networks"]) == ["redis"]


def test_redis_takes_its_command_line(everything: dict[str, Any], tmp_path: Path) -> None:
    """The real redis-server with the very arguments: bounded memory, and label sets are never evicted."""
    needs.redis_installed()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    command = [*everything["services"]["redis"]["command"], "--port", port, "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        client = redis.Redis(port=int(port))
        deadline = time.monotonic() + 10
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert process.poll() is None, "redis-server refused its arguments"
                assert time.monotonic() < deadline, "redis-server did not start"
                time.sleep(0.05)
        settings: dict[str, str] = client.config_get("*")  # type: ignore[assignment]
        assert settings["maxmemory"] == str(256 * 1024 * 1024)
        assert settings["maxmemory-policy"] == "volatile-lru"
        assert settings["appendonly"] == "yes"
        assert settings["save"] == ""
        assert settings["timeout"] == "300"
        assert settings["protected-mode"] == "no"  # or only what runs in Redis' own container is let in
    finally:
        process.terminate()
        process.wait(10)


def test_the_stop_outlasts_the_drain(everything: dict[str, Any]) -> None:
    for name in ("ironclip", "ironclip-gpu"):
        service = everything["services"][name]
        settings = service["environment"]
        drain = float(settings["IRONCLIP_DRAIN_SECONDS"]) + float(settings.get("IRONCLIP_DRAIN_DELAY_SECONDS", 0))
        assert service["stop_grace_period"] == "40s"
        assert drain + 10 <= 40
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"


def test_the_settings_exist(everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The service refuses settings that it does not know, so a misspelt one here would be a container in a loop."""
    for name in ("ironclip", "ironclip-gpu"):
        environment = everything["services"][name]["environment"]
        for variable, value in environment.items():
            assert variable.removeprefix("IRONCLIP_").lower() in Settings.model_fields, variable
            monkeypatch.setenv(variable, value)
        assert list(Settings().encoders) == ["demo", "demo-robust", "demo-vit"]


def test_the_gpu_is_reserved(everything: dict[str, Any]) -> None:
    (device,) = everything["services"]["ironclip-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    assert everything["services"]["ironclip-gpu"]["build"]["args"]["VARIANT"] == "cuda"
    assert everything["services"]["ironclip"]["build"]["args"]["VARIANT"] == "cpu"


def test_what_is_mounted_and_built_is_there(everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        for mount in service.get("volumes", []):
            if mount["type"] == "bind":
                assert Path(mount["source"]).exists(), f"{name}: {mount['source']}"
                assert mount["read_only"], name
        if name in OURS:
            context = Path(service["build"]["context"])
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()


def _with_keys(folder: Path) -> Path:
    """A copy whose lines about keys, and about metrics of their own, are no comments any more, as their words say."""
    (folder / "docker").mkdir()
    shutil.copy(ROOT / "compose.yaml", folder)
    text = (ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8")
    text, lines = re.subn(r"^( +)# (IRONCLIP_METRICS_PORT: .*)$", r"\1\2", with_keys(text), flags=re.M)
    assert lines == 1
    (folder / "docker" / "compose.yaml").write_text(text, encoding="utf-8")
    return folder


def test_a_key_that_was_taken_out_does_not_stay_in_the_container(tmp_path: Path) -> None:
    """The folder is mounted: a mounted file would stay the one it was when another is put in its place."""
    found = _resolve("--profile", "*", folder=_with_keys(tmp_path), REDIS_MAC_KEY="m" * 64)
    for name in ("ironclip", "ironclip-gpu"):
        service = found["services"][name]
        assert "secrets" not in service
        keys_file = PurePosixPath(service["environment"]["IRONCLIP_KEYS_FILE"])
        (mount,) = [mount for mount in service["volumes"] if mount["type"] == "bind"]
        assert PurePosixPath(mount["target"]) == keys_file.parent
        assert mount["source"] == str(tmp_path / "keys")
        assert mount["read_only"] is True
        # Else Docker makes an empty folder that belongs to root, where a name is misspelt.
        assert not mount.get("bind", {}).get("create_host_path")
        settings = {key.removeprefix("IRONCLIP_").lower(): value for key, value in service["environment"].items()}
        assert Settings(**settings).keys_file == Path(keys_file)
        assert len(settings["redis_mac_key"]) == 64
    said = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    assert f"keys/{keys_file.name}" in said


def test_keys_are_not_committed() -> None:
    assert "/keys/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_every_image_can_be_pinned_by_digest() -> None:
    pin = "@sha256:" + "a" * 64
    names = {
        name: f"registry.example/{name.lower()}:1{pin}" for name in ("REDIS_IMAGE", "PROMETHEUS_IMAGE", "GRAFANA_IMAGE")
    }
    services = _resolve("--profile", "*", BASE_IMAGE=f"python:3.12{pin}", **names)["services"]
    for name, service in services.items():
        assert pin in (service["build"]["args"]["BASE_IMAGE"] if name in OURS else service["image"]), name


def test_variables_change_what_they_say() -> None:
    found = _resolve(HOST_PORT="9123", HOST_ADDRESS="0.0.0.0", CPUS="2", MEMORY="8g", RUNS="/srv/runs", ENCODERS="demo")
    service = found["services"]["ironclip"]
    assert service["ports"][0]["published"] == "9123"
    assert service["ports"][0]["host_ip"] == "0.0.0.0"
    assert service["deploy"]["resources"]["limits"]["cpus"] == 2
    assert service["environment"]["IRONCLIP_ENCODERS"] == "demo"
    assert {"/srv/runs"} == {mount["source"] for mount in service["volumes"] if mount["target"] == "/artifacts"}
