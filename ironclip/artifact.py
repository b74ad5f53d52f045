"""An encoder on disk: open_clip's own local-dir format, and `ironclip.json` beside it.

    open_clip_config.json         model_cfg and preprocess_cfg: plain open_clip reads these
    open_clip_model.safetensors   the weights; float16 on disk unless told otherwise
    ironclip.json                 head, method, config, data, seed, scores, checksums: what it is and how it was made

A user who drops Ironclip keeps the encoder: `open_clip.create_model("local-dir:FOLDER")`. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch

import ironclip
from ironclip.encoder import Encoder, Head
from ironclip.errors import ArtifactError, ChecksumMismatch

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
META_FILE = "ironclip.json"
FORMAT = 1

# What `ironclip.json` may hold beside what save_artifact writes itself.
META_KEYS = (
    "name",
    "description",
    "base",
    "method",
    "config",
    "threat_model",
    "data",
    "seed",
    "commit",
    "scores",
    "domain",
    "default_templates",
    "licence",
    "tried",
)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def save_artifact(
    encoder: Encoder,
    folder: Path | str,
    meta: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write an encoder as a folder that plain open_clip loads; each file is replaced atomically.

    Args:
        encoder: what to write; its weights are cast to `dtype`, so reload it for the served digest.
        folder: made if missing; other files in it are left alone.
        meta: what `ironclip.json` says beside head and checksums; keys from META_KEYS.
        dtype: of the floating-point weights on disk (integers and the temperature keep theirs).

    Raises:
        ArtifactError: an unknown key in `meta`, a weight that is not finite in `dtype`, or a folder that
            cannot be written.
    """
    unknown = sorted(set(meta) - set(META_KEYS))
    if unknown:
        raise ArtifactError(f"Unknown keys for ironclip.json: {', '.join(unknown)}. Known: {', '.join(META_KEYS)}.")
    state = {}
    for name, tensor in encoder.model.state_dict().items():
        keep = not tensor.is_floating_point() or name in ("logit_scale", "logit_bias")
        value = tensor.detach().cpu() if keep else tensor.detach().cpu().to(dtype)
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ArtifactError(f"The weight {name} is not finite as {dtype}; save with dtype=torch.float32.")
        state[name] = value.contiguous().clone()
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS_FILE, safetensors.torch.save(state))
        config = {"model_cfg": encoder.model_cfg, "preprocess_cfg": encoder.preprocess_cfg}
        _replace(folder / CONFIG_FILE, _json(config))
        content = {
            "format": FORMAT,
            **{key: meta[key] for key in META_KEYS if key in meta},
            "head": encoder.head.to_json(),
            "weights": {
                "file": WEIGHTS_FILE,
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": sha256_file(folder / WEIGHTS_FILE),
            },
            "versions": {
                "ironclip": ironclip.__version__,
                "open_clip": open_clip.__version__,
                "torch": torch.__version__,
            },
        }
        _replace(folder / META_FILE, _json(content))
    except OSError as error:
        raise ArtifactError(f"The artifact cannot be written to {folder}: {error.strerror or error}.") from error
    return folder


def update_meta(folder: Path | str, **changes: Any) -> None:
    """Change keys of an artifact's `ironclip.json` (scores measured after it was written, say), atomically."""
    unknown = sorted(set(changes) - set(META_KEYS))
    if unknown:
        raise ArtifactError(f"Unknown keys for ironclip.json: {', '.join(unknown)}. Known: {', '.join(META_KEYS)}.")
    folder = Path(folder)
    _replace(folder / META_FILE, _json({**read_meta(folder), **changes}))


def read_meta(folder: Path | str) -> dict[str, Any]:
    """The content of `ironclip.json`; empty where the folder has none (a plain open_clip folder).

    Raises:
        ArtifactError: the file is there but is not a JSON object of a format this version reads.
    """
    path = Path(folder) / META_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not say format {FORMAT}; it was written by another version of ironclip.")
    return content


def verify(folder: Path | str, meta: Mapping[str, Any]) -> None:
    """Check the weights file against the SHA-256 in `ironclip.json`; raises ChecksumMismatch."""
    weights = meta.get("weights")
    if not isinstance(weights, Mapping):
        return
    path = Path(folder) / str(weights.get("file", WEIGHTS_FILE))
    if not path.is_file():
        raise ArtifactError(f"{folder} has {META_FILE} but not {path.name}; copy the whole folder again.")
    found = sha256_file(path)
    if found != weights.get("sha256"):
        raise ChecksumMismatch(
            f"{path} has SHA-256 {found}, {META_FILE} says {weights.get('sha256')}: the file is damaged or was "
            "exchanged. Copy the folder again."
        )


def head_of(meta: Mapping[str, Any]) -> Head:
    """The head named in `ironclip.json`; cosine for a plain open_clip folder."""
    return Head.parse(meta["head"]) if "head" in meta else Head()


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _replace(path: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
