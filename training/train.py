"""The recipe of robust training: one loop for all methods of `training.methods`, on one process or many.

A step attacks its batch on the method's objective (backward passes to the pixels alone), computes the method's loss,
and moves the weights. All that it draws is a function of (seed, step, rank): a run that was killed goes on from its
checkpoint to the same weights. Under torchrun the processes share each batch by DistributedDataParallel, through
Lightning Fabric, whose ``all_gather`` carries gradients for the losses that couple a batch. Weights are not sharded:
the largest CLIP towers fit on one accelerator with their optimiser.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ironclip.artifact import META_FILE
from ironclip.attacks import Problem, WhiteBox, drive
from ironclip.classifier import Classifier
from ironclip.errors import IronclipError
from ironclip.loading import load_encoder
from ironclip.resources import usable_cpus
from training.ahead import ahead
from training.checkpoint import NonFiniteLoss, load_checkpoint, save_checkpoint
from training.config import from_mapping
from training.methods.base import Batch
from training.recipe import RobustConfig
from training.robust_run import MAY_CHANGE, Run, Stretch, check_same, comparable, essence, make_fabric, start
from training.runlog import RunLog
from training.schedule import warmup_cosine
from training.sources import StepBatch, step_batches
from training.throughput import measure_floor
from training.towers import now
from training.watch import Watch


def adversarial_pixels(run: Run, batch: Batch, positions: Tensor) -> Tensor:
    """x': the configured PGD on the method's objective against the student as it is, [b, 3, R, R]."""
    config = run.config
    if not config.attack.iterations:
        return batch.images
    tower = run.tower.frozen()
    problem = Problem(
        images=batch.images,
        threat=config.attack.threat,
        objective=run.method.objective(replace(run.networks, student=tower), batch),
        fooled=lambda outputs, items: torch.zeros(len(items), dtype=torch.bool, device=outputs.device),
        keys=positions,
        labels=batch.labels,
    )
    attack = config.attack.pgd(seed=config.seed * 1_000_003 + run.step)
    oracle = WhiteBox(tower, problem, batch_size=len(batch.images))
    return drive(attack, problem, oracle, keep_fooled=False).images


def current_classifier(run: Run) -> Classifier:
    """The Classifier over the run's classes as the student decides now, what the method trains beside it included."""
    if run.networks.extra is not None:
        run.method.apply(run.encoder, run.networks.extra)
        run.classifier = Classifier(run.encoder, run.classifier.label_set)
    return run.classifier


def _batch_of(run: Run, drawn: StepBatch, rows: slice) -> tuple[Batch, Tensor]:
    """A part of this rank's share, on the device, with its anchors."""
    device = run.fabric.device
    wide = torch.float64 if run.tower.dtype == torch.float64 else torch.float32
    images, labels = drawn.pixels[rows].to(device, wide, non_blocking=True), drawn.labels[rows].to(device)
    if not run.method.anchored:
        anchor = images.new_zeros(len(images), 0)
    elif run.anchors is not None:
        anchor = run.anchors(drawn.indices[rows], images, run.networks.original)
    else:
        with torch.no_grad():
            anchor = run.networks.original(images)
    return Batch(images, labels, anchor), drawn.positions[rows].to(device)


