"""From trained weights to an artifact: silent rows for unseen words, provenance, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironclip.artifact import save_artifact
from ironclip.encoder import Encoder
from training.captions import TEMPLATES, CaptionTable
from training.emoji.pictures import data_provenance
from training.provenance import commit


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
    meta = {
        "name": config["name"],
        "description": config["description"],
        "method": "pretrain",
        "config": config,
        "data": data_provenance(Path(config["data"]), config["left_out"]),
        "seed": config["seed"],
        "commit": commit(),
        "default_templates": ["an emoji of {}"],
    }
    return save_artifact(encoder, folder, meta)
