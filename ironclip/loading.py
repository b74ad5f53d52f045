"""load_encoder: one way in for every kind of encoder that open_clip or Ironclip can name."""

from __future__ import annotations

import difflib
import json
import re
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from open_clip.factory import get_model_config
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from ironclip import artifact
from ironclip.encoder import Encoder
from ironclip.errors import ArtifactError, ChecksumMismatch, OptionError, UnknownEncoder
from ironclip.foreign import check_model_cfg, check_weights, no_foreign_code
from ironclip.translation import first_line, offline_where_unreachable, translated
from ironclip.unfilled import Unfilled

DEMO_FOLDER = Path(__file__).parent / "demo"
# Names of the encoders inside the package -> their folders.
DEMO_ENCODERS = {"demo": "convnet", "demo-robust": "robust", "demo-vit": "vit"}

_LOADING = threading.Lock()
_SPECS = (
    "a demo encoder ({demo}), a folder with open_clip_config.json, MODEL/PRETRAINED_TAG "
    "(such as ViT-B-32/openai), hf-hub:ORGANISATION/REPOSITORY, local-dir:FOLDER or random:MODEL"
)


@dataclass(frozen=True)
class _Source:
    """What open_clip is asked for: the model's name, the tag, and what the caller wrote."""

    spec: str
    name: str
    tag: str | None = None
    folder: Path | None = None
    quick_gelu: bool = False

    @property
    def hub(self) -> str | None:
        """The repository of a hub name."""
        return self.name.removeprefix("hf-hub:") if self.name.startswith("hf-hub:") else None


def list_demo_encoders() -> list[str]:
    """Names of the encoders that ship with this installation."""
    return [name for name, folder in DEMO_ENCODERS.items() if (DEMO_FOLDER / folder / artifact.CONFIG_FILE).is_file()]


def load_encoder(
    spec: str, *, device: str | torch.device = "cpu", cache_dir: str | None = None, digest: str | None = None
) -> Encoder:
    """Load an encoder in float32, in eval mode, its weights not requiring gradients.

    One encoder is loaded at a time: open_clip and the hub's client keep state that threads would share. No code that
    comes with an encoder is run, and weights in a pickle are read only where no safetensors of open_clip's lie beside.

    Args:
        spec: `demo` or another shipped name; an artifact's folder; `MODEL/PRETRAINED_TAG` as open_clip lists
            them; `hf-hub:ORG/REPO`; `local-dir:FOLDER`; `random:MODEL` or `random:MODEL:SEED` for random
            weights (tests and benchmarks).
        device: where the towers go, see `pick_device`.
        cache_dir: where open_clip keeps what it downloads.
        digest: the encoder's expected digest (SHA-256, hex); anything else is refused.

    Raises:
        UnknownEncoder: no such name, tag or folder; the text lists what exists.
        WeightsUnavailable: the weights cannot be fetched.
        ChecksumMismatch: a file or the whole encoder is not the one that was pinned.
        ArchitectureMismatch: the weights do not fit the architecture.
        ArtifactError: the files cannot be read, say what open_clip cannot build, or would run code of their own.
        OptionError: there is no such device.
    """
    spec = spec.strip()
    device = pick_device(device)
    with _LOADING:
        encoder = _load_random(spec) if spec.startswith("random:") else _load(_resolve(spec), cache_dir)
    encoder = encoder.to(device).eval().requires_grad_(False)
    if digest is not None and encoder.digest != digest.lower():
        raise ChecksumMismatch(
            f"The encoder {spec!r} has digest {encoder.digest}, expected was {digest}: the weights or the "
            "configuration are not the pinned ones."
        )
    return encoder


