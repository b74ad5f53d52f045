"""What open_clip's loaders and the hub's client do when they fail, in Ironclip's words; and without their waits."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import huggingface_hub.constants as hub

from ironclip.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ChecksumMismatch,
    EncoderLoadError,
    IronclipError,
    UnknownEncoder,
    WeightsUnavailable,
)


@contextmanager
def translated(spec: str, *, local: bool) -> Iterator[None]:
    """Run open_clip's loaders quietly, and raise an EncoderLoadError or ArtifactError for whatever they raise.

    Args:
        spec: what the caller asked for, for messages.
        local: nothing of it comes from the network.
    """
    root = logging.getLogger()
    root.addFilter(_not_open_clip)  # it logs, through the root logger, what it also raises
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except IronclipError:
        raise
    except Exception as error:  # open_clip wraps every cause into RuntimeError or FileNotFoundError
        raise _translate(spec, local, error) from error
    finally:
        root.removeFilter(_not_open_clip)


@contextmanager
def offline_where_unreachable() -> Iterator[None]:
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


def _translate(name: str, local: bool, error: BaseException) -> EncoderLoadError | ArtifactError:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " | ".join(str(e) for e in chain)
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    spec = repr(name)
    if "ModuleNotFoundError" in kinds or "pip install" in text:
        return EncoderLoadError(f"{spec} needs a package that is not installed: {first_line(error)}")
    if "SHA256" in text:
        return ChecksumMismatch(f"The weights of {spec} do not have the checksum that open_clip pins: {error}")
    if kinds & {"RepositoryNotFoundError", "RemoteEntryNotFoundError", "HFValidationError"} or "404 Client" in text:
        return UnknownEncoder(
            f"The hub has no open_clip model {spec} (or it is private): check the name. It needs "
            f"open_clip_config.json and open_clip_pytorch_model or open_clip_model weights."
        )
    if "Error(s) in loading state_dict" in text:
        return ArchitectureMismatch(
            f"The weights of {spec} do not fit the architecture in its configuration: {first_line(error)}"
        )
    if "SafetensorError" in kinds or "UnpicklingError" in kinds:
        return ArtifactError(f"The weights of {spec} are damaged or of another format: {first_line(error)}")
    if "OfflineModeIsEnabled" in kinds or "offline mode" in text:
        return WeightsUnavailable(
            f"The weights of {spec} are not in the hub's cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set): connect once, or copy the model's folder here and give its path."
        )
    network = any(isinstance(e, OSError) or type(e).__module__.startswith(("httpx", "huggingface_hub")) for e in chain)
    if not local and (network or "Required pretrained weights" in text):
        return WeightsUnavailable(
            f"The weights of {spec} cannot be fetched: {first_line(chain[-1])} — check the network and the hub's "
            "cache, or copy the model's folder here and give its path."
        )
    return ArtifactError(f"open_clip cannot build {spec} from its configuration: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first lines of an error's text, in one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__
