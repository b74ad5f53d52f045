"""compose.yaml as Docker Compose itself resolves it: includes, profiles, defaults, and what each service may do."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sysconfig
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import redis
import yaml
from compose_test import KEYS_FILES

from service.__main__ import main
from service.settings import MAC_KEY_CHARS, Settings
from tests import needs

ROOT = Path(__file__).parents[2]
COMPOSE = Path(sysconfig.get_path("scripts")) / "docker-compose"
SERVING = {"ironclip", "ironclip-gpu", "ironclip-fleet"}
OURS = {*SERVING, "train", "train-gpu"}
WITH_KEYS = tuple(f"--file={file}" for file in KEYS_FILES)


def _compose(*options: str, env_file: str = os.devnull, **variables: str) -> subprocess.CompletedProcess[str]:
    """What Compose makes of our files, with only the given variables in the environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **variables}
    command = [str(COMPOSE), "--env-file", env_file, *options, "config", "--format", "json"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def _resolve(*options: str, env_file: str = os.devnull, **variables: str) -> dict[str, Any]:
    """The whole model."""
    result = _compose(*options, env_file=env_file, **variables)
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
        (("fleet",), {"ironclip", "redis", "ironclip-fleet"}),
        (("observe",), {"ironclip", "redis", "prometheus", "grafana"}),
        (("train",), {"ironclip", "redis", "train"}),
        (("train-gpu",), {"ironclip", "redis", "train-gpu"}),
    ],
)
def test_profiles(profiles: tuple[str, ...], services: set[str]) -> None:
    """Plain `docker compose up` is the service and Redis; nobody needs a GPU for it."""
    found = _resolve(*(f"--profile={name}" for name in profiles))["services"]
    assert set(found) == services
    if profiles in ((), ("train",)):
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
    assert members == {"redis", *SERVING}
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
    for name in SERVING:
        service = everything["services"][name]
        settings = service["environment"]
        drain = float(settings["IRONCLIP_DRAIN_SECONDS"]) + float(settings.get("IRONCLIP_DRAIN_DELAY_SECONDS", 0))
        assert service["stop_grace_period"] == "50s"
        assert Settings().request_timeout_ms <= 1000 * drain
        assert drain + 10 <= 50
        assert service["depends_on"]["redis"]["condition"] == "service_healthy"


def test_the_settings_exist(everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The service refuses settings that it does not know, so a misspelt one here would be a container in a loop."""
    for name in SERVING:
        environment = everything["services"][name]["environment"]
        for variable, value in environment.items():
            assert variable.removeprefix("IRONCLIP_").lower() in Settings.model_fields, variable
            monkeypatch.setenv(variable, value)
        assert list(Settings().encoders) == ["demo", "demo-robust", "demo-vit"]


@pytest.mark.parametrize("name", ["ironclip-gpu", "ironclip-fleet", "train-gpu"])
def test_the_gpu_is_reserved(everything: dict[str, Any], name: str) -> None:
    service = everything["services"][name]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert device["capabilities"] == ["gpu"]
    every = -1
    assert device.get("count") == (every if name == "ironclip-fleet" else None)
    assert service["build"]["args"]["VARIANT"] == "cuda"
    assert service["image"].endswith(":cuda")
    plain = everything["services"]["train" if name == "train-gpu" else "ironclip"]
    assert plain["build"]["args"]["VARIANT"] == "cpu"
    assert plain["image"].endswith(":cpu")
    # But for the device and what is built they are the same.
    assert service["volumes"] == plain["volumes"]
    assert service["stop_grace_period"] == plain["stop_grace_period"]


def test_the_fleet_is_a_command_of_the_service(
    everything: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its processes' ports, those of metrics too, lie beside one another; what is published is the shared one."""
    service = everything["services"]["ironclip-fleet"]
    (published,) = service["ports"]
    assert published["target"] == Settings.model_fields["port"].default
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, value)
    asked: list[int] = []
    monkeypatch.setattr("service.fleet.Fleet.run", lambda fleet: asked.append(len(fleet._members)) or 0)
    assert main([*service["command"], "--devices", ",".join(f"cuda:{number}" for number in range(16))]) == 0
    assert asked == [16], capsys.readouterr().err


def test_training_may_finish_its_step(everything: dict[str, Any]) -> None:
    """SIGTERM has it finish the step and write a checkpoint, which ten seconds do not suffice for."""
    for name in ("train", "train-gpu"):
        assert everything["services"][name]["stop_grace_period"] == "5m0s", name


def test_an_image_is_named_by_its_variant() -> None:
    service = _resolve("--profile=train", TRAINING_VARIANT="cuda")["services"]["train"]
    assert service["build"]["args"]["VARIANT"] == "cuda"
    assert service["image"] == "ironclip-training:cuda"
    assert _resolve("--profile=train", IMAGE_TRAINING="mine:1")["services"]["train"]["image"] == "mine:1"


def test_metrics_have_a_port_that_is_not_published(everything: dict[str, Any]) -> None:
    """So Prometheus asks without a key, and nobody outside does."""
    config = yaml.safe_load((ROOT / "docker" / "observe" / "prometheus.yml").read_text(encoding="utf-8"))
    (scraped,) = config["scrape_configs"]
    (asked,) = scraped["dns_sd_configs"]
    assert set(asked["names"]) == SERVING
    assert everything["networks"]["metrics"]["internal"] is True
    for name in SERVING:
        service = everything["services"][name]
        assert service["environment"]["IRONCLIP_METRICS_PORT"] == str(asked["port"]), name
        assert {port["target"] for port in service["ports"]} == {8000}, name
        assert "metrics" in service["networks"], name
    assert "metrics" in everything["services"]["prometheus"]["networks"]


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