def _resolve(spec: str) -> _Source:
    if spec in DEMO_ENCODERS:
        folder = DEMO_FOLDER / DEMO_ENCODERS[spec]
        if spec not in list_demo_encoders():
            raise UnknownEncoder(
                f"The encoder {spec!r} does not ship with this installation; here: "
                f"{', '.join(list_demo_encoders()) or 'none'}."
            )
        return _Source(spec, f"local-dir:{folder}", folder=folder)
    if spec.startswith("local-dir:"):
        return _local(spec, spec.removeprefix("local-dir:"))
    if spec.startswith("hf-hub:"):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", spec.removeprefix("hf-hub:")):
            raise UnknownEncoder(f"{spec[:200]!r} is not a hub name; write hf-hub:ORGANISATION/REPOSITORY.")
        return _Source(spec, spec)
    if _folder(spec) is not None:
        return _local(spec, spec)
    name, slash, tag = spec.rpartition("/")
    if not slash or spec.startswith((".", "/", "~")):
        raise _unknown(spec)
    return _tagged(spec, name.replace("/", "-"), tag)


def _folder(path: str) -> Path | None:
    try:
        folder = Path(path).expanduser()
        return folder if path and folder.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def _local(spec: str, path: str) -> _Source:
    folder = _folder(path)
    if folder is None:
        raise UnknownEncoder(f"There is no folder {path[:200]!r}; an encoder is {_specs()}.")
    if not (folder / artifact.CONFIG_FILE).is_file():
        raise ArtifactError(
            f"{folder} has no {artifact.CONFIG_FILE}: it is not an open_clip folder. An artifact holds "
            f"{artifact.CONFIG_FILE}, {artifact.WEIGHTS_FILE} and {artifact.META_FILE}."
        )
    return _Source(spec, f"local-dir:{folder}", folder=folder)


def _tagged(spec: str, name: str, tag: str) -> _Source:
    if get_model_config(name) is None:
        raise _unknown(spec, name)
    tags = list_pretrained_tags_by_model(name)
    cfg = get_pretrained_cfg(name, tag)
    if not cfg:
        raise UnknownEncoder(
            f"open_clip has no weights {tag!r} for {name}; it has: {', '.join(tags) or 'none'}." + _closest(tag, tags)
        )
    # The tag knows of weights that were trained with QuickGELU; a plain model name with OpenAI's weights would
    # otherwise be built with the wrong activation, and only warn. It is never turned off: a config that asks for
    # it (roberta-ViT-B-32) is right about its own weights.
    return _Source(spec, name, tag, quick_gelu=bool(cfg.get("quick_gelu", False)))


def _unknown(spec: str, name: str | None = None) -> UnknownEncoder:
    models = open_clip.list_models()
    wanted = name if name is not None else spec
    hint = _closest(wanted, [*models, *DEMO_ENCODERS])
    if name is None and spec in models:
        tags = list_pretrained_tags_by_model(spec)
        return UnknownEncoder(
            f"{spec!r} names an architecture, not weights; write {spec}/TAG with one of: {', '.join(tags) or 'none'}."
        )
    return UnknownEncoder(
        f"There is no encoder {wanted!r}.{hint} An encoder is {_specs()}. open_clip's models: {', '.join(models)}."
    )


def _specs() -> str:
    return _SPECS.format(demo=", ".join(list_demo_encoders()) or "none in this installation")


def _closest(wanted: str, known: list[str]) -> str:
    close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _load(source: _Source, cache_dir: str | None) -> Encoder:
    meta: dict[str, Any] = {}
    if source.folder is not None:
        _check_config(source.folder)
        meta = artifact.read_meta(source.folder)
        artifact.verify(source.folder, meta)
    unreachable = nullcontext() if source.folder is not None else offline_where_unreachable()
    with translated(source.spec, local=source.folder is not None), unreachable, no_foreign_code(source.spec):
        model_cfg = _model_cfg(source, cache_dir)
        check_model_cfg(source.spec, model_cfg)
        check_weights(source.spec, folder=source.folder, hub=source.hub, cache_dir=cache_dir)
        model_cfg["quick_gelu"] = source.quick_gelu or bool(model_cfg.get("quick_gelu", False))
        # require_pretrained: without it a hub name whose weights are missing comes back with random ones. What it loads
        # it loads strictly.
        with Unfilled():
            model = open_clip.create_model(
                source.name,
                pretrained=source.tag,
                require_pretrained=True,
                pretrained_text=False,
                cache_dir=cache_dir,
                quick_gelu=model_cfg["quick_gelu"],
            )
        tokenizer = open_clip.get_tokenizer(source.name, cache_dir=cache_dir)
        if source.hub is not None:
            meta = _hub_meta(source.hub, cache_dir)
        return _encoder(source, model, tokenizer, model_cfg, meta)


