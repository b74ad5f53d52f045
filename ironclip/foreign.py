"""What a stranger's files may have open_clip do: build towers and read numbers, never run code of their own.

A configuration names a tokenizer and towers of other packages, and what it hands to them can make them import Python
files that lie beside it. It is looked at before anything is built. That is not all, since a hub's file is read again
later, and transformers asks at the terminal where nobody has said no: while an encoder is loaded, nothing is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.pretrained import download_pretrained_from_hf

from ironclip.errors import ArtifactError

# What open_clip's tokenizers read themselves; all else goes on to transformers.
TOKENIZER_KWARGS = ("clean", "strip_sep_token", "language")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_TIMM_NAME = re.compile(r"[\w.-]+")  # of timm's own list: no hub and no folder, which bring arguments of their own
_NO_PICKLE = "Save the weights as open_clip_model.safetensors (safetensors.torch.save_file)"


def check_model_cfg(spec: str, model_cfg: Mapping[str, Any]) -> None:
    """Refuse a configuration that could have other packages read more than it should, or run code.

    Args:
        spec: what was asked for, for messages.
        model_cfg: open_clip's.

    Raises:
        ArtifactError: says which key it is, and what to do.
    """
    for part in ("text_cfg", "vision_cfg"):
        if not isinstance(model_cfg.get(part), Mapping):
            raise ArtifactError(f"The model_cfg of {spec!r} has a {part} that is not an object.")
    text, vision = model_cfg["text_cfg"], model_cfg["vision_cfg"]
    _check_tokenizer(spec, text)
    tower = text.get("hf_model_name")
    if tower is not None and not (isinstance(tower, str) and _HUB_NAME.fullmatch(tower)):
        raise ArtifactError(
            f"text_cfg.hf_model_name of {spec!r} is {str(tower)[:60]!r}, not the name of a hub's repository: write "
            "ORGANISATION/REPOSITORY; a text tower in a folder is not read."
        )
    trunk = vision.get("timm_model_name")
    if trunk is not None and not (isinstance(trunk, str) and _TIMM_NAME.fullmatch(trunk)):
        raise ArtifactError(
            f"vision_cfg.timm_model_name of {spec!r} is {str(trunk)[:60]!r}, not the name of a model that timm has: "
            "write one of timm.list_models(); a model from a hub or a folder is not read."
        )


def _check_tokenizer(spec: str, text: Mapping[str, Any]) -> None:
    name, kwargs = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs")
    if name is not None and not isinstance(name, str):
        raise ArtifactError(f"text_cfg.hf_tokenizer_name of {spec!r} is not a text.")
    if kwargs is None:
        return
    if not isinstance(kwargs, Mapping):
        raise ArtifactError(f"text_cfg.tokenizer_kwargs of {spec!r} is not an object.")
    for key, value in kwargs.items():
        if key not in TOKENIZER_KWARGS:
            raise ArtifactError(
                f"text_cfg.tokenizer_kwargs of {spec!r} has {key[:60]!r}, which would go on to transformers and can "
                f"make it run code that comes with the model. Remove it: only {', '.join(TOKENIZER_KWARGS)} are passed "
                "on. A tokenizer that is code has to be saved as a tokenizer.json."
            )
        if not isinstance(value, (str, bool)):
            raise ArtifactError(f"{key!r} in text_cfg.tokenizer_kwargs of {spec!r} is not a text, true or false.")


def check_weights(spec: str, *, folder: Path | None, hub: str | None, cache_dir: str | None) -> None:
    """Refuse weights in a pickle that holds anything but tensors; safetensors cannot.

    open_clip reads a pickle with weights_only, but once more without where that ends with a TypeError, which a pickle
    can arrange. So it is read here first.

    Args:
        spec: what was asked for, for messages.
        folder: that holds them, or
        hub: the repository; with neither they are from open_clip's own list.
        cache_dir: where open_clip keeps what it downloads.

    Raises:
        ArtifactError: they hold more, are damaged, or this torch is too old to tell.
    """
    if hub is not None:
        path = Path(download_pretrained_from_hf(hub, cache_dir=cache_dir))
    else:
        # Which of several files is open_clip's to choose; one of safetensors, unless only a pickle has its own name.
        found = _find_checkpoint_in_dir(folder) if folder is not None else None
        if found is None:
            return
        path = Path(found)
    if path.suffix != ".safetensors":
        _check_pickle(spec, path)


def _check_pickle(spec: str, path: Path) -> None:
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) < (2, 6):
        raise ArtifactError(
            f"The weights of {spec!r} are a pickle ({path.name}), which can run code unless torch 2.6 or later reads "
            f"it (CVE-2025-32434); here is {torch.__version__}. {_NO_PICKLE}, or install a later torch."
        )
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the pickle makes it raise
        raise ArtifactError(
            f"The weights of {spec!r} are a pickle ({path.name}) that is damaged or holds more than tensors, and would "
            f"run code. {_NO_PICKLE}."
        ) from error


@contextmanager
def no_foreign_code(spec: str) -> Iterator[None]:
    """While it is entered transformers imports nothing from a folder or a hub, and asks nobody whether it may.

    Args:
        spec: what was asked for, for messages.

    Raises:
        ArtifactError: in place of the import.
    """
    try:
        door: Any = import_module("transformers.dynamic_module_utils")  # whoever has it installed
    except ImportError:  # then nothing of a stranger's is read by it
        yield
        return

    def refuse(*_: object, **__: object) -> Any:
        raise _foreign(spec)

    before = door.get_class_in_module, door.TIME_OUT_REMOTE_CODE
    door.get_class_in_module, door.TIME_OUT_REMOTE_CODE = refuse, 0  # 0: no question, which waits for an answer
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" in str(error):  # transformers advises to set it
            raise _foreign(spec) from error
        raise
    finally:
        door.get_class_in_module, door.TIME_OUT_REMOTE_CODE = before


def _foreign(spec: str) -> ArtifactError:
    return ArtifactError(
        f"{spec!r} needs code of its own for its tokenizer or text tower (auto_map), and only code that is installed "
        "is run: save its tokenizer as a tokenizer.json, or use a model of an architecture that transformers knows."
    )
