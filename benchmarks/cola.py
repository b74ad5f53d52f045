"""What COLA costs beyond its forwards: `python -m benchmarks.cola`.

The aim: making the views and deciding from their features takes at most 3 % of the float32 forwards and 10 % of the
bfloat16 ones on a CPU (2 % on a GPU), for ViT-B/32, 1,000 labels of 50 texts, batches of 32, ten iterations. All parts
are timed in turn in one run, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import ot
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ironclip.defences.cola import Cola
from ironclip.defences.transport import transport_cost
from ironclip.loading import pick_device
from ironclip.textbank import TextBank
from training.jsonfile import write_json
from training.provenance import made_on

AIMS = {"float32": 0.03, "bfloat16": 0.10}
GPU_AIM = 0.02


def aim_of(dtype: str, device: str) -> float:
    """Share of the forwards that the rest may take at batch 32, by dtype on a CPU; the same for all on a GPU."""
    return AIMS[dtype] if device == "cpu" else GPU_AIM


@dataclass(frozen=True)
class Head:
    """A cosine head of CLIP's scale."""

    scale: Tensor

    def __call__(self, features: Tensor, bank: TextBank) -> Tensor:
        """Logits."""
        return self.scale * normalize(features, dim=-1) @ bank.weights.T


def random_bank(labels: int, texts: int, dim: int, device: torch.device) -> TextBank:
    """A bank of random unit texts: the arithmetic of a real one."""
    generator = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(labels * texts, dim, generator=generator), dim=-1)
    weights = normalize(features.view(labels, texts, dim).mean(1), dim=-1)
    counts = torch.stack([torch.ones(labels), torch.full((labels,), texts - 1.0)], 1).long()
    bank = TextBank(
        "", "", True, weights, torch.ones(labels), features, torch.arange(len(features)), counts, weights[0]
    )
    return bank.to(device)


def timed(parts: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Best seconds of each part over rounds in which all take turns."""

    def once(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for work in parts.values():
        once(work)
    return {name: min(times) for name, times in _rounds(parts, rounds, once).items()}


def _rounds(
    parts: dict[str, Callable[[], object]], rounds: int, once: Callable[[Callable[[], object]], float]
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, work in parts.items():
            found[name].append(once(work))
    return found


@torch.inference_mode()
def measure(
    model: str, labels: int, texts: int, views: int, batch: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds a picture of every part, and shares of the forwards."""
    towers = {
        name: open_clip.create_model(model, precision="fp32").visual.eval().to(device, getattr(torch, name))
        for name in AIMS
    }
    side, dim = 224, towers["float32"].output_dim
    bank = random_bank(labels, texts, dim, device)
    head = Head(torch.tensor(100.0, device=device))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(batch, 3, side, side, generator=generator).to(device)
    features = torch.randn(batch, views, dim, generator=generator).to(device)
    cola = {name: Cola(views=views, coupling=name) for name in ("sinkhorn", "product")}
    state = cola["sinkhorn"].prepare(bank)
    many = torch.rand(batch * views, 3, side, side, generator=generator).to(device)
    cost = 0.7 + 0.2 * torch.rand(batch, views, labels, texts, generator=generator).to(device)
    a, b = (
        torch.full((batch, views), 1 / views, device=device),
        torch.full((batch, labels, texts), 1 / texts, device=device),
    )
    flat = cost.permute(0, 2, 1, 3).reshape(batch * labels, views, texts)
    wide = a[:, None].expand(-1, labels, -1).reshape(-1, views).contiguous()
    parts: dict[str, Callable[[], object]] = {
        "forwards float32": lambda: towers["float32"](many),
        "forwards bfloat16": lambda: towers["bfloat16"](many.to(torch.bfloat16)),
        "views": lambda: cola["sinkhorn"].make_views(pixels, towers["float32"]),
        "decide sinkhorn": lambda: cola["sinkhorn"].logits(features, bank, state, head),
        "decide product": lambda: cola["product"].logits(features, bank, state, head),
        "transport ours": lambda: transport_cost(cost, a, b, "sinkhorn"),
        "transport POT": lambda: ot.solve_batch(
            flat, reg=0.1, a=wide, b=b.reshape(-1, texts), max_iter=10, tol=0.0, grad="detach"
        ),
    }
    seconds = timed(parts, rounds, device)
    each = {name: round(1000 * value / batch, 3) for name, value in seconds.items()}
    beyond = seconds["views"] + seconds["decide sinkhorn"]
    shares = {name: round(beyond / seconds[f"forwards {name}"], 4) for name in AIMS}
    return {"batch": batch, "ms_per_picture": each, "beyond_forwards": shares}


def main() -> None:
    """Measure batches of 32 and of one; print, and keep as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cola", description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=50)
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 1])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cola.json"))
    arguments = parser.parse_args()
    device = torch.device(pick_device(arguments.device))
    sizes = (arguments.labels, arguments.texts, arguments.views)
    found = [measure(arguments.model, *sizes, batch, arguments.rounds, device) for batch in arguments.batches]
    for one in found:
        print(f"batch {one['batch']}, milliseconds a picture:")
        for name, value in one["ms_per_picture"].items():
            print(f"  {name:20} {value:10.3f}")
        for name, share in one["beyond_forwards"].items():
            aim = aim_of(name, device.type)
            print(f"  beyond the {name} forwards: {100 * share:.1f} % (aim {100 * aim:.0f} %)")
    result = {
        "model": arguments.model,
        **dict(zip(("labels", "texts", "views"), sizes, strict=True)),
        "iterations": Cola().iterations,
        **made_on(device),
        "batches": found,
    }
    write_json(arguments.out, result)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
