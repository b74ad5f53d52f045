"""What a GPU answers is what the CPU answers: attacks, training steps, a cell from the command line, the service."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from ironclip.attacks import ATTACKS, ThreatModel
from ironclip.classifier import Classifier, predict
from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.labels import LabelSet
from service.runtime import ServedEncoder
from tests.conftest import make_residual_encoder, make_tiny_encoder
from tests.training.robust_world import CONV, VIT, make_artifact, write_config
from training.__main__ import main
from training.ahead import ahead
from training.checkpoint import save_checkpoint
from training.methods import METHODS
from training.recipe import load_recipe
from training.robust_run import make_fabric, start
from training.robustness import Cell, Sample, measure
from training.sources import StepBatch, step_batches
from training.train import train, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

NAMES = [f"thing {number}" for number in range(12)]


def _sample(encoder: Encoder, count: int = 24) -> Sample:
    side = encoder.resolution
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    answers = predict(Classifier(encoder, LabelSet.parse(NAMES)), pixels.to(torch.uint8)).logits.argmax(1)
    return Sample("noise", pixels.to(torch.uint8), answers)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "autoattack"])
def test_an_attack_does_the_same_on_both(attack: str, tmp_path: Path) -> None:
    options = {"square": {"queries": 200}}.get(attack, {})
    found = []
    for device in ("cpu", "cuda"):
        encoder = make_tiny_encoder().eval()
        sample = _sample(encoder)
        cell = Cell(attack, ThreatModel("linf", 32 / 255), options)
        classifier = Classifier(encoder.to(device).served(torch.float32), LabelSet.parse(NAMES))
        found.append(measure(classifier, sample, cell, tmp_path / f"{device}.json")["outcomes"])
    differing = sum(ours != theirs for ours, theirs in zip(*found, strict=True))
    assert differing <= 2, found
    assert found[1].count("x") > 0 or attack == "square"


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_does_the_same_on_both(method: str, demo_data: Path, tmp_path: Path) -> None:
    base, proxy = make_artifact(tmp_path / "conv", CONV), make_artifact(tmp_path / "vit", VIT, seed=1)
    config = load_recipe(
        method, str(write_config(tmp_path / "tiny.toml", base, proxy, demo_data)), ["dtype='float64'", "steps=3"]
    )
    losses = {}
    for device in ("cpu", "cuda"):
        run = start(config, tmp_path / device, Fabric(accelerator=device, devices=1))
        batches = step_batches(run.source, range(3), config.batch_size, seed=0, config=config.data)
        losses[device] = [train_step(run, drawn)["loss"] for drawn in batches]
        assert run.tower(torch.zeros(1, 3, 32, 32, device=run.fabric.device).double()).device.type == device
    torch.testing.assert_close(losses["cpu"], losses["cuda"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_on_the_gpu(method: str, demo_data: Path, tmp_path: Path) -> None:
    base, proxy = make_artifact(tmp_path / "vit", VIT), make_artifact(tmp_path / "conv", CONV, seed=1)
    config = write_config(tmp_path / "tiny.toml", base, proxy, demo_data)
    recipe = load_recipe(method, str(config), ["evaluate_count=0", "dtype='float64'"])
    train(recipe, tmp_path / "straight")
    run = start(recipe, tmp_path / "stopped", make_fabric())
    for drawn in step_batches(run.source, range(5), recipe.batch_size, seed=recipe.seed, config=recipe.data):
        train_step(run, drawn)
    save_checkpoint(tmp_path / "stopped" / "checkpoint.pt", run.state())
    train(recipe, tmp_path / "stopped")
    straight, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True, map_location="cpu")["visual"]
        for name in ("straight", "stopped")
    )
    for key, value in straight.items():
        torch.testing.assert_close(value, stopped[key], rtol=1e-7, atol=1e-9)


def test_batches_are_moved_ahead_in_order() -> None:
    device = torch.device("cuda")

    def made(count: int) -> Iterator[StepBatch]:
        for number in range(count):
            values = torch.full((2,), number)
            yield StepBatch(torch.full((64, 3, 64, 64), float(number)), values, values, values)
        if count == 7:
            raise OptionError("no more")

    for number, drawn in enumerate(ahead(made(6), device)):
        assert {drawn.pixels.device.type, drawn.labels.device.type, drawn.positions.device.type} == {"cuda"}
        assert drawn.indices.tolist() == [number, number]
        assert drawn.pixels.eq(number).all()
    with pytest.raises(OptionError, match="no more"):
        list(ahead(made(7), device))
    next(iter(ahead(made(6), device)))
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "one-ahead"]


def test_a_cell_from_the_command_line(demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = str(make_artifact(tmp_path / "conv", CONV))
    shared = ["--encoder", spec, "--data", str(demo_data), "--eps", "8", "--dtype", "bfloat16"]
    attacked = ["evaluate", *shared, "--attack", "autoattack", "--results", str(tmp_path / "cells"), "--count", "3"]
    assert main(attacked) == 0
    cell = json.loads(next((tmp_path / "cells").glob("*-autoattack-ensemble-*.json")).read_text())
    assert cell["encoder"]["device"] == torch.cuda.get_device_name()
    assert main(["evaluate", *shared[:4]]) == 0
    for command in (["levels", "--vendor", "other"], ["retrieval", "--vendor", "other", "--goal", "towards"]):
        assert main([*command, *shared, "--results", str(tmp_path / "more"), "--count", "3"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_service_answers_alike(dtype: str) -> None:
    encoder = make_residual_encoder().eval()
    side = encoder.resolution
    pictures = list(torch.randint(0, 256, (40, 3, side, side), dtype=torch.uint8))
    with torch.no_grad():
        expected = encoder.encode_image(torch.stack(pictures) / 255)

    async def scenario() -> None:
        served = ServedEncoder("small", encoder.to("cuda"), dtype=dtype, max_batch=16)
        served.start()
        rows = [row for row in await served.encode_images(pictures, make_defence()) if isinstance(row, torch.Tensor)]
        assert torch.nn.functional.cosine_similarity(torch.cat(rows), expected).min() > 0.999
        await served.stop()

    asyncio.run(scenario())
