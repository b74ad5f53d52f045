"""`pretrain`: contrastive (CLIP) pre-training of a small open_clip model from scratch, from pictures with names.

Each step draws pictures and captions from (seed, step) alone, so a run that is killed and started again ends with
the same weights as one that was not. The loss has two parts:

* CLIP's symmetric cross-entropy between pictures and their captions (Radford et al. 2021), where a caption that is
  known to be true of another picture of the batch ("a vegetable") is left out of that picture's denominator;
* cross-entropy of each picture against prompts of the tree's three levels: a random part of all names, all
  subgroups, all groups. Prompts, not a classifier: what is learnt is the text tower.
"""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ironclip.encoder import Encoder
from training.augment import AugmentConfig, augment
from training.captions import TEMPLATES, CaptionTable
from training.checkpoint import NonFiniteLoss, load_checkpoint, save_checkpoint
from training.export import export
from training.sampling import Sampler, emoji_sampler
from training.schedule import warmup_cosine
from training.towers import (
    ImageTower,
    TextTower,
    build_encoder,
    build_optimisers,
    fast_products,
    fastest_dtype,
    update_average,
)

LEVELS = ("name", "subgroup", "group")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a pre-training run depends on.

    Attributes:
        name: of the encoder, and of the run folder.
        description: one line for ``ironclip.json``.
        model: open_clip's ``model_cfg``.
        preprocess: open_clip's ``preprocess_cfg``.
        data: folder that `build-data` wrote.
        left_out: training vendors kept out, to choose settings on.
        style_weights: how often a picture is drawn, by its style; ``icon`` is for general icon sets.
        flag_weight: how often a flag is drawn, beside 1 for other names.
        caption_weights: how often each kind of caption is drawn (name, alias, tag, subgroup, group).
        level_weights: of the prompt losses of the three levels (name, subgroup, group).
        name_prompts: how many names each picture is compared with in the name loss.
        label_smoothing: of the prompt losses.
        dtype: ``auto`` (timed at the start), ``float32`` or ``bfloat16`` for the image tower.
        optimiser: ``adamw``, or ``muon`` for the matrices (see `training.muon`) and AdamW for the rest.
        ema: decay of the weight average that is exported.
    """

    name: str
    model: dict[str, Any]
    preprocess: dict[str, Any]
    steps: int
    description: str = ""
    data: str = "data/demo"
    left_out: tuple[str, ...] = ()
    style_weights: dict[str, float] = field(
        default_factory=lambda: {"plain": 1.0, "outlined": 0.5, "line": 0.3, "icon": 0.5}
    )
    flag_weight: float = 0.4
    caption_weights: tuple[float, ...] = (0.4, 0.15, 0.2, 0.17, 0.08)
    level_weights: tuple[float, ...] = (1.0, 0.3, 0.1)
    name_prompts: int = 512
    label_smoothing: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch_size: int = 256
    optimiser: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 200
    clip_norm: float = 1.0
    ema: float = 0.998
    dtype: str = "auto"
    threads: int = 2
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 500


def masked_clip_loss(logits: Tensor, truths: Tensor) -> Tensor:
    """Symmetric cross-entropy over a batch, known truths beside the diagonal left out.

    Args:
        logits: float [B, B], picture i against caption j, temperature included.
        truths: bool [B, B], caption j is known to be true of picture i.

    Returns:
        Scalar: the mean of the picture-to-caption and caption-to-picture losses.
    """
    others = truths & ~torch.eye(len(truths), dtype=torch.bool)
    logits = logits.masked_fill(others, -torch.inf)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@dataclass
class Run:
    """A run in progress: what the steps change, and what they draw from.

    ``lengths`` notes at which step which ``config.steps`` took over, for runs resumed with another length.
    """

    config: PretrainConfig
    encoder: Encoder
    average: Encoder
    optimisers: list[torch.optim.Optimizer]
    tower: ImageTower
    texts: TextTower
    sampler: Sampler
    captions: CaptionTable
    step: int = 0
    lengths: dict[str, int] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs; draws depend on (seed, step), so there is no other random state."""
        return {
            "config": asdict(self.config),
            "step": self.step,
            "lengths": self.lengths,
            "model": self.encoder.model.state_dict(),
            "average": self.average.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "dtype": str(self.tower.dtype).removeprefix("torch."),
        }


