"""`python -m benchmarks.training_step`: a step of each method over its floor, and beside a plain re-creation.

In one run, interleaved, on one thread count: the recipe's step; the bare forwards and backwards it cannot do without
(`training.throughput`); and a step written as the published scripts do it: weight gradients computed in the attack, the
frozen towers' graphs kept, a clean forward for the log; for TeCoA, PMG-AFT and HPT-GPD prompts encoded anew in every
forward, under float16 autocast where there is a GPU; the others in float32, as their scripts are.

`--noise` runs any config without its weights and data, so that a step of ViT-L/14 can be tried on a GPU at once:

    python -m benchmarks.training_step --config imagenet-vit-l-14 --noise --batch 128 --device cuda --no-plain
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from training.ahead import ahead
from training.methods.base import Batch, Texts
from training.provenance import commit, device_name
from training.recipe import RobustConfig, load_recipe
from training.robust_run import Run, make_fabric, start
from training.sources import step_batches
from training.throughput import measure_floor
from training.towers import timed
from training.train import train_step

METHODS = ("simclip", "fare", "tecoa", "pmg_aft", "agft", "hpt_gpd", "hierarchical")
NOISE_SIDE = 256
RESULTS = Path(__file__).parent / "results" / "training_step.json"


class ReencodedTexts(Texts):
    """Class texts that go through the text tower whenever they are asked for, with a graph."""

    def __init__(self, run: Run) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "scale", run.networks.texts.scale)

    @property
    def weights(self) -> Tensor:
        """Unit float32 [K, dim], new each time."""
        run: Run = self._run  # type: ignore[attr-defined]
        labels = run.classifier.label_set
        prompts = [text for label in labels.labels for text in labels.prompts(label)]
        return F.normalize(run.encoder.encode_text(prompts), dim=-1)


# Whose scripts encode the prompts in every forward, and use autocast on a GPU.
REENCODED = ("tecoa", "pmg_aft", "hpt_gpd")


def plain_dtype(run: Run) -> torch.dtype:
    """What the published script of the method would compute in on this device."""
    half = run.config.method in REENCODED and run.fabric.device.type == "cuda"
    return torch.float16 if half else torch.float32


def plain_step(run: Run, batch: Batch) -> None:
    """One step as the published scripts write it, without their loss scaling."""
    dtype = plain_dtype(run)
    with torch.autocast(run.fabric.device.type, dtype, enabled=dtype != torch.float32):
        _plain_step(run, batch)


def _plain_step(run: Run, batch: Batch) -> None:
    method, encoder = run.method, run.encoder
    encoder.requires_grad_(True)
    texts = ReencodedTexts(run) if run.config.method in REENCODED else run.networks.texts
    networks = replace(run.networks, student=encoder.encode_image, texts=texts)
    batch = replace(batch, anchor=run.networks.original(batch.images)) if method.anchored else batch
    objective, items = method.objective(networks, batch), torch.arange(len(batch.images), device=batch.images.device)
    delta = torch.zeros_like(batch.images, requires_grad=True)
    threat = run.config.attack.threat
    for _ in range(run.config.attack.iterations):
        torch.autograd.backward(objective(encoder.encode_image(batch.images + delta), items).mean())
        assert delta.grad is not None
        delta = (delta + delta.grad.sign() * run.config.attack.step / 255).clamp(-threat.eps, threat.eps)
        delta = delta.detach().requires_grad_(True)
    encoder.model.zero_grad(set_to_none=True)
    phase = run.stretch().phase.name
    losses = method.loss(networks, batch, (batch.images + delta.detach()).clamp(0, 1), phase)
    clean = encoder.encode_image(batch.images)  # for the log, its graph kept
    torch.autograd.backward(losses.total)
    torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
    del clean
    encoder.model.zero_grad(set_to_none=True)
    encoder.requires_grad_(False)
    encoder.model.visual.requires_grad_(True)


def objective_seconds(run: Run, batch: Batch) -> float:
    """What the method's own arithmetic costs in one attack step: its objective and the gradient to the features."""
    batch = replace(batch, anchor=run.networks.original(batch.images)) if run.method.anchored else batch
    objective = run.method.objective(run.networks, batch)
    items = torch.arange(len(batch.images), device=batch.images.device)
    features = run.networks.original(batch.images).detach().requires_grad_(True)

    def work() -> None:
        torch.autograd.grad(objective(features, items).sum(), features)

    return min(timed(work, run.fabric.device) for _ in range(5))


