"""A built data set and a pretrain config small enough to train on in seconds, with no network."""

from pathlib import Path

import pytest

from tests.training.emoji_world import make_icons, make_names
from training.emoji.build import build_data
from training.emoji.vendors import Vendor


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a built data set with one training and one test vendor."""
    folder = tmp_path_factory.mktemp("data")
    names = make_names(folder / "packages")
    art = Vendor("art", make_icons(folder / "packages"), "MIT", "Art", styles=("plain", "line"))
    other = make_icons(folder / "packages", "@other/icons", "CC-BY-4.0")
    build_data(folder, 32, [art, Vendor("other", other, "CC-BY-4.0", "Other", role="test")], names)
    return folder


@pytest.fixture
def tiny_config(demo_data: Path, tmp_path: Path) -> Path:
    """A pretrain config of a few seconds on `demo_data`."""
    text = f"""
name = "tiny"
steps = 12
data = "{demo_data}"
batch_size = 6
name_prompts = 7
warmup = 2
threads = 1
log_every = 2
checkpoint_every = 4
dtype = "float32"

[model]
embed_dim = 16
vision_cfg = {{ image_size = 32, layers = [1, 1, 1, 1], width = 8 }}
text_cfg = {{ context_length = 16, vocab_size = 49408, width = 16, heads = 2, layers = 1 }}

[preprocess]
size = [32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
resize_mode = "longest"
fill_color = 255
"""
    path = tmp_path / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return path
