"""The benchmark of a training step runs with nothing but a config: no data set, no published weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training_step import main, noise_overrides
from ironclip.errors import OptionError
from tests.training.robust_world import CONV, VIT, make_artifact, write_config
from training.recipe import load_recipe
from training.robust_run import make_fabric


def test_a_step_of_a_config_whose_data_is_not_there(demo_data: Path, tmp_path: Path) -> None:
    base, proxy = make_artifact(tmp_path / "vit", VIT), make_artifact(tmp_path / "conv", CONV, seed=1)
    config = write_config(tmp_path / "tiny.toml", base, proxy, demo_data)
    out = tmp_path / "found.json"
    asked = ["--config", str(config), "--methods", "hierarchical", "--batch", "4", "--rounds", "1", "--no-plain"]
    gone = ["--noise", "--set", "data.path=/no/such/folder"]
    assert main([*asked, *gone, "--device", "cpu", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert "cuda" not in found["device"].lower()
    assert found["noise"] is True
    assert found["methods"]["hierarchical"]["seconds"]["step"] > 0


def test_the_published_configs_need_no_download_with_noise(tmp_path: Path) -> None:
    config = load_recipe("hpt_gpd", "imagenet-vit-l-14", [])
    changed = load_recipe("hpt_gpd", "imagenet-vit-l-14", noise_overrides(tmp_path, config))
    assert changed.base == "random:ViT-L-14-quickgelu"
    assert changed.proxy == "random:ViT-B-16-quickgelu"
    assert changed.data.path == str(tmp_path)


def test_a_device_that_is_not_there() -> None:
    assert make_fabric("cpu").device.type == "cpu"
    with pytest.raises(OptionError, match="cuda:99"):
        make_fabric("cuda:99")
