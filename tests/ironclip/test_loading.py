"""load_encoder: every kind of name, and what is said of a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ironclip.artifact import CONFIG_FILE, META_FILE, WEIGHTS_FILE, add_golden, read_meta, save_artifact, update_meta
from ironclip.encoder import Encoder
from ironclip.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ChecksumMismatch,
    EncoderLoadError,
    OptionError,
    UnknownEncoder,
    WeightsUnavailable,
)
from ironclip.golden import check_golden
from ironclip.loading import load_encoder
from tests.conftest import make_tiny_encoder

WORDS = ["a photo of a dog", "an antidisestablishmentarian flibbertigibbet", "Ünïcödé 犬 🥕"]


@pytest.fixture
def folder(tiny_artifact: Path, tmp_path: Path) -> Path:
    """A copy of the tiny artifact that a test may damage."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "artifact"))


def test_artifact_loads_in_plain_open_clip_with_the_same_features(tiny_artifact: Path) -> None:
    encoder = load_encoder(str(tiny_artifact))
    name = f"local-dir:{tiny_artifact}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model = model.eval()
    pixels = torch.rand(4, 3, 32, 32)
    mean_std = transform.transforms[-1]
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_image(pixels), model.encode_image(mean_std(pixels)))
        torch.testing.assert_close(
            encoder.encode_text(WORDS), model.encode_text(open_clip.get_tokenizer(name)(WORDS)), atol=1e-5, rtol=1e-4
        )


def test_open_clip_folder_without_our_file_loads(folder: Path) -> None:
    expected = load_encoder(str(folder))
    (folder / META_FILE).unlink()
    plain = load_encoder(f"local-dir:{folder}")
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(plain.encode_image(pixels), expected.encode_image(pixels))
    assert plain.provenance == {}
    assert plain.digest == expected.digest


def test_save_and_reload_keeps_the_digest(tiny_artifact: Path, tmp_path: Path) -> None:
    first = load_encoder(str(tiny_artifact))
    save_artifact(first, tmp_path / "again", {"name": "again"})
    again = load_encoder(str(tmp_path / "again"))
    assert again.digest == first.digest
    assert read_meta(tmp_path / "again")["weights"]["dtype"] == "float16"
    assert not [p for p in (tmp_path / "again").iterdir() if p.name.startswith(".")]


def test_meta_travels_and_can_be_updated(folder: Path) -> None:
    update_meta(folder, scores=[{"metric": "top-1", "value": 0.5, "n": 10}])
    encoder = load_encoder(str(folder))
    assert encoder.provenance["scores"][0]["value"] == 0.5
    assert encoder.default_templates == ("an emoji of {}",)
    with pytest.raises(ArtifactError, match="accuracy"):
        update_meta(folder, accuracy=1.0)


