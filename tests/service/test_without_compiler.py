"""A service that compiles nothing does not load what would, and whoever asks for it has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_LEAN = """
import sys
import torch
from service.without_compiler import without_compiler
with without_compiler():
    import open_clip, timm, torchvision
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
assert not any("_Finder" in type(one).__name__ and type(one).__module__.startswith("service") for one in sys.meta_path)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_open_clip_works_and_what_compiles_comes_when_it_is_asked_for() -> None:
    """A tower, its gradients, torchvision's operator that asks for the compiler, and a compiled function."""
    run(
        _LEAN
        + """
from ironclip.loading import load_encoder
encoder = load_encoder("demo-vit")
pixels = torch.rand(1, 3, encoder.resolution, encoder.resolution, requires_grad=True)
encoder.encode_image(pixels).sum().backward()
assert pixels.grad.abs().sum() > 0 and "torch._dynamo" not in sys.modules
from timm.models.naflexvit import NaFlexRopeIterator
marked = [one for one in vars(NaFlexRopeIterator).values() if getattr(one, "_torchdynamo_disable", False)]
assert marked, "timm marks nothing any more: its stand-in can go"
boxes = torch.tensor([[0, 0, 0, 4, 4.0]])
assert torchvision.ops.roi_align(torch.rand(1, 3, 8, 8), boxes, 2).shape == (1, 3, 2, 2)
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(1)).item() == 2
import torch._dynamo
assert torch._dynamo.config.cache_size_limit > 0 and torch._dynamo.disable is not None
"""
    )


@pytest.mark.parametrize(
    "asked",
    [
        "from torch._dynamo import config",
        "import torch._dynamo.config",
        "torch._dynamo.reset()",
        "torch._dynamo.utils.counters",
    ],
)
def test_whoever_asks_for_more_meanwhile_gets_the_real_one(asked: str) -> None:
    run(
        f"""
import sys
import torch
from service.without_compiler import without_compiler
with without_compiler():
    import torch._dynamo
    {asked}
    import torchvision
import torch._dynamo.config
assert sys.modules["torch._dynamo"].__file__ and torch._dynamo.config is sys.modules["torch._dynamo.config"]
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""
    )


def test_a_service_is_without_it_unless_it_compiles() -> None:
    code = """
import sys
from service import __main__ as service
assert "torch" not in sys.modules  # nor for --help, keys or the parent of a fleet
service._Server.run = lambda self: print("open_clip" in sys.modules, "torch._dynamo" in sys.modules)
sys.exit(0 if service.main(["--port", "0"]) in (0, 1) else 2)
"""
    assert run(code).splitlines()[-1] == "True False"
    assert run("import os; os.environ['IRONCLIP_COMPILE'] = 'compile'\n" + code).splitlines()[-1] == "True True"
