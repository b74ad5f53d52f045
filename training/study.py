"""`study`: every method trained at one budget and measured alike, in small resumable parts.

Its parts may be stopped at any moment and go on: `tune` tries a few settings for each method at a share of the budget
with a training vendor left out, `train` trains each method with the setting that did best, `evaluate` measures every
encoder, cell by cell, and `compare` asks what no single number says (transfer, levels, retrieval, depth). What has been
found lies in JSON files beside the repository's docs; nothing is computed twice, and `report` draws tables and plots
from the files alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ironclip.attacks import ThreatModel
from ironclip.classifier import LEVEL_MODES
from ironclip.encoder import Encoder, Head
from ironclip.errors import OptionError
from ironclip.loading import load_encoder
from training.config import from_mapping, read_config
from training.emoji.pictures import manifest_names, read_manifest
from training.evaluate import (
    attack_emoji,
    depth_emoji,
    emoji_classifier,
    emoji_pairs,
    emoji_sample,
    levels_emoji,
    transfer_emoji,
)
from training.jsonfile import read_json, write_json
from training.methods import METHODS
from training.recipe import RobustConfig, load_recipe
from training.retrieval import Goal, caption_classifier, retrieval
from training.robust_run import essence
from training.robustness import Cell, key_of, measure
from training.study_report import report
from training.train import train


@dataclass(frozen=True)
class TuningConfig:
    """How settings are chosen.

    Attributes:
        share: of the recipe's budget (or steps) that one trial gets.
        vendor: training vendor that is left out of the trials and measured on. The base has seen it in pre-training, so
            its clean accuracy there is that of seen art; the trials are compared with each other.
        count: its pictures.
        attack, eps: what a trial is measured under (L-inf, 1/255).
        clean_loss: points of clean accuracy that a setting may cost against the base.
        settings: overrides of the recipe, a list for each trial, the gentlest first; where one does worse than the best
            before it the rest is not tried.
    """

    vendor: str
    settings: tuple[tuple[str, ...], ...]
    share: float = 0.125
    count: int = 200
    attack: str = "apgd-ce"
    eps: float = 2.0
    clean_loss: float = 8.0


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
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
PARTS = ("tune", "train", "evaluate", "compare", "report")


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


def best(trials: Sequence[Mapping[str, Any]], base_clean: float, clean_loss: float) -> Mapping[str, Any]:
    """The most robust trial of those that keep clean accuracy; where none does, the one that keeps most of it.

    A setting that collapsed at full length is passed over.
    """
    trials = [trial for trial in trials if not trial.get("collapsed")] or trials
    kept = [trial for trial in trials if trial["clean"] >= base_clean - clean_loss]
    if kept:
        return max(kept, key=lambda trial: (trial["robust"], trial["clean"]))
    return max(trials, key=lambda trial: trial["clean"])


def tune(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path) -> None:
    """Try the settings of ``methods``, in order, until one does worse than the best before it.

    ``results/tuning-METHOD.json`` holds the trials and the chosen one. A trial that was made or measured otherwise than
    the config has it now is made again.
    """
    tuning, data = config.tuning, Path(config.data)
    measured = {key: value for key, value in tuning.__dict__.items() if key not in ("settings", "clean_loss")}
    measured["dtype"] = config.dtype

    def score(spec: str) -> dict[str, Any]:
        encoder = load_encoder(spec).served(DTYPES[config.dtype])
        classifier = emoji_classifier(encoder, manifest_names(read_manifest(data)))
        sample = emoji_sample(encoder, data, tuning.vendor, tuning.count)
        cell = Cell(tuning.attack, ThreatModel("linf", tuning.eps / 255))
        path = runs / "tuning" / f"{key_of(classifier, sample, cell)[:24]}.json"
        found = measure(classifier, sample, cell, path)
        return {part: found[part] for part in ("clean", "robust", "robust_interval")}

    for method in methods:
        path = results / f"tuning-{method}.json"
        before = {trial.get("key"): trial for trial in (read_json(path) or {"trials": []})["trials"]}
        base = load_recipe(method, config.recipe, []).base
        found: dict[str, Any] = {"method": method, "measured": measured, "base": score(base), "trials": []}
        for setting in tuning.settings:
            recipe = load_recipe(method, config.recipe, setting)
            part = {"budget": recipe.budget * tuning.share, "steps": int(recipe.steps * tuning.share)}
            shorter = [f"{key}={value}" for key, value in part.items() if value]
            left_out = [f'data.left_out=["{tuning.vendor}"]', f"data.path={config.data}", "evaluate_count=0"]
            trial = load_recipe(method, config.recipe, [*setting, *shorter, *left_out])
            content = {"recipe": essence(trial), "measured": measured, "base": load_encoder(base).digest}
            key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
            if key not in before:
                artifact = train(trial, runs / "tuning" / "-".join([method, *setting]))
                if artifact.name != "artifact":
                    raise KeyboardInterrupt  # asked to stop
                before[key] = {"setting": list(setting), "key": key, **score(str(artifact))}
            found["trials"].append(before[key])
            chosen = best(found["trials"], found["base"]["clean"], tuning.clean_loss)
            found["chosen"] = chosen["setting"]
            write_json(path, found)
            if chosen is not before[key]:
                break
        print(f"{method}: {found['chosen']} of {len(found['trials'])} settings", flush=True)


def train_methods(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path) -> None:
    """Train ``methods`` with their chosen settings, to ``runs/METHOD/artifact``; finished ones are kept.

    A setting that did well for a short while may collapse at full length. Such a run is set aside, the trial is marked
    in ``results/tuning-METHOD.json``, and the method is trained with the next best setting.

    Raises:
        OptionError: a method whose settings have not been chosen, or whose artifact was made with others.
    """
    for method in methods:
        path = results / f"tuning-{method}.json"
        while True:
            found = read_json(path) or {}
            if "chosen" not in found:
                raise OptionError(f"{method} has no chosen setting: run `study --part tune --only {method}` first")
            recipe = load_recipe(method, config.recipe, [*found["chosen"], f"data.path={config.data}"])
            (trial,) = (trial for trial in found["trials"] if trial["setting"] == found["chosen"])
            stopped = False
            if not _collapsed(runs / method, trial["clean"]):  # a run that was stopped may have
                stopped = _train_one(recipe, runs / method, results / "cells" / method)
            if not _collapsed(runs / method, trial["clean"]):
                break
            (runs / method).rename(runs / f"{method}-collapsed-{trial['key']}")
            trial["collapsed"] = True
            found["chosen"] = best(found["trials"], found["base"]["clean"], config.tuning.clean_loss)["setting"]
            write_json(path, found)
            print(f"{method}: {trial['setting']} collapsed at full length; next: {found['chosen']}", flush=True)
        if stopped:
            raise KeyboardInterrupt


def _train_one(recipe: RobustConfig, folder: Path, cells: Path) -> bool:
    """Train to the end unless it is there already; whether the run was asked to stop."""
    if (folder / "artifact" / "ironclip.json").is_file():
        made = from_mapping(RobustConfig, read_json(folder / "config.json") or {})
        if essence(made) != essence(recipe):
            raise OptionError(
                f"{folder} was trained with other settings than are chosen now: delete or rename it, and {cells}"
            )
        return False
    return train(recipe, folder) == folder


def _collapsed(folder: Path, expected: float) -> bool:
    """Whether the clean accuracy last seen in a run is less than half of what a trial of its setting had (percent)."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    seen = [entry["clean"] for line in lines if "clean" in (entry := json.loads(line))]
    return bool(seen) and seen[-1] < expected / 2