@pytest.fixture
def hub(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `someone/robust-clip`, and no network; returns the snapshot's folder.

    The loading code is the real one, the cache stands in for the network.
    """
    repo = tmp_path / "hub" / "models--someone--robust-clip"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_artifact, snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def _from_hub(hub: Path) -> Encoder:
    return load_encoder("hf-hub:someone/robust-clip", cache_dir=str(hub.parents[2]))


def test_hub_name_loads(hub: Path, tiny_artifact: Path) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    expected = load_encoder(str(tiny_artifact))
    ours = _from_hub(hub)
    assert torch.equal(ours.encode_image(pixels), expected.encode_image(pixels))
    assert ours.default_templates == ("an emoji of {}",)
    (hub / META_FILE).unlink()
    foreign = _from_hub(hub)
    assert foreign.digest == ours.digest == expected.digest
    assert foreign.provenance == {}


def test_hub_name_without_weights_never_gets_random_ones(hub: Path) -> None:
    (hub / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsUnavailable):
        _from_hub(hub)


def test_hub_names_head_and_checksum_are_held_to(hub: Path) -> None:
    meta = json.loads((hub / META_FILE).read_text())
    (hub / META_FILE).write_text(json.dumps({**meta, "head": {"type": "poincare"}}))
    with pytest.raises(ArtifactError, match="poincare"):
        _from_hub(hub)
    (hub / META_FILE).write_text(json.dumps({**meta, "weights": {**meta["weights"], "sha256": "0" * 64}}))
    with pytest.raises(ChecksumMismatch):
        _from_hub(hub)


@pytest.mark.parametrize("content", ["{}", '{"model_cfg": {"embed_dim": 3}}', "nonsense"])
def test_hub_names_wrong_config_is_not_called_a_network_fault(hub: Path, content: str) -> None:
    (hub / CONFIG_FILE).write_text(content)
    with pytest.raises(ArtifactError):
        _from_hub(hub)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("nonsense", UnknownEncoder, "ViT-B-32"),
        ("", UnknownEncoder, "hf-hub:"),
        ("ViT-B-23/openai", UnknownEncoder, "Did you mean ViT-B-32"),
        ("ViT-B-32", UnknownEncoder, "laion2b_s34b_b79k"),
        ("ViT-B-32/openia", UnknownEncoder, "Did you mean openai"),
        ("hf-hub:lonely", UnknownEncoder, "hf-hub:ORGANISATION/REPOSITORY"),
        ("hf-hub:a/b/c", UnknownEncoder, "hf-hub:ORGANISATION/REPOSITORY"),
        ("local-dir:/no/such/folder", UnknownEncoder, "no folder"),
        ("./no/such", UnknownEncoder, "no encoder"),
        ("random:ViT-B-23", UnknownEncoder, "ViT-B-32"),
        ("random:ViT-B-32:x", UnknownEncoder, "SEED"),
        ("random:ViT-B-32:²", UnknownEncoder, "SEED"),
        ("random:ViT-B-32:99999999999999999999", UnknownEncoder, "SEED"),
        ("hf-hub:a/b@main", UnknownEncoder, "hf-hub:ORGANISATION/REPOSITORY"),
        ("local-dir:", UnknownEncoder, "no folder"),
        ("local-dir:~nosuchuser/x", UnknownEncoder, "no folder"),
        ("~nosuchuser/x", UnknownEncoder, "no encoder"),
        ("x" * 5000, UnknownEncoder, "no encoder"),
    ],
)
def test_wrong_names_list_what_exists(spec: str, error: type[EncoderLoadError], says: str) -> None:
    with pytest.raises(error, match=says):
        load_encoder(spec)


def test_a_text_tower_that_needs_transformers_says_so_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("open_clip.hf_model.transformers", None)  # as open_clip leaves it where it is not installed
    with pytest.raises(EncoderLoadError, match="not installed"):
        load_encoder("random:roberta-ViT-B-32")


@pytest.mark.parametrize("spec", ["ViT-B-32/openai", "ViT-B/32/laion2b_s34b_b79k", "hf-hub:someone/robust-clip"])
def test_no_network_says_so_at_once(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailable, match="cannot be reached"):
        load_encoder(spec, cache_dir=str(tmp_path))


def test_damaged_weights_are_refused(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(ChecksumMismatch, match="damaged or was exchanged"):
        load_encoder(str(folder))


def test_wrong_pin_is_refused(tiny_artifact: Path) -> None:
    digest = load_encoder(str(tiny_artifact)).digest
    assert load_encoder(str(tiny_artifact), digest=digest).digest == digest
    with pytest.raises(ChecksumMismatch, match=digest):
        load_encoder(str(tiny_artifact), digest="0" * 64)


def _drop_pin(folder: Path) -> None:
    """As for a foreign folder: without our file nothing pins the weights, so later checks must catch it."""
    (folder / META_FILE).unlink()


def test_truncated_weights_are_refused(folder: Path) -> None:
    _drop_pin(folder)
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="damaged"):
        load_encoder(str(folder))


def test_other_architecture_is_refused(folder: Path) -> None:
    _drop_pin(folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 64
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ArchitectureMismatch, match="do not fit"):
        load_encoder(str(folder))


def test_missing_tensor_is_refused(folder: Path) -> None:
    _drop_pin(folder)
    state = load_file(folder / WEIGHTS_FILE)
    state.pop("visual.proj")
    save_file(state, folder / WEIGHTS_FILE)
    with pytest.raises(ArchitectureMismatch, match=r"visual\.proj"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 1}}']
)
def test_unreadable_config_is_refused(folder: Path, content: str) -> None:
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=CONFIG_FILE):
        load_encoder(str(folder))


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        '{"format": 99}',
        '{"format": 1, "head": "cosine"}',
        '{"format": 1, "head": null}',
        '{"format": 1, "default_templates": "an emoji of {}"}',
        '{"format": 1, "default_templates": ["no slot"]}',
        '{"format": 1, "default_templates": [1]}',
        '{"format": 1, "weights": "x"}',
        '{"format": 1, "weights": {"file": "../other.safetensors", "sha256": ""}}',
    ],
)
def test_unreadable_meta_is_refused(folder: Path, content: str) -> None:
    (folder / META_FILE).write_text(content)
    with pytest.raises(ArtifactError, match="ironclip"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": "x"},
        {"mean": [1, 2]},
        {"std": [0, 0, 0]},
        {"std": [float("nan")] * 3},
        {"fill_color": [0, 0, 0]},
        {"interpolation": ["x"]},
        {"interpolation": "nearest"},
        {"resize_mode": "sideways"},
    ],
)
def test_unusable_preprocessing_is_refused(folder: Path, wrong: dict[str, object]) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["preprocess_cfg"].update(wrong)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        load_encoder(str(folder))


def test_the_device_is_one_that_is_there(tiny_artifact: Path) -> None:
    assert load_encoder(str(tiny_artifact), device="cpu").device == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_encoder(str(tiny_artifact), device="auto").device.type == best
    for device in ("warp", "cuda:99"):
        with pytest.raises(OptionError, match=device):
            load_encoder(str(tiny_artifact), device=device)


@pytest.mark.parametrize("meta", [{"name": Path("x")}, {"scores": [float("nan")]}, {"unheard": 1}])
def test_meta_that_cannot_be_written_leaves_the_old_artifact(folder: Path, meta: dict[str, object]) -> None:
    before = load_encoder(str(folder)).digest
    with pytest.raises(ArtifactError):
        save_artifact(make_tiny_encoder(seed=5), folder, meta)
    with pytest.raises(ArtifactError):
        update_meta(folder, **meta)
    assert load_encoder(str(folder)).digest == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_plain_folder_can_be_given_meta(folder: Path, tmp_path: Path) -> None:
    (folder / META_FILE).unlink()
    update_meta(folder, name="mine")
    assert load_encoder(str(folder)).provenance["name"] == "mine"
    with pytest.raises(ArtifactError):
        update_meta(tmp_path / "no-such-folder", name="x")


def test_weights_out_of_half_range_are_not_written(tiny_encoder: Encoder, tmp_path: Path) -> None:
    import copy

    encoder = copy.deepcopy(tiny_encoder)
    with torch.no_grad():
        encoder.model.visual.proj[0, 0] = 1e6
    with pytest.raises(ArtifactError, match="float32"):
        save_artifact(encoder, tmp_path / "a", {})
    save_artifact(encoder, tmp_path / "b", {}, dtype=torch.float32)
    assert load_encoder(str(tmp_path / "b")).model.visual.proj[0, 0] == 1e6


def test_random_weights_are_seeded() -> None:
    digests = [load_encoder(f"random:ViT-S-32-alt{seed}").digest for seed in ("", ":0", ":1")]
    assert digests[0] == digests[1] != digests[2]


def test_quick_gelu_is_what_config_or_tag_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's tags need QuickGELU though the plain model name does not say so; LAION's must not get it."""
    asked: list[bool] = []

    def create_model(name: str, **kwargs: Any) -> None:
        asked.append(kwargs["quick_gelu"])
        raise OSError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pairs = open_clip.list_pretrained()
    for name, tag in pairs:
        with pytest.raises(WeightsUnavailable):
            load_encoder(f"{name}/{tag}")
    expected = [
        bool(open_clip.get_model_config(name).get("quick_gelu") or get_pretrained_cfg(name, tag).get("quick_gelu"))
        for name, tag in pairs
    ]
    assert asked == expected
    by_name = {f"{name}/{tag}": value for (name, tag), value in zip(pairs, asked, strict=True)}
    assert by_name["ViT-B-32/openai"]
    assert by_name["roberta-ViT-B-32/laion2b_s12b_b32k"]
    assert not by_name["ViT-B-32/laion2b_s34b_b79k"]


def test_quick_gelu_is_written_to_the_artifact(tmp_path: Path) -> None:
    encoder = make_tiny_encoder()
    quick = {**encoder.model_cfg, "quick_gelu": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.model.CLIP(**quick)
    encoder = Encoder(model, encoder.tokenizer, model_cfg=quick, preprocess_cfg=encoder.preprocess_cfg)
    save_artifact(encoder, tmp_path / "quick", {}, dtype=torch.float32)
    pixels = torch.rand(2, 3, 32, 32)
    again = load_encoder(str(tmp_path / "quick"))
    torch.testing.assert_close(again.encode_image(pixels), encoder.encode_image(pixels))
    assert not torch.allclose(again.encode_image(pixels), make_tiny_encoder().encode_image(pixels), atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dim"), [("ViT-B-32", 512), ("ViT-L-14", 768)])
def test_real_sizes_load_encode_save_reload(name: str, dim: int, tmp_path: Path) -> None:
    encoder = load_encoder(f"random:{name}")
    pixels = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        image, text = encoder.encode_image(pixels), encoder.encode_text(WORDS)
    assert image.shape == (2, dim)
    assert text.shape == (3, dim)
    save_artifact(encoder, tmp_path / name, {"name": name}, dtype=torch.float32)
    again = load_encoder(str(tmp_path / name))
    assert again.digest == encoder.digest
    with torch.no_grad():
        assert torch.equal(again.encode_image(pixels), image)
        assert torch.equal(again.encode_text(WORDS), text)


@pytest.mark.pretrained
@pytest.mark.parametrize("spec", ["ViT-B-32/openai", "hf-hub:chs20/FARE4-ViT-B-32-laion2B-s34B-b79K"])
def test_published_weights_load(spec: str) -> None:
    try:
        encoder = load_encoder(spec)
    except WeightsUnavailable as error:
        pytest.skip(f"needs the hub: {error}")
    features = torch.nn.functional.normalize(encoder.encode_text(["a photo of a cat", "a photo of a dog"]), dim=-1)
    assert 0.7 < (features[0] @ features[1]).item() < 0.99


@pytest.mark.parametrize("name", ["demo", "demo-vit", "demo-robust"])
def test_the_demo_encoders_compute_what_was_measured(name: str) -> None:
    encoder = load_encoder(name)
    assert min(check_golden(encoder, encoder.provenance["golden"]).values()) > 0.9999


def test_golden_features_are_added_to_an_artifact_without(folder: Path) -> None:
    path = folder / META_FILE
    whole = json.loads(path.read_text())
    expected = whole.pop("golden")
    path.write_text(json.dumps(whole))
    encoder = load_encoder(str(folder))
    add_golden(folder, encoder)
    added = json.loads(path.read_text())
    assert {**added, "golden": 0} == {**whole, "golden": 0}
    assert check_golden(encoder, expected) == check_golden(encoder, added["golden"])
    path.unlink()
    with pytest.raises(ArtifactError, match="golden"):
        add_golden(folder, encoder)


class Fills(TorchDispatchMode):
    """Counts how often a tensor is filled with random numbers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.uniform_, torch.ops.aten.normal_)
        return func(*args, **(kwargs or {}))


def test_weights_that_are_read_are_not_drawn_first(tiny_artifact: Path) -> None:
    """Drawing takes as long as reading; what is not drawn is there all the same."""
    with Fills() as fills:
        like = make_tiny_encoder()
    assert fills.count > 20
    with Fills() as fills:
        encoder = load_encoder(str(tiny_artifact))
    assert fills.count == 0
    for name, weight in like.model.state_dict().items():
        torch.testing.assert_close(encoder.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)  # float16 on disk
    with Fills() as fills:
        torch.nn.Linear(4, 4)
    assert fills.count  # afterwards they are drawn again
