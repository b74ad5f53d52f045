from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.container import ImageLimits
from service.settings import Settings, SettingsInvalid, load_settings
from service.settings_table import settings_markdown
from tests.service.conftest import service_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("IRONCLIP_"):
            monkeypatch.delenv(name)


def test_the_defaults_are_safe_to_run_on_a_laptop() -> None:
    settings = load_settings()
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.redis_url is None
    assert settings.default_name == "demo"


def test_environment_wins_over_the_file_and_arguments_over_both(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "ironclip.toml"
    config.write_text('port = 1001\nmax_batch = 7\n[encoders]\nmine = "ViT-B-32/openai"\n')
    monkeypatch.setenv("IRONCLIP_CONFIG", str(config))
    monkeypatch.setenv("IRONCLIP_PORT", "1002")
    settings = load_settings()
    assert (settings.port, settings.max_batch, settings.encoders) == (1002, 7, {"mine": "ViT-B-32/openai"})
    assert load_settings(port=1003).port == 1003


@pytest.mark.parametrize(
    ("text", "encoders"),
    [
        ("a=x, b=y/z", {"a": "x", "b": "y/z"}),
        ("ViT-B-32/openai", {"vit-b-32-openai": "ViT-B-32/openai"}),
        ('{"a": "random:RN50,x"}', {"a": "random:RN50,x"}),
    ],
)
def test_encoders_are_named_in_three_ways(monkeypatch: pytest.MonkeyPatch, text: str, encoders: dict[str, str]) -> None:
    monkeypatch.setenv("IRONCLIP_ENCODERS", text)
    assert load_settings().encoders == encoders


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("IRONCLIP_PRT", "1", "did you mean IRONCLIP_PORT"),
        ("IRONCLIP_MAX_BATCH", "0", "greater than or equal to 1"),
        ("IRONCLIP_DTYPE", "int4", "IRONCLIP_DTYPE"),
        ("IRONCLIP_ENCODERS", "default=demo", "cannot name an encoder"),
        ("IRONCLIP_ENCODERS", "a=x,a=y", "named twice"),
        ("IRONCLIP_DEFAULT_ENCODER", "nope", "not among the encoders: demo"),
        ("IRONCLIP_REDIS_URL", "http://x", "redis://"),
        ("IRONCLIP_REDIS_URL", "redis://localhost:abc", "IRONCLIP_REDIS_URL: must be redis://"),
        ("IRONCLIP_REDIS_URL", "redis://localhost?no_such_option=1", "IRONCLIP_REDIS_URL: must be redis://"),
        ("IRONCLIP_MAX_PIXELS", "89000001", "IRONCLIP_MAX_PIXELS"),
        ("IRONCLIP_CONFIG", "/no/such/file.toml", "no file"),
        ("IRONCLIP_PORT", "tcp://10.0.0.7:80", "enableServiceLinks"),
    ],
)
def test_a_bad_setting_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsInvalid, match=said):
        load_settings()


def test_an_unknown_key_in_the_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "ironclip.toml"
    config.write_text("max_bach = 3\n")
    monkeypatch.setenv("IRONCLIP_CONFIG", str(config))
    with pytest.raises(SettingsInvalid, match="did you mean 'max_batch'"):
        load_settings()


def test_what_kubernetes_puts_beside_a_service_called_ironclip_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_SERVICE_HOST", "10.0.0.7")
    monkeypatch.setenv("IRONCLIP_REDIS_PORT_6379_TCP_ADDR", "10.0.0.8")
    load_settings()


def test_the_clients_variables_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("IRONCLIP_API_KEY", "secret")
    assert "secret" not in repr(load_settings())


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_REDIS_URL", "redis://:hunter2@localhost")
    assert "hunter2" not in repr(load_settings())


def test_every_setting_is_explained_in_the_table() -> None:
    table = settings_markdown()
    for name, field in Settings.model_fields.items():
        assert f"`IRONCLIP_{name.upper()}`" in table
        assert field.description


def test_a_bad_setting_ends_the_program_with_2_and_one_clear_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={"PATH": "/usr/bin", "IRONCLIP_PROT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "IRONCLIP_PROT: there is no such setting; did you mean IRONCLIP_PORT?" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_most_pixels_that_may_be_set_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_MAX_PIXELS", "89000000")
    assert ImageLimits(max_pixels=load_settings().max_pixels).max_pixels == 89_000_000


def test_a_password_in_a_bad_url_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRONCLIP_REDIS_URL", "redis://:hunter2/x@localhost")
    with pytest.raises(SettingsInvalid) as caught:
        load_settings()
    assert "hunter2" not in caught.value.detail


def run(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    environment = service_environment(**settings)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_a_bad_setting_ends_every_command_with_2() -> None:
    result = run("openapi", port="abc")
    assert result.returncode == 2
    assert "IRONCLIP_PORT" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_address_that_cannot_be_listened_on_ends_the_program_with_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        in_use = run(port=taken.getsockname()[1])
    assert in_use.returncode == 1
    assert "in use" in in_use.stderr
    nowhere = run(host="no.such.host.invalid")
    assert nowhere.returncode == 1
    assert "Cannot listen on no.such.host.invalid:8000" in nowhere.stderr
    assert "Traceback" not in in_use.stderr + nowhere.stderr
