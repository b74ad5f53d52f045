"""Folders and hub names of strangers: whatever they hold, no code of theirs runs."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from ironclip.artifact import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from ironclip.errors import ArtifactError, IronclipError
from ironclip.foreign import check_model_cfg
from ironclip.loading import load_encoder

HUB = "hf-hub:someone/clip"
PICKLES = ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.pth", "pytorch_model.bin", "any.bin"]


@pytest.fixture
def folder(tiny_artifact: Path, tmp_path: Path) -> Path:
    """The snapshot of a hub's cache that holds `HUB`, and a plain folder too; without our file nothing is pinned."""
    snapshot = tmp_path / "models--someone--clip" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_artifact, snapshot)
    (snapshot / META_FILE).unlink()
    (tmp_path / "models--someone--clip" / "refs").mkdir()
    (tmp_path / "models--someone--clip" / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a stranger's code would write; whoever is asked at the terminal says yes to all."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    return tmp_path / "marker"


@pytest.fixture
def transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package that would run the code; its copies of the code go where the test ends with them."""
    found = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return found


def change(folder: Path, part: str | None = None, **values: object) -> None:
    """Set keys of the model_cfg, or of a part of it."""
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text())
    (content["model_cfg"] if part is None else content["model_cfg"][part]).update(values)
    path.write_text(json.dumps(content))


def plant(folder: Path, marker: Path) -> None:
    """Put a configuration and a tokenizer into the folder that are code, which writes the marker when it is read."""
    folder.mkdir(exist_ok=True)
    code = (
        "import pathlib\n"
        "from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer\n"
        f"pathlib.Path({str(marker)!r}).touch()\n"
        "class TheirConfig(PretrainedConfig):\n    model_type = 'theirs'\n"
        "class TheirModel(PreTrainedModel):\n    config_class = TheirConfig\n"
        "class TheirTokenizer(PreTrainedTokenizer):\n    pass\n"
    )
    (folder / "theirs.py").write_text(code)
    mapped = {"AutoConfig": "theirs.TheirConfig", "AutoModel": "theirs.TheirModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": mapped}))
    tokenizer = {"tokenizer_class": "TheirTokenizer", "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def load(name: str, folder: Path) -> None:
    load_encoder(name.format(folder=folder), cache_dir=str(folder.parents[2]))


@pytest.mark.parametrize("name", ["{folder}", "local-dir:{folder}", HUB])
def test_a_tokenizer_that_is_code_is_refused_before_anything_is_built(
    name: str, folder: Path, marker: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, marker)
    source = "someone/clip" if name == HUB else "here"
    change(folder, "text_cfg", hf_tokenizer_name=source, tokenizer_kwargs={"trust_remote_code": True})
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ArtifactError, match=r"tokenizer_kwargs.*'trust_remote_code'.*Remove"):
        load(name, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_nobody_is_asked_whether_code_may_run(name: str, folder: Path, marker: Path, transformers: Any) -> None:
    """Without a word in the configuration transformers asks at the terminal, and a yes would run it."""
    plant(folder, marker)
    change(folder, "text_cfg", hf_tokenizer_name="someone/clip" if name == HUB else "here")
    with pytest.raises(ArtifactError, match="code of its own"):
        load(name, folder)
    assert not marker.exists()


def test_code_does_not_run_where_the_configuration_changes_after_it_was_looked_at(
    folder: Path, marker: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's file is read again for the tokenizer, after weights that may take minutes to come."""
    plant(folder, marker)
    real = open_clip.create_model

    def create_model(*arguments: Any, **options: Any) -> Any:
        model = real(*arguments, **options)
        kwargs = {"trust_remote_code": True}
        change(folder, "text_cfg", hf_tokenizer_name="someone/clip", tokenizer_kwargs=kwargs)
        return model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ArtifactError, match="code of its own"):
        load(HUB, folder)
    assert not marker.exists()


def test_a_text_tower_that_is_code_is_refused(folder: Path, marker: Path, transformers: Any, tmp_path: Path) -> None:
    plant(tmp_path / "tower", marker)
    change(folder, "text_cfg", hf_model_name=str(tmp_path / "tower"))
    with pytest.raises(ArtifactError, match="hf_model_name"):
        load("{folder}", folder)
    assert not marker.exists()