def train_step(run: Run, drawn: StepBatch) -> dict[str, float]:
    """One optimiser step; raises NonFiniteLoss (with the parts of the loss) rather than step on a NaN."""
    config, stretch = run.config, run.stretch()
    length = stretch.last - stretch.first
    rate = warmup_cosine(
        run.step - stretch.first, length, min(config.warmup, length // 4), config.learning_rate * stretch.phase.rate
    )
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
    size = len(drawn.labels) // config.accumulate
    totals: dict[str, float] = {}
    run.module.zero_grad(set_to_none=True)
    for part in range(config.accumulate):
        batch, positions = _batch_of(run, drawn, slice(part * size, (part + 1) * size))
        run.encoder.model.eval()
        adversarial = adversarial_pixels(run, batch, positions)
        run.encoder.model.visual.train(config.statistics == "batch")  # type: ignore[union-attr]
        with run.fabric.no_backward_sync(run.module, enabled=part + 1 < config.accumulate):
            loss, parts = run.module(batch.images, batch.labels, batch.anchor, adversarial, stretch.phase.name)
            run.fabric.backward(loss / config.accumulate)
        for key, value in {"loss": loss, **parts}.items():
            totals[key] = totals.get(key, 0.0) + value.item() / config.accumulate
    norm = nn.utils.clip_grad_norm_(run.module.parameters(), config.clip_norm or math.inf)
    if not (math.isfinite(totals["loss"]) and torch.isfinite(norm)):
        raise NonFiniteLoss(
            f"step {run.step}: gradient norm {norm.item()}, loss and parts {totals}, learning rate {rate:.2e}; begin "
            "again in another run folder with a smaller learning_rate, clip_norm=1.0 or dtype=float32"
        )
    for optimiser in run.optimisers:
        optimiser.step()
    run.step += 1
    _after_step(run, stretch)
    return {**totals, "norm": norm.item(), "rate": rate}


def _after_step(run: Run, stretch: Stretch) -> None:
    """What the method does to the weights at the ends of epochs (a phase's last, cut-short one too) and phases."""
    ended = run.step == stretch.last
    if not ended and (run.step - stretch.first) % run.epoch:
        return
    weights = run.tower.visual.state_dict()
    new, run.kept = run.method.after_epoch(stretch.phase.name, weights, run.kept)
    if ended:
        new, run.kept = run.method.after_phase(stretch.phase.name, new, run.kept)
    with torch.no_grad():
        for key, value in weights.items():
            if new[key] is not value:
                value.copy_(new[key])


@contextmanager
def _asked_to_stop(fabric: Fabric) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come to any rank; the step in progress is finished first."""
    stop: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _: stop.append(n)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        if fabric.world_size == 1:
            yield lambda: bool(stop)
        else:
            yield lambda: bool(torch.as_tensor(fabric.all_reduce(torch.tensor(float(len(stop))), reduce_op="sum")))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _finished(config: RobustConfig, folder: Path) -> bool:
    """Whether the run is at its last step and its artifact lies there whole.

    Raises:
        CheckpointError: as for a run that goes on: it was made with another config, base or proxy.
    """
    artifact = folder / "artifact"
    if not (artifact / META_FILE).is_file():
        return False  # most runs: their checkpoint is not read twice
    checkpoint = load_checkpoint(folder / "checkpoint.pt", comparable(config), MAY_CHANGE)
    if checkpoint is None or checkpoint["step"] < checkpoint.get("steps", math.inf):
        return False
    specs = {"base": config.base, "proxy": config.proxy}
    check_same(checkpoint, {what: load_encoder(specs[what]).digest for what in checkpoint.get("made_of", {})}, folder)
    try:
        # Loading checks the files. The folder may hold what an earlier run left there.
        made = dict(load_encoder(str(artifact)).provenance["config"])
        steps = made.pop("steps_done")
        return bool(steps == checkpoint["steps"] and essence(from_mapping(RobustConfig, made)) == essence(config))
    except (IronclipError, KeyError):
        return False


def train(config: RobustConfig, folder: Path, fabric: Fabric | None = None) -> Path:
    """Train to the end and write the artifact; goes on from the folder's checkpoint, and leaves a finished run alone.

    Args:
        config: the resolved config; also written to ``folder/config.json``.
        folder: the run folder: ``checkpoint.pt``, ``log.jsonl``, ``run.png``, and in the end ``artifact/``.
        fabric: the processes; what torchrun started if None.

    Returns:
        The artifact's folder, or ``folder`` where the run was asked to stop before its end.
    """
    from training.robust_artifact import export_robust

    fabric = fabric or make_fabric()
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cpus()))
    if _finished(config, folder):
        fabric.print(f"{folder} is finished: its artifact is left as it is")
        return folder / "artifact"
    run = start(config, folder, fabric)
    first = fabric.is_global_zero
    log = RunLog(folder, run.step, run.steps, first)
    if first:
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
    log.say(
        f"{config.method} from {config.base}: {len(run.source.labels)} pictures, {len(run.source.classes)} classes, "
        f"{run.steps} steps of {config.batch_size}, {run.tower.dtype}, {fabric.world_size} processes"
        + (f"; going on at step {run.step}" if run.step else "")
    )
    batches = step_batches(
        run.source,
        range(run.step, run.steps),
        config.batch_size,
        seed=config.seed,
        config=config.data,
        rank=fabric.global_rank,
        ranks=fabric.world_size,
    )
    share = config.batch_size // fabric.world_size
    anchor = run.method.anchored and run.anchors is None
    floor = measure_floor(run.method, config.attack, run.tower, run.networks, share, fabric, anchor=anchor)
    watch = Watch(run.source, config, fabric)
    with _asked_to_stop(fabric) as stopped:
        for drawn in ahead(batches, fabric.device):
            began = now(fabric.device)
            values = train_step(run, drawn)
            watch.took(now(fabric.device) - began)
            if run.step % config.log_every == 0 or run.step == run.steps:
                log.write(run.step, {**_mean(values, fabric), **watch.speed(floor)})
            if config.evaluate_count and (run.step % config.evaluate_every == 0 or run.step == run.steps):
                log.write(run.step, watch.scores(current_classifier(run)))
            if stopped():
                break
            if run.step % config.checkpoint_every == 0:
                _save(run, folder)
    _save(run, folder)
    log.close()
    if run.step < run.steps:
        return folder
    if first:
        current_classifier(run)
        export_robust(run.encoder, config, run.source.classes, run.steps, folder / "artifact")
    fabric.barrier()
    return folder / "artifact"


def _mean(values: dict[str, float], fabric: Fabric) -> dict[str, float]:
    """Over the ranks: each has seen its own share of the batch."""
    if fabric.world_size == 1:
        return values
    mean = torch.as_tensor(fabric.all_reduce(torch.tensor(list(values.values()), dtype=torch.float64)))
    return dict(zip(values, mean.tolist(), strict=True))


def _save(run: Run, folder: Path) -> None:
    if run.fabric.is_global_zero:
        save_checkpoint(folder / "checkpoint.pt", run.state())
    run.fabric.barrier()
