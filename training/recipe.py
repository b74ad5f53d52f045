"""The config of a robust-training run: what a method trains, on which pictures, against which attack, for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ironclip.attacks import PGD, ThreatModel
from ironclip.errors import OptionError
from training.config import from_mapping, merge, options_of, read_config, read_overrides
from training.methods import METHODS
from training.methods.base import Method
from training.sources import DataConfig


@dataclass(frozen=True)
class AttackConfig:
    """The attack inside a training step: PGD on the method's own objective.

    Attributes:
        norm: of the threat model.
        eps: radius; for ``linf`` in units of 1/255, for ``l2`` in units of a pixel's full range.
        iterations: k, gradient steps; 0 trains on clean pictures.
        step: length of a step, in the unit of eps.
        momentum: see `ironclip.attacks.PGD`; what the papers' scripts call momentum is without effect for ``linf``.
        random_start: begin at a random point of the ball.
    """

    norm: Literal["linf", "l2"] = "linf"
    eps: float = 2.0
    iterations: int = 10
    step: float = 1.0
    momentum: float = 0.0
    random_start: bool = True

    @property
    def threat(self) -> ThreatModel:
        """In pixel units."""
        return ThreatModel(self.norm, self.eps / 255 if self.norm == "linf" else self.eps)

    def pgd(self, seed: int) -> PGD:
        """Exactly `iterations` gradients, no early stop: every picture of the batch is trained on."""
        return PGD(
            iterations=self.iterations,
            step_size=self.step / 255 if self.norm == "linf" else self.step,
            momentum=self.momentum,
            random_start=self.random_start,
            keep="last",
            stop_fooled=False,
            seed=seed,
        )


@dataclass(frozen=True)
class RobustConfig:
    """Everything a robust-training run depends on.

    Attributes:
        name: of the encoder, and of the run folder.
        method: a name in METHODS.
        base: spec of the encoder to start from.
        steps: optimiser steps. With ``budget`` they follow from it.
        budget: forward-units of one picture each (a forward of the tower is 1, its backward to the pixels 1, to the
            weights 2): steps = budget / (units of a picture in this method * batch_size). Methods are comparable at one
            budget.
        batch_size: pictures of a step, over all ranks.
        accumulate: parts that a rank's share of a batch is cut into, to save memory; a loss that couples a batch then
            sees one part at a time.
        learning_rate: peak; its phases may scale it.
        warmup: steps of linear warm-up in each phase (at most a quarter of the phase).
        betas, momentum: of AdamW and SGD.
        clip_norm: largest gradient norm; 0 does not clip.
        dtype: ``auto`` (timed at the start), ``float32``, ``bfloat16``, or ``float64`` (masters too, for tests).
        statistics: ``frozen`` keeps batch norms in evaluation mode; ``batch`` updates them in the loss's forwards.
        proxy: spec of an encoder of another architecture, for methods that need one.
        options: of the method.
        keep_anchors: keep f_0(x) in a file of the run folder where pictures are fixed: N * dim * 4 bytes.
        evaluate_every, evaluate_count, evaluate_iterations: how often clean and PGD accuracy are taken, on how many
            pictures of the training data, with how many iterations at the training radius; 0 pictures: never.
        epoch_steps: steps of what a method calls an epoch; 0 takes one pass over the pictures.
    """

    name: str
    method: str
    base: str
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    description: str = ""
    steps: int = 0
    budget: float = 0.0
    batch_size: int = 128
    accumulate: int = 1
    optimiser: Literal["adamw", "sgd", "muon"] = "adamw"
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    warmup: int = 1400
    clip_norm: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    statistics: Literal["frozen", "batch"] = "frozen"
    proxy: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    keep_anchors: bool = True
    evaluate_every: int = 1000
    evaluate_count: int = 256
    evaluate_iterations: int = 10
    epoch_steps: int = 0
    threads: int = 0
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.budget > 0):
            raise OptionError("give one of steps and budget, above 0")
        for name in ("batch_size", "accumulate", "evaluate_every", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is at least 1, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise OptionError(f"learning_rate is above 0, not {self.learning_rate}")
        if self.batch_size % self.accumulate:
            raise OptionError(f"accumulate {self.accumulate} does not divide batch_size {self.batch_size}")


def make_method(name: str, options: dict[str, Any]) -> Method:
    """The method of this name with these options; raises OptionError listing what exists."""
    if name not in METHODS:
        raise OptionError(f"There is no method {name!r}; there are: {', '.join(METHODS)}.")
    return options_of(METHODS[name], options, f"options of {name}")


def load_recipe(method: str, name: str, overrides: Sequence[str] = ()) -> RobustConfig:
    """Read a robust-training config for one method.

    A config file holds what all methods share, and a table ``[methods.NAME]`` with what one has of its own.

    Args:
        method: a name in METHODS.
        name: a file in ``training/configs/robust``, or a path.
        overrides: ``key=value``, last.

    Raises:
        OptionError: no such method, config or key.
    """
    if method not in METHODS:
        raise OptionError(f"There is no method {method!r}; there are: {', '.join(METHODS)}.")
    shared = read_config(name, "robust")
    own = shared.pop("methods", {})
    unknown = sorted(set(own) - set(METHODS))
    if unknown:
        raise OptionError(f"{name}: there is no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    values = merge({"name": f"{name}-{method}", "method": method}, shared, own.get(method, {}))
    return from_mapping(RobustConfig, merge(values, read_overrides(overrides)))


def picture_units(method: Method, attack: AttackConfig, *, anchor: bool, proxy: float = 0.0) -> float:
    """Forward-units that one picture costs in one step at least.

    Args:
        method: whose loss.
        attack: its k iterations cost a forward and a backward to the pixels each.
        anchor: whether f_0(x) is computed in the step (False: kept, or not needed).
        proxy: cost of the proxy's forward in forwards of the student, where the method has one.
    """
    return 2 * attack.iterations + 3 * method.forwards + method.frozen_forwards + anchor + proxy * method.proxy
