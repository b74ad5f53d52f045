"""From trained weights to an artifact: silent rows for unseen words, provenance, what was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironclip.artifact import save_artifact
from ironclip.encoder import Encoder
from training.captions import TEMPLATES, CaptionTable
from training.emoji.pictures import read_manifest, training_vendors


def seen_tokens(encoder: Encoder, captions: CaptionTable) -> Tensor:
    """bool [vocabulary]: token ids that some caption of the training data can contain."""
    seen = torch.zeros(encoder.model.token_embedding.num_embeddings, dtype=torch.bool)  # type: ignore[union-attr, arg-type]
    for template in dict.fromkeys(TEMPLATES):
        for texts in (captions.words, captions.labels):
            seen[torch.unique(encoder.tokenize([template.format(text) for text in texts], truncate=True))] = True
    return seen


def export(encoder: Encoder, captions: CaptionTable, config: dict[str, Any], folder: Path) -> Path:
    """Write the averaged weights as an artifact.

    Rows of the token table that no training caption uses are set to zero: an unknown word then says nothing,
    instead of adding its random start to the text.
    """
    table: Tensor = encoder.model.token_embedding.weight.data  # type: ignore[union-attr, assignment]
    table[~seen_tokens(encoder, captions)] = 0
    manifest = read_manifest(Path(config["data"]))
    vendors = training_vendors(manifest, config["left_out"])
    keep = ("package", "version", "integrity", "licence", "credit", "pictures", "names_covered")
    data = {key: {part: manifest["vendors"][key][part] for part in keep} for key in vendors}
    taxonomy = {key: manifest["taxonomy"][key] for key in ("package", "version", "integrity", "licence", "credit")}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    meta = {
        "name": config["name"],
        "description": config["description"],
        "method": "pretrain",
        "config": config,
        "data": {"names": taxonomy, "pictures": data},
        "seed": config["seed"],
        "commit": commit or "unknown",
        "default_templates": ["an emoji of {}"],
    }
    return save_artifact(encoder, folder, meta)
