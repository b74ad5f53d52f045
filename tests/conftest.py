"""Fixtures that every part of the suite shares: a small CLIP with random weights, as model and as artifact."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch starts OpenMP: threads that spin while they wait slow tests and service processes side by side
# to a crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: one core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import open_clip
import pytest
import torch

from ironclip.artifact import save_artifact
from ironclip.encoder import Encoder
from tests import needs

TINY_CFG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_tiny_encoder(seed: int = 0) -> Encoder:
    """A CLIP of 32 px and 1.6 M parameters (nearly all of them the vocabulary), random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**TINY_CFG)
    return Encoder(
        model,
        open_clip.SimpleTokenizer(context_length=24),
        model_cfg=TINY_CFG,
        preprocess_cfg={
            "size": 32,
            "mode": "RGB",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.25, 0.3],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
        spec="tiny",
    )


def make_residual_encoder(width: int = 8) -> Encoder:
    """A small ResNet CLIP whose batch norms do something."""
    cfg = {**TINY_CFG, "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": width}}
    like = make_tiny_encoder()
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**cfg)
    for module in model.visual.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                values.data.copy_(torch.rand(len(values), generator=generator) + low)
            module.running_var.copy_(torch.rand(len(module.running_var), generator=generator) + 0.5)
    preprocess = {**like.preprocess_cfg, "size": 64}
    return Encoder(model, like.tokenizer, model_cfg=cfg, preprocess_cfg=preprocess).requires_grad_(False)


@pytest.fixture(scope="session", autouse=True)
def _no_setting_of_ours() -> None:
    """What is for the tests is no setting of the service, which would refuse to start."""
    os.environ.pop(needs.ALLOW_SKIPS, None)


@pytest.fixture(scope="session")
def redis_installed() -> None:
    """See `needs.redis_installed`."""
    needs.redis_installed()


@pytest.fixture(scope="session")
def tiny_encoder() -> Encoder:
    return make_tiny_encoder().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "artifact"
    return save_artifact(make_tiny_encoder(), folder, {"name": "tiny", "default_templates": ["an emoji of {}"]})
