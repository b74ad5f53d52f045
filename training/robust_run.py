"""A robust-training run, set up: encoders, towers, texts, data, optimisers, and what a checkpoint brings back."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ironclip.artifact import check_saveable
from ironclip.classifier import Classifier
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder, pick_device
from training.anchors import AnchorCache
from training.checkpoint import REPORTING, CheckpointError, load_checkpoint
from training.methods.base import Batch, Method, Networks, Phase, Texts, Weights
from training.recipe import RobustConfig, make_method, picture_units
from training.sources import Source, make_source
from training.throughput import multiply_adds
from training.towers import ImageTower, build_optimisers, fastest_dtype

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


# A resumed run may report otherwise; another length would be another schedule.
MAY_CHANGE = REPORTING | {"evaluate_every", "evaluate_count", "evaluate_iterations", "keep_anchors"}


def comparable(config: RobustConfig) -> dict[str, Any]:
    """What two parts of one run must agree on (MAY_CHANGE apart): not how many processes prepare the batches."""
    values = asdict(config)
    del values["data"]["workers"]
    return values


def essence(config: RobustConfig) -> dict[str, Any]:
    """What a finished run's weights depend on."""
    return {key: value for key, value in comparable(config).items() if key not in MAY_CHANGE}


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
    made_of: dict[str, str]
    step: int = 0
    kept: Weights | None = None

    def stretch(self) -> Stretch:
        """The phase of the coming step."""
        return next(stretch for stretch in self.stretches if self.step < stretch.last)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; draws depend on (seed, step), so there is no other random state."""
        return {
            "config": comparable(self.config),
            "step": self.step,
            "visual": self.tower.visual.state_dict(),
            "extra": self.networks.extra.state_dict() if self.networks.extra is not None else {},
            "kept": self.kept,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "dtype": str(self.tower.dtype).removeprefix("torch."),
            "steps": self.steps,
            "made_of": self.made_of,
        }


def make_fabric(device: str = "auto") -> Fabric:
    """One process, or as many as torchrun started.

    Args:
        device: ``auto`` takes the best there is; ``cpu``, ``cuda`` or ``cuda:N`` is for one process.

    Raises:
        OptionError: the device is not there.
    """
    ranks, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device != "auto":
        found = pick_device(device)
        devices: list[int] | int = 1 if found.type == "cpu" else [found.index or 0]
        fabric = Fabric(accelerator=found.type, devices=devices)
        fabric.launch()
        return fabric
    fabric = Fabric(devices=local, num_nodes=ranks // local, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    return fabric


def start(config: RobustConfig, folder: Path, fabric: Fabric) -> Run:
    """Set everything up, from the folder's checkpoint if it has one.

    Raises:
        OptionError: a method without the proxy that it needs, or a batch that the ranks cannot share.
        ArtifactError: a base of which no artifact could be written in the end.
    """
    method = make_method(config.method, config.options)
    if method.proxy and not config.proxy:
        raise OptionError(f"{config.method} needs an encoder of another architecture: set proxy=SPEC")
    if config.batch_size % (fabric.world_size * config.accumulate):
        raise OptionError(
            f"batch_size {config.batch_size} cannot be split among {fabric.world_size} processes "
            f"in {config.accumulate} parts each"
        )
    checkpoint = load_checkpoint(folder / "checkpoint.pt", comparable(config), MAY_CHANGE)
    encoder, original = (load_encoder(config.base).to(fabric.device) for _ in range(2))
    check_saveable(encoder)  # now, not after the last step
    encoder.provenance = {}
    encoder.head = Head()  # the methods train cosines; the hierarchical one puts its own in the end
    proxy = _load_proxy(config, fabric) if method.proxy else None
    made_of = {"base": original.digest} | ({"proxy": proxy.digest} if proxy is not None else {})
    check_same(checkpoint, made_of, folder)
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
        batch_size=config.batch_size,
        **(_proxy(proxy, config, label_set, dtype) if proxy is not None else {}),
    )
    module: Any = LossModule(method, tower, networks)
    optimisers: list[Any] = build_optimisers(
        module, config.optimiser, config.weight_decay, betas=config.betas, momentum=config.momentum
    )
    module, *optimisers = fabric.setup(module, *optimisers)
    steps = (checkpoint or {}).get("steps") or config.steps
    steps = steps or _steps_of_budget(config, method, tower, networks, source, part)
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
        anchors=_anchors(folder, config, source, original, dtype, fabric) if keeps else None,
        made_of=made_of,
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


def check_same(checkpoint: dict[str, Any] | None, made_of: dict[str, str], folder: Path) -> None:
    """Raise CheckpointError where what a spec leads to has been exchanged since the run began."""
    for what, digest in (checkpoint or {}).get("made_of", {}).items():
        if digest != made_of.get(what):
            raise CheckpointError(
                f"{folder / 'checkpoint.pt'} was made with another {what} of the same name (digest {digest[:12]}, now "
                f"{str(made_of.get(what))[:12]}); use another run folder"
            )


def _load_proxy(config: RobustConfig, fabric: Fabric) -> Encoder:
    """The encoder that is distilled; raises OptionError where it decides by another head than cosines."""
    encoder = load_encoder(config.proxy).to(fabric.device).requires_grad_(False)
    if encoder.head.type != "cosine":
        raise OptionError(
            f"the proxy {config.proxy} has a {encoder.head.type} head; one that decides by cosines is needed"
        )
    return encoder


def _proxy(encoder: Encoder, config: RobustConfig, label_set: LabelSet, dtype: torch.dtype) -> dict[str, Any]:
    """The proxy's part of `Networks`; pixels are resized to its own resolution where that differs."""
    encoder = encoder.double() if dtype == torch.float64 else encoder
    templates = list(config.data.templates) or list(encoder.default_templates)
    texts = _texts(Classifier(encoder, LabelSet.parse(list(label_set.names), templates)), dtype)
    tower, side = ImageTower(encoder, dtype).frozen(), encoder.resolution

    def resized(pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != side:
            pixels = nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return tower(pixels)

    return {"proxy": resized, "proxy_texts": texts}


def _anchors(
    folder: Path, config: RobustConfig, source: Source, original: Encoder, dtype: torch.dtype, fabric: Fabric
) -> AnchorCache:
    data = json.dumps({**asdict(config.data), "workers": 0}, sort_keys=True, default=str).encode()
    pictures = hashlib.sha256(data + source.labels.numpy().tobytes()).hexdigest()
    key = f"{original.digest} {dtype} {len(source.labels)} {pictures}"
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
