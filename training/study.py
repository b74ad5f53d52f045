"""`study`: every method trained at one budget and measured alike, in small resumable parts.

Its parts may be stopped at any moment and go on: `tune` tries a few settings for each method at a share of the budget
with a training vendor left out, `train` trains each method with the setting that did best, `evaluate` measures every
encoder, cell by cell, and `compare` asks what no single number says (transfer, levels, retrieval, depth). What has been
found lies in JSON files beside the repository's docs; nothing is computed twice, and `report` draws tables and plots
from the files alone. `ship`, when asked for, copies the best encoder into the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ironclip.attacks import ThreatModel
from ironclip.classifier import LEVEL_MODES
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.head import Head
from ironclip.loading import load_encoder
from training.evaluate import attack_emoji, depth_emoji, emoji_pairs, levels_emoji, transfer_emoji
from training.retrieval import caption_classifier, retrieval
from training.robustness import Cell
from training.study_config import StudyConfig
from training.study_report import report
from training.study_runs import ship, train_methods, tune

PARTS = ("tune", "train", "evaluate", "compare", "report")
SHIPPED = Path("ironclip/demo/robust")


def _measured(config: StudyConfig, methods: Sequence[str], runs: Path) -> dict[str, str]:
    """Row -> spec: the study's encoders, and those of ``methods`` that are trained."""
    trained = {method: str(runs / method / "artifact") for method in methods}
    there = {name: spec for name, spec in trained.items() if Path(spec, "ironclip.json").is_file()}
    return {spec.strip("/").replace("/", "-"): spec for spec in config.encoders} | there


def _rows(name: str, spec: str, dtype: str, device: str) -> Iterator[tuple[str, Encoder]]:
    """An encoder as served, and with a hyperbolic head a second time by its cosines."""
    encoder = load_encoder(spec, device=device).served(getattr(torch, dtype))
    yield name, encoder
    if encoder.head.type != "cosine":
        encoder.head = Head()
        yield f"{name}-cosine", encoder


def evaluate(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path, device: str) -> None:
    """Measure the study's encoders and the trained ones of ``methods``; a hyperbolic head's also by their cosines.

    Each cell is a file in ``results/cells/ENCODER``.
    """
    for cells in config.cells:
        for name, spec in _measured(config, methods, runs).items():
            for row, encoder in _rows(name, spec, cells.dtype or config.dtype, device):
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


def compare(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path, device: str) -> None:
    """Transfer between all encoders, levels, retrieval and depth of each; what is there already is kept.

    Examples lie in ``runs/examples``.

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
        for row, encoder in _rows(name, spec, config.dtype, device):
            print(f"== {row}", flush=True)
            sampled = (wanted.vendor, cell, wanted.count)
            for mode in LEVEL_MODES:
                levels_emoji(encoder, data, kept, *sampled, mode, results / "levels" / f"{row}-{mode}.json")
            if encoder.head.type == "poincare":
                depth_emoji(encoder, data, kept, *sampled, results / "depth" / f"{row}.json")
            pairs = emoji_pairs(encoder, data, wanted.vendor, wanted.count)
            classifier = caption_classifier(encoder, pairs.captions)
            for goal in wanted.goals:
                path = results / "retrieval" / f"{row}-{goal}.json"
                retrieval(classifier, pairs, goal, embedding, kept, path=path)
    if set(methods) == set(config.methods):
        encoders = {name: next(_rows(name, spec, config.dtype, device))[1] for name, spec in specs.items()}
        transfer_emoji(encoders, data, kept, wanted.vendor, cell, wanted.count, results / "transfer.json")


def study(
    config: StudyConfig,
    parts: Sequence[str],
    methods: Sequence[str],
    runs: Path,
    results: Path,
    shipped: Path = SHIPPED,
    device: str = "auto",
) -> None:
    """Do the parts of a study in order.

    Args:
        config: what to do.
        parts: of PARTS and ``ship``; PARTS if empty.
        methods: of the study; all if empty.
        runs: folder of the trainings.
        results: folder of what was found.
        shipped: where the best encoder goes.
        device: that encoders are measured on, see `ironclip.loading.pick_device`; what trains takes the best there is.
    """
    chosen = list(methods) or list(config.methods)
    unknown = sorted(set(chosen) - set(config.methods))
    if unknown:
        raise OptionError(f"the study has no method {unknown[0]!r}; it has {', '.join(config.methods)}")
    steps = {"tune": tune, "train": train_methods, "evaluate": evaluate, "compare": compare}
    for part in parts or PARTS:
        if part == "report":
            print(report(results))
        elif part == "ship":
            ship(config, chosen, runs, results, shipped)
        else:
            steps[part](config, chosen, runs, results, device)