def _encoder(
    source: _Source, model: nn.Module, tokenizer: Any, model_cfg: dict[str, Any], meta: dict[str, Any]
) -> Encoder:
    try:
        return Encoder(
            model,
            tokenizer,
            model_cfg=model_cfg,
            preprocess_cfg=_preprocess_cfg(model),
            spec=source.spec,
            head=artifact.head_of(meta),
            provenance=meta,
            folder=source.folder,
        )
    except (OptionError, TypeError, ValueError) as error:
        raise ArtifactError(f"The preprocess_cfg of {source.spec!r} cannot be used: {error}") from error


def _model_cfg(source: _Source, cache_dir: str | None) -> dict[str, Any]:
    if source.hub is None:
        return dict(get_model_config(source.name))
    # get_model_config would look in the default cache only
    path = download_pretrained_from_hf(source.hub, filename=artifact.CONFIG_FILE, cache_dir=cache_dir)
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if not _is_config(content):
        raise ArtifactError(f"{source.spec!r} has an {artifact.CONFIG_FILE} that open_clip cannot build from.")
    return dict(content["model_cfg"])


def _hub_meta(repository: str, cache_dir: str | None) -> dict[str, Any]:
    """Our own file, where the repository has one, and its checksum checked."""
    try:
        path = Path(hf_hub_download(repository, artifact.META_FILE, cache_dir=cache_dir))
    except EntryNotFoundError:  # also where it is not in the cache and there is no network
        return {}
    meta = artifact.read_meta(path.parent)
    artifact.verify(path.parent, meta)
    return meta


def _load_random(spec: str) -> Encoder:
    name, _, seed = spec.removeprefix("random:").partition(":")
    name = name.replace("/", "-")
    if get_model_config(name) is None or (seed and not re.fullmatch("[0-9]{1,9}", seed)):
        raise UnknownEncoder(
            f"{spec[:200]!r} is not random:MODEL or random:MODEL:SEED.{_closest(name, open_clip.list_models())} "
            f"open_clip's models: {', '.join(open_clip.list_models())}."
        )
    source = _Source(spec, name)
    check_model_cfg(spec, get_model_config(name))
    with translated(spec, local=True), torch.random.fork_rng(devices=[]), no_foreign_code(spec):
        torch.manual_seed(int(seed or 0))
        model = open_clip.create_model(name, pretrained_text=False)
        tokenizer = open_clip.get_tokenizer(name)
    meta = {"description": "random weights, for tests and benchmarks"}
    return _encoder(source, model, tokenizer, get_model_config(name), meta)


def pick_device(device: str | torch.device) -> torch.device:
    """A device that is there: ``auto`` is ``cuda`` where there is one, else ``cpu``; ``cpu``, ``cuda``, ``cuda:N``.

    Raises:
        OptionError: it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"There is no device {str(device)[:40]!r} here: {first_line(error)}") from error
    return found


def _preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    cfg = dict(open_clip.get_model_preprocess_cfg(model))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}


def _is_config(content: object) -> bool:
    cfg = content.get("model_cfg") if isinstance(content, dict) else None
    return isinstance(cfg, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= set(cfg)


def _check_config(folder: Path) -> None:
    path = folder / artifact.CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not readable JSON: {str(error)[:200]}.") from error
    if not _is_config(content):
        raise ArtifactError(f"{path} has no model_cfg with embed_dim, vision_cfg and text_cfg.")
    if not any(any(folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin", ".pth")):
        raise ArtifactError(f"{folder} holds no weights; {artifact.WEIGHTS_FILE} is missing.")
