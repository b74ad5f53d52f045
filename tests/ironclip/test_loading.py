"""load_encoder: every kind of name, and what is said of a wrong one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ironclip.artifact import CONFIG_FILE, META_FILE, WEIGHTS_FILE, read_meta, save_artifact, update_meta
from ironclip.encoder import Encoder
from ironclip.errors import (
    ArchitectureMismatch,
    ArtifactError,
    ChecksumMismatch,
    EncoderLoadError,
    UnknownEncoder,
    WeightsUnavailable,
)
from ironclip.loading import load_encoder

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


def test_hub_name_loads_from_the_hub_cache(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published encoders are hub names; the loading code is the real one, the cache stands in for the network."""
    repo = tmp_path / "models--someone--robust-clip"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copy(tiny_artifact / CONFIG_FILE, snapshot)
    shutil.copy(tiny_artifact / WEIGHTS_FILE, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = load_encoder("hf-hub:someone/robust-clip", cache_dir=str(tmp_path))
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoder.encode_image(pixels), load_encoder(str(tiny_artifact)).encode_image(pixels))
    # Without its weights open_clip would hand out random ones.
    (snapshot / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsUnavailable):
        load_encoder("hf-hub:someone/robust-clip", cache_dir=str(tmp_path))


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
    ],
)
def test_wrong_names_list_what_exists(spec: str, error: type[EncoderLoadError], says: str) -> None:
    with pytest.raises(error, match=says):
        load_encoder(spec)


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


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"embed_dim": 1}}'])
def test_unreadable_config_is_refused(folder: Path, content: str) -> None:
    (folder / CONFIG_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=CONFIG_FILE):
        load_encoder(str(folder))


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ArtifactError, match=missing):
        load_encoder(str(folder))


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"format": 99}'])
def test_unreadable_meta_is_refused(folder: Path, content: str) -> None:
    (folder / META_FILE).write_text(content)
    with pytest.raises(ArtifactError, match=META_FILE):
        load_encoder(str(folder))


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
    assert load_encoder("random:ViT-S-32-alt").digest == load_encoder("random:ViT-S-32-alt:0").digest


def test_quick_gelu_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's tag needs QuickGELU though the plain model name does not say so; LAION's must not get it."""
    asked = {}

    def create_model(name: str, **kwargs: object) -> None:
        asked[(name, kwargs["pretrained"])] = kwargs["quick_gelu"]
        raise FileNotFoundError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for spec in ("ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k", "ViT-B-32-quickgelu/openai"):
        with pytest.raises(WeightsUnavailable):
            load_encoder(spec)
    assert asked == {
        ("ViT-B-32", "openai"): True,
        ("ViT-B-32", "laion2b_s34b_b79k"): False,
        ("ViT-B-32-quickgelu", "openai"): True,
    }


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