def test_a_text_tower_that_is_code_is_not_run_under_a_hubs_name(
    folder: Path, marker: Path, transformers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(folder, marker)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parents[2]))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(folder.parents[2]), raising=False)
    monkeypatch.chdir(folder.parents[2])
    plant(Path("someone"), marker)
    change(folder, "text_cfg", hf_model_name="someone")
    with pytest.raises(ArtifactError, match="code of its own"):
        load("{folder}", folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("text_cfg", {"tokenizer_kwargs": {"clean": "lower", "trust_remote_code": False}}, "'trust_remote_code'"),
        ("text_cfg", {"tokenizer_kwargs": {"config": {}}}, "'config'"),
        ("text_cfg", {"tokenizer_kwargs": {"gguf_file": "x"}}, "'gguf_file'"),
        ("text_cfg", {"tokenizer_kwargs": {"bpe_path": "/etc/passwd"}}, "'bpe_path'"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": {"x": 1}}}, "'clean'"),
        ("text_cfg", {"tokenizer_kwargs": [1]}, "tokenizer_kwargs"),
        ("text_cfg", {"hf_tokenizer_name": ["x"]}, "hf_tokenizer_name"),
        ("text_cfg", {"hf_model_name": "../elsewhere"}, "hf_model_name"),
        ("text_cfg", {"hf_model_name": "/elsewhere"}, "hf_model_name"),
        ("text_cfg", {"hf_model_name": {}}, "hf_model_name"),
        ("vision_cfg", {"timm_model_name": "hf-hub:someone/tower"}, "timm_model_name"),
        ("vision_cfg", {"timm_model_name": "hf_hub:someone/tower"}, "timm_model_name"),
        ("vision_cfg", {"timm_model_name": "local-dir:/tmp/tower"}, "timm_model_name"),
        ("vision_cfg", {"timm_model_name": 3}, "timm_model_name"),
        (None, {"text_cfg": "x"}, "text_cfg"),
        (None, {"vision_cfg": [1]}, "vision_cfg"),
        # open_clip knows no such keys; that of the tower's pooling is a name in a table of its own.
        (None, {"trust_remote_code": True}, "cannot build"),
        ("text_cfg", {"trust_remote_code": True}, "cannot build"),
        ("text_cfg", {"hf_model_config": {"auto_map": {}}}, "cannot build"),
        ("vision_cfg", {"timm_model_kwargs": {"checkpoint_path": "x"}}, "cannot build"),
        ("multimodal_cfg", {"hf_model_name": "someone/tower"}, "cannot build"),
    ],
)
@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_what_a_configuration_must_not_name(
    name: str, part: str | None, values: dict[str, object], says: str, folder: Path, marker: Path
) -> None:
    if part == "multimodal_cfg":
        change(folder, multimodal_cfg={})
    change(folder, part, **values)
    with pytest.raises(ArtifactError, match=says):
        load(name, folder)


def test_a_registered_architecture_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import factory

    config = json.loads(json.dumps(open_clip.get_model_config("ViT-B-32")))
    config["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "theirs", config)
    with pytest.raises(ArtifactError, match="'trust_remote_code'"):
        load_encoder("random:theirs")


def test_every_architecture_of_open_clips_is_allowed() -> None:
    for name in open_clip.list_models():
        check_model_cfg(name, open_clip.get_model_config(name))


class Theirs:
    """What a pickle runs where it is read without care."""

    def __init__(self, act: Callable[..., Any], *arguments: Any) -> None:
        self._call = (act, arguments)

    def __reduce__(self) -> Any:
        return self._call


def write_pickle(path: Path, content: object, form: str) -> None:
    """As `torch.save` writes it today or did once, or as a bare pickle."""
    if form == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("filename", [*PICKLES, "open_clip_pytorch_model.pt"])
@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_a_pickle_that_is_code_is_refused(name: str, filename: str, form: str, folder: Path, marker: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    # What is looked for is that nothing runs; a dictionary makes it look like weights.
    write_pickle(folder / filename, {"state_dict": Theirs(os.system, f"touch {marker}")}, form)
    with pytest.raises(IronclipError):
        load(name, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_a_pickle_that_breaks_the_careful_reader_is_not_read_by_the_careless_one(
    name: str, folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """open_clip reads a file again, without weights_only, where the first try ends with a TypeError."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # as torch was before 2.6
    (folder / WEIGHTS_FILE).unlink()
    # The state of a dictionary that is None is an error to the careful reader, and nothing to the other.
    command = f"touch {marker}".encode()
    stumble, act = b"ccollections\nOrderedDict\n)RNb0", b"cos\nsystem\nX" + len(command).to_bytes(4, "little") + command
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x02" + stumble + act + b"\x85R.")
    with pytest.raises(ArtifactError, match="safetensors"):
        load(name, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_safetensors_go_before_a_pickle(name: str, folder: Path, marker: Path) -> None:
    write_pickle(folder / "open_clip_pytorch_model.bin", Theirs(os.system, f"touch {marker}"), "zip")
    load(name, folder)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_a_pickle_of_tensors_alone_is_read(name: str, folder: Path, marker: Path) -> None:
    expected = load_encoder(str(folder)).digest
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    assert load_encoder(name.format(folder=folder), cache_dir=str(folder.parents[2])).digest == expected


@pytest.mark.parametrize("name", ["{folder}", HUB])
def test_torch_before_26_reads_no_pickle(
    name: str, folder: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "open_clip_pytorch_model.bin")
    (folder / WEIGHTS_FILE).unlink()
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ArtifactError, match=r"torch 2\.6"):
        load(name, folder)
