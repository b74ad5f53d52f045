"""load_encoder: one way in for every kind of encoder that open_clip or Ironclip can name."""

from __future__ import annotations

import difflib
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants as hub
import open_clip
import torch
from open_clip.factory import get_model_config
from open_clip.pretrained import download_pretrained_from_hf, get_pretrained_cfg, list_pretrained_tags_by_model
from torch import nn

from ironclip import artifact
from ironclip.encoder import Encoder
from ironclip.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ChecksumMismatch,
    EncoderLoadError,
    UnknownEncoder,
    WeightsUnavailable,
)

DEMO_FOLDER = Path(__file__).parent / "demo"
# Names of the encoders inside the package -> their folders.
DEMO_ENCODERS = {"demo": "convnet", "demo-vit": "vit"}

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
    quick_gelu: bool | None = None


def list_demo_encoders() -> list[str]:
    """Names of the encoders that ship with this installation."""
    return [name for name, folder in DEMO_ENCODERS.items() if (DEMO_FOLDER / folder / artifact.CONFIG_FILE).is_file()]


def load_encoder(
    spec: str, *, device: str | torch.device = "cpu", cache_dir: str | None = None, digest: str | None = None
) -> Encoder:
    """Load an encoder in float32, in eval mode, its weights not requiring gradients.

    Args:
        spec: `demo` or another shipped name; an artifact's folder; `MODEL/PRETRAINED_TAG` as open_clip lists
            them; `hf-hub:ORG/REPO`; `local-dir:FOLDER`; `random:MODEL` or `random:MODEL:SEED` for random
            weights (tests and benchmarks).
        device: where the towers go.
        cache_dir: where open_clip keeps what it downloads.
        digest: the encoder's expected digest (SHA-256, hex); anything else is refused.

    Raises:
        UnknownEncoder: no such name, tag or folder; the text lists what exists.
        WeightsUnavailable: the weights cannot be fetched.
        ChecksumMismatch: a file or the whole encoder is not the one that was pinned.
        ArchitectureMismatch: the weights do not fit the architecture.
        ArtifactError: the folder's files cannot be read.
    """
    spec = spec.strip()
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
        return _local(spec, Path(spec.removeprefix("local-dir:")).expanduser())
    if spec.startswith("hf-hub:"):
        if spec.count("/") != 1 or spec.endswith("/") or "/" not in spec[len("hf-hub:") + 1 :]:
            raise UnknownEncoder(f"{spec!r} is not a hub name; write hf-hub:ORGANISATION/REPOSITORY.")
        return _Source(spec, spec)
    if spec and Path(spec).expanduser().is_dir():
        return _local(spec, Path(spec).expanduser())
    name, slash, tag = spec.rpartition("/")
    if not slash or spec.startswith((".", "/", "~")):
        raise _unknown(spec)
    return _tagged(spec, name.replace("/", "-"), tag)


def _local(spec: str, folder: Path) -> _Source:
    if not folder.is_dir():
        raise UnknownEncoder(f"There is no folder {str(folder)!r}; an encoder is {_specs()}.")
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
    # The tag knows with which activation its weights were trained; a plain model name with OpenAI's weights
    # would otherwise be built with the wrong one, and only warn.
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
    model_cfg = _guarded(source, lambda: _model_cfg(source, cache_dir))
    if source.quick_gelu is not None and source.quick_gelu != bool(model_cfg.get("quick_gelu", False)):
        model_cfg["quick_gelu"] = source.quick_gelu
    kwargs = {} if source.quick_gelu is None else {"quick_gelu": source.quick_gelu}
    model = _guarded(
        source,
        # require_pretrained: without it a hub name whose weights are missing comes back with random ones.
        lambda: open_clip.create_model(
            source.name, pretrained=source.tag, require_pretrained=True, cache_dir=cache_dir, **kwargs
        ),
    )
    tokenizer = _guarded(source, lambda: open_clip.get_tokenizer(source.name, cache_dir=cache_dir))
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


def _model_cfg(source: _Source, cache_dir: str | None) -> dict[str, Any]:
    if not source.name.startswith("hf-hub:"):
        return dict(get_model_config(source.name))
    # get_model_config would look in the default cache only
    path = download_pretrained_from_hf(
        source.name.removeprefix("hf-hub:"), filename=artifact.CONFIG_FILE, cache_dir=cache_dir
    )
    return dict(json.loads(Path(path).read_text(encoding="utf-8"))["model_cfg"])


