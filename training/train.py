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
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ironclip.attacks import Problem, WhiteBox, drive
from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from training.anchors import AnchorCache
from training.checkpoint import NonFiniteLoss, load_checkpoint, save_checkpoint
from training.methods.base import Batch, Method, Networks, Phase, Texts, Weights
from training.recipe import RobustConfig, make_method, picture_units
from training.runlog import RunLog
from training.schedule import warmup_cosine
from training.sources import Source, StepBatch, make_source, step_batches
from training.throughput import measure_floor, multiply_adds
from training.towers import ImageTower, build_optimisers, fastest_dtype, now
from training.watch import Watch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class LossModule(nn.Module):
    """A method's loss as one module, so that DistributedDataParallel sees one forward a step."""

    def __init__(self, method: Method, tower: ImageTower, networks: Networks) -> None:
        super().__init__()
        self.visual, self.extra = tower.visual, networks.extra  # what is trained
        self._method, self._tower, self._networks = method, tower, networks

    def forward(
        self, images: Tensor, labels: Tensor, anchor: Tensor, adversarial: Tensor, phase: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to go down and its parts; the weights are cast once for all of the student's forwards."""
        weights = self._tower.weights()
        networks = replace(self._networks, student=lambda pixels: self._tower(pixels, weights))
        losses = self._method.loss(networks, Batch(images, labels, anchor), adversarial, phase)
        return losses.total, losses.parts


@dataclass(frozen=True)
class Stretch:
    """A phase of the run in steps: first (inclusive) to last (exclusive)."""

    phase: Phase
    first: int
    last: int


def stretches(method: Method, steps: int) -> list[Stretch]:
    """The phases of a run of ``steps`` steps, in order; the last one takes what rounding leaves."""
    result, first, share = [], 0, 0.0
    for phase in method.phases:
        share += phase.share
        last = steps if phase is method.phases[-1] else round(share * steps)
        result.append(Stretch(phase, first, last))
        first = last
    return result


@dataclass
class Run:
    """A run in progress: what the steps change, and what they read."""

    config: RobustConfig
    steps: int
    fabric: Fabric
    method: Method
    encoder: Encoder
    tower: ImageTower
    networks: Networks
    module: Any
    optimisers: list[Any]
    source: Source
    classifier: Classifier
    anchors: AnchorCache | None
    stretches: list[Stretch]
    epoch: int
    step: int = 0
    kept: Weights | None = None

    def stretch(self) -> Stretch:
        """The phase of the coming step."""
        return next(stretch for stretch in self.stretches if self.step < stretch.last)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; draws depend on (seed, step), so there is no other random state."""
        return {
            "config": asdict(self.config),
            "step": self.step,
            "visual": self.tower.visual.state_dict(),
            "extra": self.networks.extra.state_dict() if self.networks.extra is not None else {},
            "kept": self.kept,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "dtype": str(self.tower.dtype).removeprefix("torch."),
        }


def make_fabric() -> Fabric:
    """One process, or as many as torchrun started."""
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(devices=local, num_nodes=ranks // local, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    return fabric


def start(config: RobustConfig, folder: Path, fabric: Fabric) -> Run:
    """Set everything up, from the folder's checkpoint if it has one.

    Raises:
        OptionError: a method without the proxy that it needs, or a batch that the ranks cannot share.
    """
    method = make_method(config.method, config.options)
    if method.proxy and not config.proxy:
        raise OptionError(f"{config.method} needs an encoder of another architecture: set proxy=SPEC")
    if config.batch_size % (fabric.world_size * config.accumulate):
        raise OptionError(
            f"batch_size {config.batch_size} cannot be split among {fabric.world_size} processes "
            f"in {config.accumulate} parts each"
        )
    checkpoint = load_checkpoint(folder / "checkpoint.pt", asdict(config))
    encoder, original = (load_encoder(config.base).to(fabric.device) for _ in range(2))
    encoder.provenance = {}
    encoder.requires_grad_(False)
    original.requires_grad_(False)
    encoder.model.visual.requires_grad_(True)
    part = config.batch_size // (fabric.world_size * config.accumulate)
    dtype = _dtype(config, checkpoint, encoder, part, fabric)
    if dtype == torch.float64:
        encoder, original = encoder.double(), original.double()
    source = make_source(config.data, encoder.preprocessing)
    label_set = LabelSet.parse(list(source.classes), list(config.data.templates) or list(encoder.default_templates))
    classifier = Classifier(encoder, label_set)
    tower = ImageTower(encoder, dtype)
    frozen = ImageTower(original, dtype).frozen()

    def sample() -> tuple[Tensor, Tensor]:
        pixels, labels = source.probe(256, config.seed)
        with torch.no_grad():
            return frozen(pixels.to(fabric.device, encoder.mean.dtype)), labels.to(fabric.device)

    networks = Networks(
        student=tower,
        texts=_texts(classifier, dtype),
        original=frozen,
        extra=method.extra(encoder, classifier.label_set, sample),
        gather=_gather(fabric),
        **_proxy(config, label_set, dtype, fabric),
    )
    module: Any = LossModule(method, tower, networks)
    optimisers: list[Any] = build_optimisers(
        module, config.optimiser, config.weight_decay, betas=config.betas, momentum=config.momentum
    )
    module, *optimisers = fabric.setup(module, *optimisers)
    steps = config.steps or _steps_of_budget(config, method, tower, networks, source, part)
    keeps = method.anchored and source.fixed and config.keep_anchors
    run = Run(
        config=config,
        steps=steps,
        fabric=fabric,
        method=method,
        encoder=encoder,
        tower=tower,
        networks=networks,
        module=module,
        optimisers=optimisers,
        source=source,
        classifier=classifier,
        anchors=_anchors(folder, source, original, dtype, fabric) if keeps else None,
        stretches=stretches(method, steps),
        epoch=config.epoch_steps or math.ceil(len(source.labels) / config.batch_size),
    )
    if checkpoint:
        tower.visual.load_state_dict(checkpoint["visual"])
        if networks.extra is not None:
            networks.extra.load_state_dict(checkpoint["extra"])
        for optimiser, state in zip(optimisers, checkpoint["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        run.step, run.kept = checkpoint["step"], checkpoint["kept"]
    return run


def _gather(fabric: Fabric) -> Callable[[Tensor], Tensor]:
    if fabric.world_size == 1:
        return lambda values: values

    def gather(values: Tensor) -> Tensor:
        # Every rank computes the same loss of all rows: the ranks' gradients add up here, and the mean over ranks that
        # DistributedDataParallel takes gives back the one gradient.
        return torch.as_tensor(fabric.all_gather(values, sync_grads=values.requires_grad)).flatten(0, 1)

    return gather


def _dtype(
    config: RobustConfig, checkpoint: dict[str, Any] | None, encoder: Encoder, part: int, fabric: Fabric
) -> torch.dtype:
    if checkpoint:
        return DTYPES[checkpoint["dtype"]]
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    chosen, speeds = fastest_dtype(encoder, min(part, 128))
    fabric.print(f"image tower: {speeds} images/s; using {chosen}")
    return fabric.broadcast(chosen)


def _texts(classifier: Classifier, dtype: torch.dtype) -> Texts:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Texts(classifier.bank.weights.to(wide), float(classifier.encoder.logit_scale))


def _proxy(config: RobustConfig, label_set: LabelSet, dtype: torch.dtype, fabric: Fabric) -> dict[str, Any]:
    """The proxy's part of `Networks`; pixels are resized to its own resolution where that differs."""
    if not config.proxy:
        return {}
    encoder = load_encoder(config.proxy).to(fabric.device).requires_grad_(False)
    encoder = encoder.double() if dtype == torch.float64 else encoder
    templates = list(config.data.templates) or list(encoder.default_templates)
    texts = _texts(Classifier(encoder, LabelSet.parse(list(label_set.names), templates)), dtype)
    tower, side = ImageTower(encoder, dtype).frozen(), encoder.resolution

    def resized(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != side:
            pixels = nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return tower(pixels)

    return {"proxy": resized, "proxy_texts": texts}


def _anchors(folder: Path, source: Source, original: Encoder, dtype: torch.dtype, fabric: Fabric) -> AnchorCache:
    key = f"{original.digest} {dtype} {len(source.labels)}"
    with fabric.rank_zero_first(local=True):
        return AnchorCache(folder, len(source.labels), original.dim, key)


def _steps_of_budget(
    config: RobustConfig, method: Method, tower: ImageTower, networks: Networks, source: Source, part: int
) -> int:
    """Steps that the budget pays for; the proxy's cost is counted in multiply-adds, so it is the same everywhere."""
    proxy = 0.0
    if networks.proxy is not None:
        side = source.pixels(torch.zeros(1, dtype=torch.int64), torch.Generator()).to(networks.texts.weights.device)
        proxy = multiply_adds(networks.proxy, side) / multiply_adds(tower.frozen(), side)
    anchor = method.anchored and not (source.fixed and config.keep_anchors)
    units = picture_units(method, config.attack, anchor=anchor, proxy=proxy)
    return max(1, int(config.budget / (units * config.batch_size)))


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
            f"step {run.step}: gradient norm {norm.item()}, loss and parts {totals}, learning rate {rate:.2e}; resume "
            "from the last checkpoint with a smaller learning_rate, clip_norm=1.0, or dtype=float32"
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


def train(config: RobustConfig, folder: Path, fabric: Fabric | None = None) -> Path:
    """Train to the end and write the artifact; goes on from the folder's checkpoint.

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
    if config.threads:
        torch.set_num_threads(config.threads)
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
        for drawn in batches:
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