def test_with_keys_nobody_is_let_in_without_one(tmp_path: Path) -> None:
    """The folder is mounted: a mounted file would stay the one it was when another is put in its place."""
    (tmp_path / ".env").write_text(f"IRONCLIP_REDIS_MAC_KEY={'m' * 64}\n", encoding="utf-8")
    plain = _resolve("--profile=*")["services"]
    found = _resolve(*WITH_KEYS, "--profile=*", env_file=str(tmp_path / ".env"))["services"]
    assert set(found) == set(plain)
    for name in SERVING:
        service = found[name]
        assert "secrets" not in service
        keys_file = PurePosixPath(service["environment"]["IRONCLIP_KEYS_FILE"])
        (mount,) = [mount for mount in service["volumes"] if mount["type"] == "bind"]
        assert PurePosixPath(mount["target"]) == keys_file.parent
        assert mount["source"] == str(ROOT / "keys")
        assert mount["read_only"] is True
        # Else Docker makes an empty folder that belongs to root, where a name is misspelt.
        assert not mount.get("bind", {}).get("create_host_path")
        settings = {key.removeprefix("IRONCLIP_").lower(): value for key, value in service["environment"].items()}
        assert Settings(**settings).keys_file == Path(keys_file)
        assert len(settings["redis_mac_key"]) == 64
        # Nothing else of it is otherwise.
        service["volumes"].remove(mount)
        for variable in ("IRONCLIP_KEYS_FILE", "IRONCLIP_REDIS_MAC_KEY"):
            del service["environment"][variable]
    assert found == plain
    elsewhere = _resolve(*WITH_KEYS, KEYS="/srv/keys", IRONCLIP_REDIS_MAC_KEY="m" * 64)["services"]["ironclip"]
    assert "/srv/keys" in {mount["source"] for mount in elsewhere["volumes"]}


@pytest.mark.parametrize("variables", [{}, {"IRONCLIP_REDIS_MAC_KEY": ""}])
def test_with_keys_the_secret_has_to_be_there(variables: dict[str, str]) -> None:
    refused = _compose(*WITH_KEYS, **variables)
    assert refused.returncode != 0
    assert "required variable IRONCLIP_REDIS_MAC_KEY is missing a value" in refused.stderr
    assert "openssl rand -hex 32" in refused.stderr


def test_env_names_both_files_once_for_all(tmp_path: Path) -> None:
    """As the README has it: then no command forgets the keys."""
    said = re.search(r"`(COMPOSE_FILE=\S+)` in `\.env`", _readme())
    assert said is not None
    (tmp_path / ".env").write_text(f"{said[1]}\nIRONCLIP_REDIS_MAC_KEY={'m' * 64}\n", encoding="utf-8")
    service = _resolve(env_file=str(tmp_path / ".env"))["services"]["ironclip"]
    assert service["environment"]["IRONCLIP_KEYS_FILE"]


def test_the_readmes_commands_make_keys_that_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compose knows the options, and the image's entry point what comes after them."""
    found = re.search(r"^docker compose run (.* ironclip) \\\n +(keys new .*)$", _readme(), re.MULTILINE)
    assert found is not None
    options, asked = shlex.split(found[1])[:-1], shlex.split(found[2])
    told = subprocess.run([str(COMPOSE), "run", "--help"], capture_output=True, text=True, timeout=60).stdout
    assert {option for option in options if option.startswith("--")} <= set(re.findall(r"--[a-z-]+", told))
    folder = options[options.index("--volume") + 1].split(":")
    assert folder[0] == "$PWD/keys"
    file = tmp_path / Path(asked[-1]).relative_to(folder[1])
    dockerfile = (ROOT / "docker" / "service.Dockerfile").read_text(encoding="utf-8")
    assert 'ENTRYPOINT ["/opt/venv/bin/python", "-m", "service"]' in dockerfile
    assert main([*asked[:-1], str(file)]) == 0
    assert capsys.readouterr().out.startswith("ick_")
    # To both files' container: the name in the folder is what it looks for.
    service = _resolve(*WITH_KEYS, IRONCLIP_REDIS_MAC_KEY="m" * 64)["services"]["ironclip"]
    assert PurePosixPath(service["environment"]["IRONCLIP_KEYS_FILE"]).name == file.name
    assert main(["keys", "check", str(file)]) == 0
    assert "acme" in capsys.readouterr().out
    secret = re.search(r"IRONCLIP_REDIS_MAC_KEY=\$\((openssl rand -hex (\d+))\)", _readme())
    assert secret is not None
    assert 2 * int(secret[2]) >= MAC_KEY_CHARS
    for command in re.findall(r"docker compose ((?:-f \S+ )+)", _readme()):
        assert shlex.split(command)[1::2] == list(KEYS_FILES)


def _readme() -> str:
    return (ROOT / "docker" / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_every_variable() -> None:
    """And none that there is not."""
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in ("docker/compose.yaml", KEYS_FILES[1]))
    table = _readme().split("## Variables of Compose")[1].split("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert set(re.findall(r"\$\{(\w+)", text)) == named


def test_keys_are_not_committed() -> None:
    assert {"/keys/", "/.env"} <= set((ROOT / ".gitignore").read_text(encoding="utf-8").splitlines())


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
