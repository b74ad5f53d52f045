"""What a study is: which methods, how their settings are chosen, what is measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ironclip.dtypes import DTYPES
from ironclip.errors import OptionError
from training.config import from_mapping, read_config
from training.methods import METHODS
from training.retrieval import Goal


@dataclass(frozen=True)
class TuningConfig:
    """How settings are chosen.

    Attributes:
        share: of the recipe's budget (or steps) that one trial gets.
        vendor: training vendor that is left out of the trials and measured on. The base has seen it in pre-training, so
            its clean accuracy there is that of seen art; the trials are compared with each other.
        count: its pictures.
        attack, eps: what a trial is measured under (L-inf, 1/255).
        final_attack: what each method's chosen trial is measured under at that radius when one method is picked among
            all; ``attack`` if empty. Methods differ in how much they hide from one attack.
        note: what else there is to say of the choice; `ship` writes it into the artifact.
        clean_loss: points of clean accuracy that a setting may cost against the base.
        settings: overrides of the recipe, a list for each trial, the gentlest first; where one does worse than the best
            before it the rest is not tried.
    """

    vendor: str
    settings: tuple[tuple[str, ...], ...]
    share: float = 0.125
    count: int = 200
    attack: str = "apgd-ce"
    final_attack: str = ""
    eps: float = 2.0
    clean_loss: float = 8.0
    note: str = ""


@dataclass(frozen=True)
class CellsConfig:
    """Cells of an evaluation: an attack at several radii (L-inf, 1/255), on several vendors, at some levels."""

    attack: str
    eps: tuple[float, ...]
    vendors: tuple[str, ...]
    count: int
    levels: tuple[str, ...] = ("",)
    dtype: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CompareConfig:
    """What is asked beside the cells, of one vendor's pictures at one radius (L-inf, 1/255).

    Attributes:
        vendor, count, eps: the pictures and the radius.
        attack: on the decision, for the transfer matrix and the matrix of levels.
        goals: of the attacks on the embedding, see `training.retrieval`.
        embedding_attack: one that takes an objective.
        options: of the attacks.
    """

    vendor: str
    count: int
    eps: float = 2.0
    attack: str = "apgd-ce"
    goals: tuple[Goal, ...] = ("away", "towards")
    embedding_attack: str = "apgd"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyConfig:
    """A study.

    Attributes:
        recipe: config of robust training, by name or path.
        encoders: specs of encoders that are measured beside the trained ones.
        methods: names in METHODS.
        data: folder of the built emoji data.
        tuning: how settings are chosen.
        cells: what is measured.
        dtype: that encoders are measured in, as served (`Encoder.served`); a cell may name another.
        compare: transfer, levels, retrieval and depth; none of it if None.
    """

    recipe: str
    encoders: tuple[str, ...]
    methods: tuple[str, ...]
    tuning: TuningConfig
    data: str = "data/demo"
    cells: tuple[CellsConfig, ...] = ()
    dtype: str = "float32"
    compare: CompareConfig | None = None


# What a service may choose.


def load_study(name: str) -> StudyConfig:
    """A study by name (a file in ``training/configs/study``) or path; raises OptionError."""
    values = read_config(name, "study")
    cells = tuple(from_mapping(CellsConfig, cell, "cells") for cell in values.pop("cells", []))
    config = from_mapping(StudyConfig, {**values, "cells": ()})
    unknown = sorted(set(config.methods) - set(METHODS))
    if unknown:
        raise OptionError(f"{name}: there is no method {unknown[0]!r}; there are: {', '.join(METHODS)}")
    dtypes = {config.dtype, *(cell.dtype or config.dtype for cell in cells)}
    if not dtypes <= set(DTYPES):
        raise OptionError(f"{name}: dtype is one of {', '.join(DTYPES)}, not {(dtypes - set(DTYPES)).pop()!r}")
    return StudyConfig(**{**config.__dict__, "cells": cells})
