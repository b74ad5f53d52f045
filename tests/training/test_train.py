"""The robust-training recipe end to end: every method, kills, several processes, and what a step costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from ironclip.artifact import save_artifact
from ironclip.classifier import Classifier
from ironclip.errors import OptionError
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from tests.training.robust_world import CONV, VIT, make_artifact, write_config
from training.__main__ import TRAINING, main
from training.checkpoint import CheckpointError, NonFiniteLoss
from training.methods import METHODS
from training.methods.hpt_gpd import HPTGPD
from training.recipe import RobustConfig, load_recipe, make_method, picture_units
from training.robust_run import make_fabric, start, stretches
from training.runlog import read_log
from training.sources import make_source, step_batches
from training.train import adversarial_pixels, train, train_step
from training.watch import Watch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A convolutional encoder and a ViT, with random weights."""
    folder = tmp_path_factory.mktemp("encoders")
    return make_artifact(folder / "conv", CONV), make_artifact(folder / "vit", VIT, seed=1)


@pytest.fixture
def config_file(encoders: tuple[Path, Path], demo_data: Path, tmp_path: Path) -> Path:
    """A config that trains the ViT, with the convolutional one as proxy."""
    return write_config(tmp_path / "tiny.toml", encoders[1], encoders[0], demo_data)


def _weights(run: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(run / "checkpoint.pt", weights_only=True)["visual"]
    return weights


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_with_an_artifact_for_plain_open_clip(
    method: str, config_file: Path, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert main([method, "--config", str(config_file), "--run", str(run)]) == 0
    ours = load_encoder(str(run / "artifact"))
    theirs = open_clip.create_model(f"local-dir:{run / 'artifact'}").eval()
    base = load_encoder(str(encoders[1]))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image((pixels - 0.5) / 0.5), ours.encode_image(pixels), atol=1e-5)
        assert not torch.allclose(base.encode_image(pixels), ours.encode_image(pixels), atol=1e-3)
        texts = ["an emoji of carrot"]
        kept = torch.allclose(base.encode_text(texts), ours.encode_text(texts), atol=1e-3)
        assert kept == (method != "hierarchical")  # which trains the text projection
    assert ours.provenance["method"] == method
    assert ours.head.type == ("poincare" if method == "hierarchical" else "cosine")
    assert ours.provenance["base"]["digest"] == base.digest
    assert ours.provenance["threat_model"]["label"] == "linf 4/255"
    assert ours.provenance["data"]["pictures"]["art"]["licence"] == "MIT"
    log = read_log(run)
    assert [entry["step"] for entry in log] == [2, 4, 6, 8]
    assert {"loss", "norm", "rate", "of_floor", "images_per_second"} <= log[0].keys()
    assert 0 <= log[-1]["robust"] <= log[-1]["clean"] <= 100
    assert (run / "run.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["hpt_gpd", "hierarchical"])
def test_a_killed_run_resumes_to_the_same_weights(method: str, config_file: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    overrides = ["steps=24", "evaluate_count=0", "checkpoint_every=2"]
    config = load_recipe(method, str(config_file), overrides)
    train(config, straight)
    command = [sys.executable, "-m", "training", method, "--config", str(config_file), "--run", str(killed), *overrides]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert torch.load(killed / "checkpoint.pt", weights_only=True)["step"] < 24
    train(config, killed)
    for key, value in _weights(straight).items():
        assert torch.equal(value, _weights(killed)[key]), key


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_saves_and_says_where(config_file: Path, tmp_path: Path, number: signal.Signals) -> None:
    overrides = ["steps=100000", "evaluate_count=0", "checkpoint_every=100000", "log_every=1"]
    command = [sys.executable, "-m", "training", "tecoa", "--config", str(config_file), "--run", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *overrides], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    assert process.stdout.read().splitlines()[-1] == str(tmp_path / "run")
    # Not 0: whoever runs jobs would take it for finished.
    assert process.wait() == 130
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] >= 1
    assert not (tmp_path / "run" / "artifact").exists()


def _torchrun(config: Path, method: str, run: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "training"]
    command += [method, "--config", str(config), "--folder", str(run), *overrides]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("method", ["pmg_aft", "hierarchical"])
def test_two_processes_end_with_the_weights_of_one(method: str, config_file: Path, tmp_path: Path) -> None:
    overrides = ["dtype=float64", "attack.iterations=0", "evaluate_count=0"]
    one = train(load_recipe(method, str(config_file), overrides), tmp_path / "one").parent
    _torchrun(config_file, method, tmp_path / "two", overrides)
    expected, found = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (one, tmp_path / "two"))
    assert bool(expected["extra"]) == (method == "hierarchical")
    for part in ("visual", "extra"):
        for key, value in expected[part].items():
            assert torch.allclose(value.double(), found[part][key].double(), rtol=0, atol=1e-9), key


def test_two_processes_follow_the_loss_of_one_under_attack(config_file: Path, tmp_path: Path) -> None:
    overrides = ["evaluate_count=6", "log_every=1"]
    train(load_recipe("fare", str(config_file), overrides), tmp_path / "one")
    _torchrun(config_file, "fare", tmp_path / "two", overrides)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for key, value in _weights(tmp_path / "one").items():
        other = _weights(tmp_path / "two")[key]
        if key.endswith("in_proj_bias"):
            # A bias of the keys shifts all scores of a query alike, so it has no gradient but rounding, which AdamW
            # blows up to whole steps, of another sign where sums are made in another order. The features do not see it.
            value, other = (torch.cat(one.chunk(3)[::2]) for one in (value, other))
        assert torch.allclose(value, other, atol=3e-4), key
    assert [entry["clean"] for entry in one if "clean" in entry] == [
        entry["clean"] for entry in two if "clean" in entry
    ]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tecoa", []),
        ("hpt_gpd", ["options.batch_sum=true", "optimiser=sgd"]),  # AdamW hides a factor
        ("pmg_aft", ["options.published_code=true", "optimiser=sgd"]),
    ],
)
def test_parts_of_a_batch_add_up_to_it(method: str, options: list[str], config_file: Path, tmp_path: Path) -> None:
    overrides = ["dtype=float64", "attack.iterations=0", "evaluate_count=0", *options]
    whole = train(load_recipe(method, str(config_file), overrides), tmp_path / "whole").parent
    parts = train(load_recipe(method, str(config_file), [*overrides, "accumulate=3"]), tmp_path / "parts").parent
    for key, value in _weights(whole).items():
        assert torch.allclose(value, _weights(parts)[key], atol=1e-9), key


