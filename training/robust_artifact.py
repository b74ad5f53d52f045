"""The artifact of a robust-training run: weights, and in ironclip.json how they came about."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ironclip.artifact import save_artifact
from ironclip.encoder import Encoder
from ironclip.loading import load_encoder
from training.emoji.pictures import data_provenance
from training.provenance import commit
from training.recipe import RobustConfig


def export_robust(encoder: Encoder, config: RobustConfig, classes: Sequence[str], steps: int, folder: Path) -> Path:
    """Write the trained encoder; weights in float16 as all artifacts, or as the base has them on disk.

    Args:
        encoder: the student.
        config: of the run.
        classes: what it was trained on.
        steps: how many it made.
        folder: to write.
    """
    base = load_encoder(config.base)
    data: dict[str, Any] = {"classes": len(classes), "kind": config.data.kind}
    if config.data.kind == "emoji":
        data |= data_provenance(Path(config.data.path), config.data.left_out)
    provenance = base.provenance
    meta = {
        "name": config.name,
        "description": config.description or f"{config.base} made robust by {config.method}",
        "method": config.method,
        "base": {"spec": config.base, "digest": base.digest, "name": provenance.get("name", config.base)},
        "threat_model": {
            "norm": config.attack.norm,
            "eps": config.attack.threat.eps,
            "label": config.attack.threat.label,
            "iterations": config.attack.iterations,
        },
        "config": asdict(config) | {"steps_done": steps},
        "data": data,
        "seed": config.seed,
        "commit": commit(),
        "default_templates": list(base.default_templates),
    }
    for key in ("licence",):
        if key in provenance:
            meta[key] = provenance[key]
    plain = copy.deepcopy(encoder).float() if encoder.dtype == torch.float64 else encoder
    return save_artifact(plain, folder, meta)
