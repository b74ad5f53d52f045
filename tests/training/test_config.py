"""Configs: overrides, types, and errors that say what to do."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ironclip.errors import OptionError
from training.config import CONFIGS, load_config
from training.pretrain import PretrainConfig


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Settings:
    name: str
    steps: int = 3
    sizes: tuple[int, ...] = ()
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "settings.toml"
    file.write_text('name = "a"\n[inner]\nrate = 1\n', encoding="utf-8")
    return str(file)


def test_overrides_reach_nested_tables(path: str) -> None:
    config = load_config(Settings, path, ["steps=5", "inner.rate=0.5", "sizes=[1, 2]", "name=plain words"])
    assert config == Settings("plain words", 5, (1, 2), Inner(0.5))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=5", "did you mean steps"),
        ("inner.rat=5", "unknown key inner.rat; did you mean inner.rate"),
        ("steps=many", "steps: expected"),
        ("steps=true", "steps: expected"),
        ("steps", "key=value"),
        ("name.x=1", "is no table"),
    ],
)
def test_errors_name_the_key(path: str, override: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_config(Settings, path, [override])


def test_a_missing_key_and_a_missing_config_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("", encoding="utf-8")
    with pytest.raises(OptionError, match="missing key name"):
        load_config(Settings, str(tmp_path / "empty.toml"))
    with pytest.raises(OptionError, match=r"known: .*demo"):
        load_config(Settings, "no-such-config")


@pytest.mark.parametrize("config", sorted((CONFIGS / "pretrain").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configs_load_and_begin_with_their_command(config: Path) -> None:
    command = f"# python -m training pretrain --config {config.stem}"
    assert config.read_text(encoding="utf-8").splitlines()[0] == command
    assert load_config(PretrainConfig, config.stem).name == config.stem