def test_a_run_does_not_go_on_over_an_exchanged_base(
    config_file: Path, encoders: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(encoders[1], base)
    overrides = [f"base={base}", "evaluate_count=0", "steps=2"]
    train(load_recipe("fare", str(config_file), overrides), tmp_path / "run")
    train(load_recipe("fare", str(config_file), overrides), tmp_path / "run")  # the same again is no trouble
    other = load_encoder(str(base))
    with torch.no_grad():
        next(other.model.visual.parameters()).mul_(1.01)  # type: ignore[union-attr]
    save_artifact(other, base, {})
    with pytest.raises(CheckpointError, match="another base of the same name"):
        train(load_recipe("fare", str(config_file), overrides), tmp_path / "run")


def test_a_finished_run_is_left_alone(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is made again after its end must not write an artifact anew that is being served."""
    run, overrides = tmp_path / "run", ["evaluate_count=0", "steps=2"]
    config = load_recipe("fare", str(config_file), overrides)

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}

    artifact = train(config, run)
    before = written()
    monkeypatch.setattr("training.train.start", lambda *_: pytest.fail("a finished run was set up"))
    for again in (config, replace(config, log_every=1, data=replace(config.data, workers=1))):
        assert train(again, run) == artifact
    assert written() == before
    assert capsys.readouterr().out.count("is finished") == 2
    with pytest.raises(CheckpointError, match="another learning_rate"):
        train(replace(config, learning_rate=0.5), run)


@pytest.mark.parametrize("fault", ["weights", "config", "steps", "checkpoint"])
def test_a_run_without_its_whole_artifact_is_not_finished(fault: str, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = load_recipe("fare", str(config_file), ["evaluate_count=0", "steps=2"])
    artifact = train(config, run)
    meta = json.loads((artifact / "ironclip.json").read_text(encoding="utf-8"))
    content = json.loads(json.dumps(meta))
    if fault == "weights":
        (artifact / "open_clip_model.safetensors").write_bytes(b"torn")
    elif fault == "checkpoint":
        state = torch.load(run / "checkpoint.pt", weights_only=True)
        torch.save({**state, "step": 1}, run / "checkpoint.pt")
        (artifact / "open_clip_model.safetensors").unlink()
    else:  # what an earlier run left in the folder
        content["config"] |= {"seed": 7} if fault == "config" else {"steps_done": 1}
        (artifact / "ironclip.json").write_text(json.dumps(content), encoding="utf-8")
    assert train(config, run) == artifact
    assert load_encoder(str(artifact)).provenance["config"] == meta["config"]


def test_a_torn_line_of_the_log_does_not_cost_the_artifact(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 2, "lo', encoding="utf-8")
    artifact = train(load_recipe("tecoa", str(config_file), ["evaluate_count=0", "log_every=1"]), run)
    assert (artifact / "ironclip.json").is_file()


@pytest.mark.parametrize(
    "override", ["log_every=0", "checkpoint_every=0", "accumulate=0", "batch_size=0", "learning_rate=-1"]
)
def test_numbers_that_cannot_be_are_refused(override: str, config_file: Path) -> None:
    with pytest.raises(OptionError, match=override.split("=")[0]):
        load_recipe("tecoa", str(config_file), [override])


def test_every_process_watches_its_share_however_small(config_file: Path) -> None:
    config = load_recipe("tecoa", str(config_file), ["evaluate_count=1"])

    class Third:
        """The last of three processes, of which two see no picture."""

        global_rank, world_size, device = 2, 1, torch.device("cpu")

    source = make_source(config.data, load_encoder(config.base).preprocessing)
    fabric: Any = Third()
    fabric.world_size = 3
    watch = Watch(source, config, fabric)
    fabric.world_size = 1
    encoder = load_encoder(config.base)
    scores = watch.scores(Classifier(encoder, LabelSet.parse(list(source.classes))))
    assert scores == {"clean": 0.0, "robust": 0.0}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_costs_what_its_units_say(method: str, config_file: Path, tmp_path: Path) -> None:
    config = load_recipe(method, str(config_file), ["attack.iterations=3"])
    run = start(config, tmp_path, make_fabric())
    (drawn,) = step_batches(run.source, range(1), config.batch_size, seed=0)
    text_calls, forwards = 0, 0

    def count_text(*_: object) -> None:
        nonlocal text_calls
        text_calls += 1

    def count_image(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    run.encoder.model.transformer.register_forward_hook(count_text)
    run.tower.visual.register_forward_hook(count_image)
    train_step(run, drawn)
    assert text_calls == 0
    assert forwards == 3 + run.method.forwards
    units = picture_units(run.method, config.attack, anchor=run.method.anchored, proxy=4.0)
    expected = 6 + 3 * run.method.forwards + run.method.frozen_forwards + run.method.anchored + 4 * run.method.proxy
    assert units == expected


def test_the_attack_stays_in_the_ball_and_raises_the_objective(config_file: Path, tmp_path: Path) -> None:
    run = start(load_recipe("fare", str(config_file), ["attack.iterations=10"]), tmp_path, make_fabric())
    (drawn,) = step_batches(run.source, range(1), 6, seed=0)
    from training.train import _batch_of

    batch, positions = _batch_of(run, drawn, slice(None))
    adversarial = adversarial_pixels(run, batch, positions)
    assert (adversarial - batch.images).abs().max() <= 4 / 255 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert all(parameter.grad is None for parameter in run.tower.visual.parameters())
    with torch.no_grad():
        shift = (run.tower(adversarial) - batch.anchor).square().sum(1)
        noise = batch.images + (torch.rand_like(batch.images) * 8 - 4) / 255
        assert (shift > (run.tower(noise.clamp(0, 1)) - batch.anchor).square().sum(1)).all()


def test_kept_anchors_change_nothing_and_survive_a_torn_row(config_file: Path, tmp_path: Path) -> None:
    kept = train(load_recipe("fare", str(config_file), ["log_every=1"]), tmp_path / "kept").parent
    fresh = train(
        load_recipe("fare", str(config_file), ["log_every=1", "keep_anchors=false"]), tmp_path / "fresh"
    ).parent
    for ours, theirs in zip(read_log(kept), read_log(fresh), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    run = start(load_recipe("fare", str(config_file)), tmp_path / "kept", make_fabric())
    assert run.anchors is not None
    rows = run.anchors._rows
    assert (rows[:, -1] == 1).any()
    written = int((rows[:, -1] == 1).nonzero()[0][0])
    before = rows[written].copy()
    rows[written] = 7  # a row that a kill cut short: its mark is not there
    pixels = run.source.pixels(torch.tensor([written]), torch.Generator())
    again = run.anchors(torch.tensor([written]), pixels, run.networks.original)
    assert torch.allclose(again[0], torch.from_numpy(before[:-1]), atol=1e-6)


def test_phases_have_schedules_of_their_own_and_the_pull_draws_back(config_file: Path, tmp_path: Path) -> None:
    lengths = [(s.phase.name, s.first, s.last) for s in stretches(HPTGPD(anchored_share=0.5), 9)]
    assert lengths == [("anchored", 0, 4), ("distil", 4, 9)]
    overrides = ["options.pull=1.0", "steps=8", "evaluate_count=0", "log_every=1"]
    run = tmp_path / "run"
    train(load_recipe("hpt_gpd", str(config_file), overrides), run)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for key, value in state["kept"].items():
        assert torch.allclose(value, state["visual"][key], atol=1e-6), key  # the last epoch ends with the whole pull
    rates = [entry["rate"] for entry in read_log(run)]
    assert rates[0] == pytest.approx(1e-4)  # phase A: a tenth; warm-up of one step, a quarter of the phase
    assert rates[4] == pytest.approx(1e-3)
    assert "distilled" in read_log(run)[-1]


def test_a_loss_that_is_not_finite_stops_with_a_report(config_file: Path, tmp_path: Path) -> None:
    config = load_recipe("tecoa", str(config_file))
    run = start(config, tmp_path, make_fabric())
    (drawn,) = step_batches(run.source, range(1), 6, seed=0)
    next(run.tower.visual.parameters()).data.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match=r"step 0: .*loss.*nan.*begin again in another run folder"):
        train_step(run, drawn)


def test_a_checkpoint_of_another_config_is_refused(config_file: Path, tmp_path: Path) -> None:
    train(load_recipe("tecoa", str(config_file), ["steps=2"]), tmp_path / "run")
    train(load_recipe("tecoa", str(config_file), ["steps=2", "data.workers=1", "log_every=1"]), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another steps"):
        train(load_recipe("tecoa", str(config_file), ["steps=3"]), tmp_path / "run")
    with pytest.raises(CheckpointError, match="another attack"):
        train(load_recipe("tecoa", str(config_file), ["steps=2", "attack.eps=1"]), tmp_path / "run")


def test_budgets_make_methods_comparable(config_file: Path, tmp_path: Path) -> None:
    steps = {}
    for method in ("tecoa", "pmg_aft", "hpt_gpd"):
        config = replace(load_recipe(method, str(config_file)), steps=0, budget=2000.0)
        run = start(config, tmp_path / method, make_fabric())
        steps[method] = run.steps
    assert steps["tecoa"] == int(2000 / (7 * 6))
    assert steps["pmg_aft"] == int(2000 / (11 * 6))
    assert steps["hpt_gpd"] < steps["tecoa"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "configs" / "robust").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_config_holds_for_every_method(path: Path) -> None:
    for method in METHODS:
        config = load_recipe(method, path.stem)
        assert config.name == f"{path.stem}-{method}"
        assert isinstance(config, RobustConfig)
        make_method(method, config.options)


def test_mistakes_say_what_to_do(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OptionError, match=r"did you mean attack\.eps"):
        load_recipe("tecoa", str(config_file), ["attack.epss=1"])
    with pytest.raises(OptionError, match="one of steps and budget"):
        load_recipe("tecoa", str(config_file), ["budget=5.0"])
    with pytest.raises(OptionError, match="known: clean_branch"):
        make_method("simclip", {"brunch": "frozen"})
    assert main(["hpt_gpd", "--config", str(config_file), "--run", str(tmp_path / "x"), "proxy=''"]) == 1
    assert "needs an encoder of another architecture: set proxy=SPEC" in capsys.readouterr().err
    assert main(["tecoa", "--config", "nothing"]) == 1
    assert "demo, imagenet-vit-b-16" in capsys.readouterr().err


def test_a_base_that_no_artifact_can_hold_is_refused_before_the_first_step(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_encoder(str(make_artifact(tmp_path / "base", VIT)))
    with torch.no_grad():
        base.model.visual.proj.fill_(1e5)  # type: ignore[union-attr, operator]
    spec = save_artifact(base, tmp_path / "large", {"name": "large"}, dtype=torch.float32)
    run = tmp_path / "run"
    assert main(["tecoa", "--config", str(config_file), "--run", str(run), f"base='{spec}'"]) == 1
    assert "visual.proj is not finite as torch.float16" in capsys.readouterr().err
    assert not (run / "checkpoint.pt").exists()
    assert not (run / "log.jsonl").exists()


def test_the_command_line_knows_every_method() -> None:
    assert {name for name, (kind, _) in TRAINING.items() if kind == "robust"} == set(METHODS)


def test_the_config_is_written_beside_the_run(config_file: Path, tmp_path: Path) -> None:
    train(load_recipe("agft", str(config_file), ["steps=2"]), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    assert written["attack"]["eps"] == 4.0
    assert written["method"] == "agft"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("size", ["ViT-B-32", "ViT-L-14"])
def test_one_step_of_every_method_on_the_real_sizes(size: str, demo_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "large.toml", Path(f"random:{size}"), Path("random:RN50"), demo_data)
    for method in METHODS:
        overrides = ["steps=2", "batch_size=2", "evaluate_count=0", "attack.iterations=1", "options.anchored_share=0.5"]
        overrides = overrides if method == "hpt_gpd" else overrides[:-1]
        artifact = train(load_recipe(method, str(config), [*overrides, "dtype='bfloat16'"]), tmp_path / method)
        assert load_encoder(str(artifact)).provenance["method"] == method
        shutil.rmtree(tmp_path / method)
