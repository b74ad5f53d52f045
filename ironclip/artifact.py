"""An encoder on disk: open_clip's own local-dir format, and `ironclip.json` beside it.

    open_clip_config.json         model_cfg and preprocess_cfg: plain open_clip reads these
    open_clip_model.safetensors   the weights; float16 on disk unless told otherwise
    ironclip.json                 head, method, config, data, seed, scores, checksums: what it is and how it was made;
                                  golden features, so that whoever loads it can tell that it computes the same

A user who drops Ironclip keeps the encoder: `open_clip.create_model("local-dir:FOLDER")`. Never pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import torch

import ironclip
from ironclip.encoder import Encoder
from ironclip.errors import ArtifactError, ChecksumMismatch
from ironclip.golden import golden_features
from ironclip.head import Head

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
    "robustness",
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
    """Write an encoder as a folder that plain open_clip loads, its tokenizer included.

    Everything is written beside the old files first and then renamed into place, so that what goes wrong leaves
    the old artifact as it was.

    Args:
        encoder: what to write; its weights are cast to `dtype`, so reload it for the served digest.
        folder: made if missing; other files in it are left alone.
        meta: what `ironclip.json` says beside head and checksums; keys from META_KEYS, plain JSON values.
        dtype: of the floating-point weights on disk (integers and the temperature keep theirs).

    Raises:
        ArtifactError: `meta` cannot be written as JSON, a weight that is not finite in `dtype`, a text tower that
            open_clip cannot read back from a folder, features that are not finite, or a folder that cannot be written.
    """
    _check_kind(encoder)
    content = {"format": FORMAT, **_checked(meta), "head": encoder.head.to_json()}
    state = _state_on_disk(encoder, dtype)
    content["golden"] = golden_features(encoder, dtype)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _Staged(folder) as staged:
            safetensors.torch.save_file(state, staged.path(WEIGHTS_FILE))
            config = {"model_cfg": encoder.model_cfg, "preprocess_cfg": encoder.preprocess_cfg}
            staged.path(CONFIG_FILE).write_bytes(_json(config))
            content["weights"] = {
                "file": WEIGHTS_FILE,
                "dtype": str(dtype).removeprefix("torch."),
                "sha256": sha256_file(staged.path(WEIGHTS_FILE)),
            }
            content["versions"] = {
                "ironclip": ironclip.__version__,
                "open_clip": open_clip.__version__,
                "torch": torch.__version__,
            }
            staged.path(META_FILE).write_bytes(_json(content))
            if hasattr(encoder.tokenizer, "save_pretrained"):
                encoder.tokenizer.save_pretrained(str(staged.folder))
    except OSError as error:
        raise ArtifactError(f"The artifact cannot be written to {folder}: {error.strerror or error}.") from error
    return folder


def check_saveable(encoder: Encoder, *, dtype: torch.dtype = torch.float16) -> None:
    """Find out whether `save_artifact` could write an encoder as it is now, before a long training makes another of it.

    Args:
        encoder: what is to be trained.
        dtype: of the weights on disk.

    Raises:
        ArtifactError: it could not; as `save_artifact`, apart from `meta` and the folder.
    """
    _check_kind(encoder)
    _state_on_disk(encoder, dtype)
    golden_features(encoder, dtype)


def _check_kind(encoder: Encoder) -> None:
    if "hf_model_name" in encoder.model_cfg["text_cfg"]:
        raise ArtifactError(
            "open_clip cannot load a Hugging Face text tower from a folder; this encoder stays a hub name."
        )
    if encoder.form != "trained":
        raise ArtifactError("A served copy only answers; save the encoder that it was made from.")


def update_meta(folder: Path | str, **changes: Any) -> None:
    """Change keys of an artifact's `ironclip.json` (scores measured later, say); atomic, raises ArtifactError."""
    folder = Path(folder)
    _write_meta(folder, {"format": FORMAT, **read_meta(folder), **_checked(changes)})


def _write_meta(folder: Path, content: Mapping[str, Any]) -> None:
    try:
        with _Staged(folder) as staged:
            staged.path(META_FILE).write_bytes(_json(content))
    except OSError as error:
        raise ArtifactError(f"{folder / META_FILE} cannot be written: {error.strerror or error}.") from error


def add_golden(folder: Path | str, encoder: Encoder) -> None:
    """Put golden features into an artifact's `ironclip.json`, for one that was saved without; atomic.

    Args:
        folder: of the artifact.
        encoder: in float32, as it was loaded from there.

    Raises:
        ArtifactError: the folder has no `ironclip.json`, or it cannot be written; features that are not finite.
    """
    folder = Path(folder)
    known = read_meta(folder)
    if not known:
        raise ArtifactError(f"{folder} has no {META_FILE}: golden features are kept in it.")
    content = {"format": FORMAT, **known, "golden": golden_features(encoder)}
    _write_meta(folder, content)


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
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON: {str(error)[:200]}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{path} does not say format {FORMAT}; it was written by another version of ironclip.")
    templates = content.get("default_templates", ["{}"])
    if not isinstance(templates, list) or not all(isinstance(t, str) and "{}" in t for t in templates):
        raise ArtifactError(f"{path}: default_templates is a list of texts with {{}} for the label's name.")
    weights = content.get("weights")
    if weights is not None and (not isinstance(weights, dict) or weights.get("file") != WEIGHTS_FILE):
        raise ArtifactError(f"{path}: weights is an object whose file is {WEIGHTS_FILE}.")
    return content


def verify(folder: Path | str, meta: Mapping[str, Any]) -> None:
    """Check the weights file against the SHA-256 in `ironclip.json`; raises ChecksumMismatch or ArtifactError."""
    if "weights" not in meta:
        return
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder} has {META_FILE} but not {WEIGHTS_FILE}; copy the whole folder again.")
    expected, found = meta["weights"].get("sha256"), sha256_file(path)
    if found != expected:
        raise ChecksumMismatch(
            f"{path} has SHA-256 {found}, {META_FILE} says {expected}: the file is damaged or was exchanged. "
            "Copy the folder again."
        )


def head_of(meta: Mapping[str, Any]) -> Head:
    """The head named in `ironclip.json`; cosine for a plain open_clip folder."""
    return Head.parse(meta["head"]) if "head" in meta else Head()


def _checked(meta: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(meta) - set(META_KEYS))
    if unknown:
        raise ArtifactError(f"Unknown keys for ironclip.json: {', '.join(unknown)}. Known: {', '.join(META_KEYS)}.")
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"ironclip.json holds plain JSON values only: {error}.") from error
    return {key: meta[key] for key in META_KEYS if key in meta}


def _state_on_disk(encoder: Encoder, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in encoder.model.state_dict().items():
        keep = not tensor.is_floating_point() or name in ("logit_scale", "logit_bias")
        value = tensor.detach().cpu() if keep else tensor.detach().cpu().to(dtype)
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ArtifactError(
                f"The weight {name} is not finite as {dtype}, in which artifacts are stored unless save_artifact is "
                "given dtype=torch.float32; a weight this large is mostly one of an encoder that has diverged."
            )
        state[name] = value.contiguous()
    return state


class _Staged:
    """Files written beside a folder's own and renamed into it together; nothing is left behind on an error."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> _Staged:
        self.folder = Path(tempfile.mkdtemp(dir=self.target, prefix=".writing-"))
        return self

    def path(self, name: str) -> Path:
        """Where to write the file of this name for now."""
        return self.folder / name

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                for path in sorted(self.folder.iterdir()):
                    path.chmod(0o644)
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                for path in sorted(self.folder.iterdir()):
                    path.replace(self.target / path.name)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