def noise_overrides(folder: Path, config: RobustConfig) -> list[str]:
    """Overrides that give a config pictures of noise, in ten classes with a tree over them, and random weights."""
    generator = np.random.default_rng(0)
    names = [f"thing {number}" for number in range(10)]
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(16):
            values = generator.integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
            Image.fromarray(values).save(folder / name / f"{number}.png")
    tree = folder / "tree.json"
    parents = {name: f"group {number % 3}" for number, name in enumerate(names)}
    tree.write_text(json.dumps({"parents": parents}), encoding="utf-8")
    found = [
        f"base={_random(config.base)}",
        "data.kind=folder",
        f"data.path={folder}",
        "data.classes=",
        "data.workers=0",
    ]
    if config.proxy:
        found.append(f"proxy={_random(config.proxy)}")
    if config.data.tree:
        found += [f"data.tree={tree}", f'options.trees=["{tree}"]']
    return found


def _random(spec: str) -> str:
    """`ViT-L-14/openai` -> `random:ViT-L-14`: the same arithmetic; what is there without a download stays as it is."""
    tagged = spec.count("/") == 1 and ":" not in spec and not Path(spec).exists()
    return f"random:{spec.split('/')[0]}" if tagged else spec


def measure_method(config: RobustConfig, rounds: int, plain: bool = True, device: str = "auto") -> dict[str, Any]:
    """Seconds of step, floor and plain re-creation: medians over ``rounds``, and the ratios of each round's own."""
    with tempfile.TemporaryDirectory() as folder:
        fabric = make_fabric(device)
        run = start(config, Path(folder), fabric)
        made = list(step_batches(run.source, range(rounds + 1), config.batch_size, seed=0, config=config.data))
        batches = ahead(made, fabric.device)
        train_step(run, next(batches))
        anchor = run.method.anchored and run.anchors is None
        rows = []
        for drawn in batches:
            if config.method == "hpt_gpd":
                run.step = run.steps - 2  # the dearer phase, with the proxy
            step = timed(partial(train_step, run, drawn), fabric.device)
            floor = measure_floor(
                run.method, config.attack, run.tower, run.networks, config.batch_size, fabric, anchor=anchor, repeats=2
            ).step
            batch = Batch(drawn.pixels, drawn.labels, drawn.pixels.new_zeros(len(drawn.labels), 0))
            run.step = max(0, run.step - 1)
            rows.append({"step": step, "floor": floor, "objective": objective_seconds(run, batch)})
            if plain:
                rows[-1]["plain"] = timed(partial(plain_step, run, batch), fabric.device)
    slower = [row["plain"] / row["step"] for row in rows if "plain" in row]
    return {
        "dtype": str(run.tower.dtype).removeprefix("torch."),
        "seconds": {key: round(statistics.median(row[key] for row in rows), 4) for key in rows[0]},
        "objectives_of_step": round(
            statistics.median(config.attack.iterations * row["objective"] / row["step"] for row in rows), 4
        ),
        "step_over_floor": round(statistics.median(row["step"] / row["floor"] for row in rows), 3),
        **(_plain_part(run, slower) if slower else {}),
    }


def _plain_part(run: Run, slower: Sequence[float]) -> dict[str, Any]:
    dtype = str(plain_dtype(run)).removeprefix("torch.")
    return {"plain_over_step": round(statistics.median(slower), 2), "plain_dtype": dtype}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--config", default="demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    parser.add_argument("--noise", action="store_true", help="pictures of noise and random weights: no downloads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-plain", action="store_true", help="leave the plain re-creation out")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="fields of the config")
    arguments = parser.parse_args(argv)
    fixed = ["budget=0.0", "steps=1000", f"batch_size={arguments.batch}", f"threads={arguments.threads}"]
    torch.set_num_threads(arguments.threads)
    report: dict[str, Any] = {
        "config": arguments.config,
        "set": arguments.set,
        "noise": arguments.noise,
        "batch": arguments.batch,
        "device": device_name(make_fabric(arguments.device).device),
        "threads": arguments.threads,
        "seed": 0,
        "commit": commit(),
        "methods": {},
    }
    print(f"{'method':14} {'dtype':9} {'step':>8} {'over floor':>11} {'objectives':>11} {'plain over step':>16}")
    for method in arguments.methods:
        overrides = [*fixed, "evaluate_count=0", *arguments.set]
        config = load_recipe(method, arguments.config, overrides)
        with tempfile.TemporaryDirectory() as folder:
            if arguments.noise:
                overrides += noise_overrides(Path(folder), config)
                config = load_recipe(method, arguments.config, overrides)
            found = measure_method(config, arguments.rounds, not arguments.no_plain, arguments.device)
        report["methods"][method] = {"iterations": config.attack.iterations, **found}
        print(
            f"{method:14} {found['dtype']:9} {found['seconds']['step']:7.3f}s {found['step_over_floor']:11.2f} "
            f"{found['objectives_of_step']:11.1%} "
            f"{found.get('plain_over_step', '-'):>16}",
            flush=True,
        )
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
