"""A small encoder and a config for robust training in seconds."""

import json
from pathlib import Path
from typing import Any

import torch

from ironclip.artifact import save_artifact
from training.towers import build_encoder

PREPROCESS = {
    "size": [32, 32],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "longest",
    "fill_color": 255,
}
CONV: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def make_artifact(folder: Path, vision: dict[str, Any], seed: int = 0) -> Path:
    """An artifact with random weights, saved in float32."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    encoder = build_encoder({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}, PREPROCESS, seed)
    meta = {"name": folder.name, "default_templates": ["an emoji of {}"]}
    return save_artifact(encoder, folder, meta, dtype=torch.float32)


def write_config(path: Path, base: Path, proxy: Path, data: Path) -> Path:
    """A config of eight steps on a built emoji world; its tree lies beside it."""
    names = json.loads((data / "manifest.json").read_text(encoding="utf-8"))["names"]
    parents = {name["label"]: name["subgroup"] for name in names} | {name["subgroup"]: name["group"] for name in names}
    tree = path.with_suffix(".tree.json")
    tree.write_text(json.dumps({"parents": parents}), encoding="utf-8")
    path.write_text(
        f"""
base = "{base}"
proxy = "{proxy}"
steps = 8
batch_size = 6
learning_rate = 1e-3
warmup = 2
dtype = "float32"
threads = 1
log_every = 2
checkpoint_every = 3
evaluate_every = 4
evaluate_count = 6
evaluate_iterations = 2
epoch_steps = 2

[data]
kind = "emoji"
path = "{data}"

[attack]
eps = 4.0
iterations = 2
step = 2.0

[methods.hierarchical]
data = {{ tree = "{tree}", per_parent = 2 }}
options = {{ trees = ["{tree}"] }}
""",
        encoding="utf-8",
    )
    return path