def _load_random(spec: str) -> Encoder:
    _, _, rest = spec.partition(":")
    name, _, seed = rest.partition(":")
    if get_model_config(name) is None or (seed and not seed.isdigit()):
        raise UnknownEncoder(
            f"{spec!r} is not random:MODEL or random:MODEL:SEED.{_closest(name, open_clip.list_models())} "
            f"open_clip's models: {', '.join(open_clip.list_models())}."
        )
    source = _Source(spec, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed or 0))
        model = _guarded(source, lambda: open_clip.create_model(name, pretrained_text=False))
    tokenizer = _guarded(source, lambda: open_clip.get_tokenizer(name))
    return Encoder(
        model,
        tokenizer,
        model_cfg=get_model_config(name),
        preprocess_cfg=_preprocess_cfg(model),
        spec=spec,
        provenance={"description": "random weights, for tests and benchmarks"},
    )


def _preprocess_cfg(model: nn.Module) -> dict[str, Any]:
    cfg = dict(open_clip.get_model_preprocess_cfg(model))
    return {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}


def _check_config(folder: Path) -> None:
    path = folder / artifact.CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(content["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not an open_clip config: {error!r}.") from error
    if not complete:
        raise ArtifactError(f"{path} has a model_cfg without embed_dim, vision_cfg and text_cfg.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt*")):
        raise ArtifactError(f"{folder} holds no weights; {artifact.WEIGHTS_FILE} is missing.")


def _guarded(source: _Source, call: Callable[[], Any]) -> Any:
    """Run one of open_clip's loaders and say in our words what went wrong."""
    root = logging.getLogger()
    root.addFilter(_not_open_clip)  # it logs, through the root logger, what it also raises
    try:
        with warnings.catch_warnings(), _offline_where_unreachable():
            warnings.simplefilter("ignore")
            return call()
    except EncoderLoadError:
        raise
    except ModuleNotFoundError as error:
        raise EncoderLoadError(f"{source.spec!r} needs a package that is not installed: {error.name}.") from error
    except Exception as error:  # open_clip wraps every cause into RuntimeError or FileNotFoundError
        raise _translate(source, error) from error
    finally:
        root.removeFilter(_not_open_clip)


@contextmanager
def _offline_where_unreachable() -> Iterator[None]:
    """Without a route to the hub, use what is cached and fail at once; the hub's client would retry for a minute."""
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    before = hub.HF_HUB_OFFLINE
    if not before and not proxied:
        try:
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _not_open_clip(record: logging.LogRecord) -> bool:
    return "open_clip" not in record.pathname


def _translate(source: _Source, error: BaseException) -> EncoderLoadError | ArtifactError:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " | ".join(str(e) for e in chain)
    kinds = {type(e).__name__ for e in chain}
    if "SHA256" in text:
        return ChecksumMismatch(f"The weights of {source.spec!r} do not have the checksum open_clip pins: {error}")
    if "RepositoryNotFoundError" in kinds or "EntryNotFoundError" in kinds or "404 Client Error" in text:
        return UnknownEncoder(
            f"The hub has no open_clip model {source.spec!r} (or it is private): check the name. It needs "
            f"{artifact.CONFIG_FILE} and open_clip_pytorch_model or open_clip_model weights."
        )
    if "Error(s) in loading state_dict" in text or "size mismatch" in text or "Missing key" in text:
        return ArchitectureMismatch(
            f"The weights of {source.spec!r} do not fit the architecture in its configuration: {_first_line(error)}"
        )
    if "safetensors" in "".join(type(e).__module__ for e in chain) or "UnpicklingError" in kinds:
        return ArtifactError(f"The weights of {source.spec!r} are damaged or of another format: {_first_line(error)}")
    if "OfflineModeIsEnabled" in kinds or "offline mode" in text:
        return WeightsUnavailable(
            f"The weights of {source.spec!r} are not in the hub's cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set): connect once, or copy the model's folder here and give its path."
        )
    if source.folder is None:
        return WeightsUnavailable(
            f"The weights of {source.spec!r} cannot be fetched: {_first_line(chain[-1])} — check the network and the "
            "hub's cache, or copy the model's folder here and give its path."
        )
    return ArtifactError(f"{source.spec!r} cannot be loaded: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__