def _measured(config: StudyConfig, methods: Sequence[str], runs: Path) -> dict[str, str]:
    """Row -> spec: the study's encoders, and those of ``methods`` that are trained."""
    trained = {method: str(runs / method / "artifact") for method in methods}
    there = {name: spec for name, spec in trained.items() if Path(spec, "ironclip.json").is_file()}
    return {spec.strip("/").replace("/", "-"): spec for spec in config.encoders} | there


def _rows(name: str, spec: str, dtype: str) -> Iterator[tuple[str, Encoder]]:
    """An encoder as served, and with a hyperbolic head a second time by its cosines."""
    encoder = load_encoder(spec).served(DTYPES[dtype])
    yield name, encoder
    if encoder.head.type != "cosine":
        encoder.head = Head()
        yield f"{name}-cosine", encoder


def evaluate(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path) -> None:
    """Measure the study's encoders and the trained ones of ``methods``; a hyperbolic head's also by their cosines.

    Each cell is a file in ``results/cells/ENCODER``.
    """
    for cells in config.cells:
        for name, spec in _measured(config, methods, runs).items():
            for row, encoder in _rows(name, spec, cells.dtype or config.dtype):
                for level in cells.levels:
                    print(f"== {row} {cells.attack} {level}", flush=True)
                    attack_emoji(
                        encoder,
                        Path(config.data),
                        results / "cells" / row,
                        [cells.attack],
                        cells.eps,
                        vendors=cells.vendors,
                        count=cells.count,
                        level=level,
                        options=cells.options,
                    )