def _prompt_losses(run: Run, features: Tensor, names: Tensor, texts: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of normalised picture features against the prompts of the three levels."""
    scale = run.encoder.logit_scale
    sizes = [len(others), len(run.captions.subgroups), len(run.captions.groups)]
    position = torch.zeros(len(run.captions.labels), dtype=torch.long)
    position[others] = torch.arange(len(others))
    targets = [position[names], run.captions.subgroup_of[names], run.captions.group_of[names]]
    return {
        level: F.cross_entropy(scale * features @ part.T, target, label_smoothing=run.config.label_smoothing)
        for level, part, target in zip(LEVELS, torch.split(texts, sizes), targets, strict=True)
    }


def compute_loss(run: Run, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
    """One batch: draw, augment, encode both sides, and add up the losses."""
    config, captions = run.config, run.captions
    rgba, names = run.sampler.draw(config.batch_size, generator)
    pixels = augment(rgba, run.encoder.resolution, config.augment, generator)
    drawn = captions.draw(names, config.caption_weights, generator)
    present = torch.unique(names)
    absent = torch.randperm(len(captions.labels), generator=generator)
    absent = absent[~torch.isin(absent, present)][: max(0, config.name_prompts - len(present))]
    others = torch.cat([present, absent])
    words = [captions.labels[index] for index in others.tolist()] + captions.subgroups + captions.groups
    picks = torch.randint(len(TEMPLATES), (len(words),), generator=generator).tolist()
    prompts = [TEMPLATES[pick].format(word) for pick, word in zip(picks, words, strict=True)]
    texts = F.normalize(run.texts([caption.text for caption in drawn] + prompts), dim=-1)
    features = F.normalize(run.tower(pixels), dim=-1)
    logits = run.encoder.logit_scale * features @ texts[: len(names)].T
    contrastive = masked_clip_loss(logits, captions.truths(drawn, names))
    levels = _prompt_losses(run, features, names, texts[len(names) :], others)
    loss = contrastive
    for weight, value in zip(config.level_weights, levels.values(), strict=True):
        loss = loss + weight * value
    parts = {"contrastive": contrastive, **levels}
    return loss, {key: round(value.item(), 4) for key, value in parts.items()}


def train_step(run: Run) -> dict[str, float]:
    """One optimiser step; raises NonFiniteLoss (with the parts of the loss) rather than step on a NaN."""
    config = run.config
    rate = warmup_cosine(run.step, config.steps, config.warmup, config.learning_rate)
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + run.step)
    run.encoder.model.train()
    run.encoder.model.zero_grad(set_to_none=True)
    with fast_products():
        loss, parts = compute_loss(run, generator)
        torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(run.encoder.model.parameters(), config.clip_norm)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise NonFiniteLoss(
            f"step {run.step}: loss {loss.item()}, gradient norm {norm.item()}, parts {parts}, "
            f"learning rate {rate:.2e}; begin again in another run folder with a smaller learning_rate or dtype=float32"
        )
    for optimiser in run.optimisers:
        optimiser.step()
    run.encoder.model.logit_scale.data.clamp_(0, math.log(100))  # type: ignore[operator]
    update_average(run.average, run.encoder, min(config.ema, (1 + run.step) / (10 + run.step)))
    run.step += 1
    return {"loss": round(loss.item(), 4), **parts, "norm": round(norm.item(), 3), "rate": rate}


def start(config: PretrainConfig, folder: Path) -> Run:
    """Set everything up, from the folder's checkpoint if it has one."""
    sampler, names = emoji_sampler(Path(config.data), config.left_out, config.style_weights, config.flag_weight)
    encoder = build_encoder(config.model, config.preprocess, config.seed)
    average = build_encoder(config.model, config.preprocess, config.seed)
    encoder.model.to(memory_format=torch.channels_last)
    optimisers = build_optimisers(encoder.model, config.optimiser, config.weight_decay)
    checkpoint = load_checkpoint(folder / "checkpoint.pt", asdict(config))
    dtype = checkpoint["dtype"] if checkpoint else config.dtype
    if dtype == "auto":
        chosen, speeds = fastest_dtype(encoder, min(config.batch_size, 128))
        print(f"image tower: {speeds} images/s; using {chosen}", flush=True)
    else:
        chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    run = Run(
        config=config,
        encoder=encoder,
        average=average,
        optimisers=optimisers,
        tower=ImageTower(encoder, chosen),
        texts=TextTower(encoder),
        sampler=sampler,
        captions=CaptionTable(names),
    )
    if checkpoint:
        encoder.model.load_state_dict(checkpoint["model"])
        average.model.load_state_dict(checkpoint["average"])
        for optimiser, state in zip(optimisers, checkpoint["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        run.step = checkpoint["step"]
        run.lengths = checkpoint.get("lengths") or {"0": checkpoint["config"]["steps"]}
        print(f"resuming at step {run.step} of {config.steps}", flush=True)
    if config.steps not in list(run.lengths.values())[-1:]:
        run.lengths[str(run.step)] = config.steps
    return run


def pretrain(config: PretrainConfig, folder: Path) -> Path:
    """Train until ``config.steps`` and write the artifact.

    Args:
        config: the resolved config; also written to ``folder/config.json``.
        folder: the run folder: ``checkpoint.pt``, ``log.jsonl``, and in the end ``artifact/``.

    Returns:
        The artifact's folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    run = start(config, folder)
    print(f"{len(run.sampler)} pictures, {len(run.captions.labels)} names, {config.steps} steps", flush=True)
    stop = []
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    began, first = time.monotonic(), run.step
    try:
        with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
            while run.step < config.steps and not stop:
                entry = train_step(run)
                if run.step % config.log_every == 0 or run.step == config.steps:
                    pace = (time.monotonic() - began) / (run.step - first)
                    log.write(json.dumps({"step": run.step, "seconds_per_step": round(pace, 4), **entry}) + "\n")
                    log.flush()
                    left = pace * (config.steps - run.step)
                    print(
                        f"step {run.step}/{config.steps} loss {entry['loss']:.3f} name {entry['name']:.3f} "
                        f"subgroup {entry['subgroup']:.3f} rate {entry['rate']:.1e} "
                        f"{config.batch_size / pace:.0f} images/s, {left / 60:.1f} min left",
                        flush=True,
                    )
                if run.step % config.checkpoint_every == 0:
                    save_checkpoint(folder / "checkpoint.pt", run.state())
    finally:
        signal.signal(signal.SIGTERM, previous)
        torch.set_num_threads(threads)
    save_checkpoint(folder / "checkpoint.pt", run.state())
    return export_run(run, folder / "artifact") if run.step >= config.steps else folder


def export_run(run: Run, folder: Path) -> Path:
    """Write the run's averaged weights as an artifact, finished or not; the config says how far it got."""
    settings = asdict(run.config) | {"steps_done": run.step}
    if len(run.lengths) > 1:
        settings["steps_from_step"] = run.lengths
    return export(run.average, run.captions, settings, folder)
