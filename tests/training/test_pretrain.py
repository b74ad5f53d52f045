"""The pre-training recipe end to end on a made-up world: resume after a kill, the artifact, evaluation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from ironclip.domain import load_domain
from ironclip.loading import load_encoder
from training.__main__ import main
from training.checkpoint import CheckpointError, NonFiniteLoss
from training.config import load_config
from training.domain import measure_domain
from training.pretrain import PretrainConfig, pretrain, start, train_step
from training.schedule import warmup_cosine

ROOT = Path(__file__).parents[2]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {**state["model"], **{f"average.{key}": value for key, value in state["average"].items()}}


def test_a_killed_run_resumes_to_the_same_weights(tiny_config: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    config = load_config(PretrainConfig, str(tiny_config), ["steps=16"])
    pretrain(config, straight)
    command = [sys.executable, "-m", "training", "pretrain", "--config", str(tiny_config), "--run", str(killed)]
    process = subprocess.Popen([*command, "steps=16"], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "artifact").exists()
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 16
    pretrain(config, killed)
    expected, found = _weights(straight), _weights(killed)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


def test_the_artifact_is_plain_open_clip_with_equal_features(tiny_config: Path, tmp_path: Path) -> None:
    folder = pretrain(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")
    ours = load_encoder(str(folder))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = torch.rand(3, 3, 32, 32)
    texts = ["an emoji of carrot", "a zeppelin never seen in training"]
    with torch.no_grad():
        assert torch.allclose(model.encode_image((pixels - 0.5) / 0.5), ours.encode_image(pixels), atol=1e-5)
        assert torch.allclose(model.encode_text(tokenizer(texts)), ours.encode_text(texts), atol=1e-5)
    meta = json.loads((folder / "ironclip.json").read_text(encoding="utf-8"))
    assert meta["method"] == "pretrain"
    assert meta["data"]["pictures"]["art"]["licence"] == "MIT"
    assert "other" not in meta["data"]["pictures"]
    assert meta["config"]["steps_done"] == 12


def test_words_never_seen_are_silent(tiny_config: Path, tmp_path: Path) -> None:
    encoder = load_encoder(str(pretrain(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")))
    unseen = encoder.tokenize(["zeppelin"])[0, 1]
    seen = encoder.tokenize(["carrot"])[0, 1]
    assert encoder.model.token_embedding.weight[unseen].abs().sum() == 0
    assert encoder.model.token_embedding.weight[seen].abs().sum() > 0


def test_evaluation_and_domain_are_written_into_the_artifact(
    tiny_config: Path, demo_data: Path, tmp_path: Path
) -> None:
    folder = pretrain(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")
    command = ["evaluate", "--encoder", str(folder), "--data", str(demo_data), "--into-artifact"]
    assert main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((folder / "ironclip.json").read_text(encoding="utf-8"))["scores"]
    assert scores == json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["scores"]
    assert scores["other"]["without_flags"]["pictures"] == 6
    assert scores["other"]["flags"]["pictures"] == 1
    assert 0 <= scores["other"]["without_flags"]["subgroup_rollup"] <= 100
    Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "photo.png")
    entry = measure_domain(folder, demo_data, tmp_path)
    domain = load_domain(folder)
    assert domain is not None
    assert domain.to_json() == entry
    features = load_encoder(str(folder)).encode_image(torch.rand(2, 3, 32, 32))
    assert torch.equal(domain.inside(features), domain.score(features) >= domain.threshold)


def test_training_lowers_the_loss(tiny_config: Path, tmp_path: Path) -> None:
    overrides = ["steps=40", "learning_rate=4e-3", "batch_size=12", "augment.erase=0.0"]
    config = load_config(PretrainConfig, str(tiny_config), overrides)
    pretrain(config, tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert sum(losses[-4:]) < 0.85 * sum(losses[:4])


def test_a_checkpoint_of_another_config_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another weight_decay"):
        start(load_config(PretrainConfig, str(tiny_config), ["weight_decay=0.5"]), tmp_path / "run")


def test_a_longer_schedule_is_noted(tiny_config: Path, tmp_path: Path) -> None:
    pretrain(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")
    folder = pretrain(load_config(PretrainConfig, str(tiny_config), ["steps=14"]), tmp_path / "run")
    config = json.loads((folder / "ironclip.json").read_text(encoding="utf-8"))["config"]
    assert config["steps_from_step"] == {"0": 12, "12": 14}


def test_a_loss_that_is_not_finite_stops_with_a_report(tiny_config: Path, tmp_path: Path) -> None:
    run = start(load_config(PretrainConfig, str(tiny_config)), tmp_path / "run")
    run.encoder.model.text_projection.data.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 0: loss nan.*begin again in another run folder"):
        train_step(run)


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    rates = [warmup_cosine(step, 12, 2, 3e-3) for step in range(13)]
    assert rates[0] == pytest.approx(3e-3 / 2)
    assert max(rates) == rates[1] == rates[2] == 3e-3
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_errors_are_one_line_and_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--config", "demo", "--run", str(tmp_path), f"data={tmp_path}"]) == 1
    assert "build-data demo" in capsys.readouterr().err