def compare(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path) -> None:
    """Transfer between all encoders, levels, retrieval and depth of each; examples are kept in ``runs/examples``.

    Writes ``transfer.json`` (of all methods alone), ``levels/ROW-MODE.json``, ``retrieval/ROW-GOAL.json`` and
    ``depth/ROW.json``.
    """
    wanted = config.compare
    if wanted is None:
        return
    data, kept = Path(config.data), runs / "examples"
    threat = ThreatModel("linf", wanted.eps / 255)
    cell, embedding = (Cell(attack, threat, wanted.options) for attack in (wanted.attack, wanted.embedding_attack))
    specs = _measured(config, methods, runs)
    for name, spec in specs.items():
        for row, encoder in _rows(name, spec, config.dtype):
            print(f"== {row}", flush=True)
            for mode in LEVEL_MODES:
                found = levels_emoji(encoder, data, kept, wanted.vendor, cell, wanted.count, mode)
                write_json(results / "levels" / f"{row}-{mode}.json", found)
            if encoder.head.type == "poincare":
                depth = depth_emoji(encoder, data, kept, wanted.vendor, cell, wanted.count)
                write_json(results / "depth" / f"{row}.json", depth)
            pairs = emoji_pairs(encoder, data, wanted.vendor, wanted.count)
            for goal in wanted.goals:
                said = retrieval(caption_classifier(encoder, pairs.captions), pairs, goal, embedding, kept)
                write_json(results / "retrieval" / f"{row}-{goal}.json", said)
    if set(methods) == set(config.methods):
        encoders = {name: next(_rows(name, spec, config.dtype))[1] for name, spec in specs.items()}
        crossed = transfer_emoji(encoders, data, kept, wanted.vendor, cell, wanted.count)
        write_json(results / "transfer.json", crossed)


def study(config: StudyConfig, parts: Sequence[str], methods: Sequence[str], runs: Path, results: Path) -> None:
    """Do the parts of a study in order.

    Args:
        config: what to do.
        parts: of PARTS; all if empty.
        methods: of the study; all if empty.
        runs: folder of the trainings.
        results: folder of what was found.
    """
    chosen = list(methods) or list(config.methods)
    unknown = sorted(set(chosen) - set(config.methods))
    if unknown:
        raise OptionError(f"the study has no method {unknown[0]!r}; it has {', '.join(config.methods)}")
    steps = {"tune": tune, "train": train_methods, "evaluate": evaluate, "compare": compare}
    for part in parts or PARTS:
        if part == "report":
            print(report(results))
        else:
            steps[part](config, chosen, runs, results)
