"""A study end to end on a small world: it chooses, trains, measures, resumes, and keeps what it has found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ironclip.errors import OptionError
from ironclip.loading import load_encoder
from tests.training.robust_world import CONV, VIT, make_artifact, write_config
from training.__main__ import main
from training.study_config import load_study
from training.study_runs import best


def test_the_best_trial_keeps_clean_accuracy() -> None:
    trials = [
        {"setting": ["a"], "clean": 58.0, "robust": 20.0},
        {"setting": ["b"], "clean": 55.0, "robust": 30.0},
        {"setting": ["c"], "clean": 40.0, "robust": 38.0},
    ]
    assert best(trials, 60.0, 8.0)["setting"] == ["b"]
    assert best(trials, 60.0, 30.0)["setting"] == ["c"]
    assert best(trials, 90.0, 8.0)["setting"] == ["a"]


@pytest.fixture
def study_file(demo_data: Path, tmp_path: Path) -> Path:
    """Two methods on the emoji world, one left-out vendor, one attack."""
    base, proxy = make_artifact(tmp_path / "vit", VIT, seed=1), make_artifact(tmp_path / "conv", CONV)
    recipe = write_config(tmp_path / "recipe.toml", base, proxy, demo_data)
    path = tmp_path / "study.toml"
    path.write_text(
        f"""
recipe = "{recipe}"
encoders = ["{base}"]
methods = ["tecoa", "hierarchical"]
data = "{demo_data}"

[tuning]
share = 0.5
vendor = "other"
count = 4
attack = "pgd"
final_attack = "apgd-ce"
settings = [["learning_rate=1e-3"], ["learning_rate=3e-3"]]

[[cells]]
attack = "autoattack-ensemble"
options = {{ iterations = 3 }}
eps = [1.0, 4.0]
vendors = ["other"]
count = 5

[[cells]]
attack = "fgsm"
eps = [4.0]
vendors = ["other"]
count = 4
levels = ["subgroup"]

[compare]
vendor = "other"
count = 4
attack = "pgd"
embedding_attack = "pgd"
eps = 4.0
options = {{ iterations = 2 }}
""",
        encoding="utf-8",
    )
    return path


@pytest.mark.timeout(900)
def test_a_study_chooses_trains_measures_and_goes_on(
    study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    command = ["study", "--config", str(study_file), "--runs", str(runs), "--results", str(results)]
    assert main([*command, "--part", "train", "--only", "tecoa"]) == 1
    assert "run `study --part tune --only tecoa` first" in capsys.readouterr().err
    assert main([*command, "--part", "tune", "--only", "tecoa"]) == 0
    found = json.loads((results / "tuning-tecoa.json").read_text(encoding="utf-8"))
    assert [trial["setting"] for trial in found["trials"]] == [["learning_rate=1e-3"], ["learning_rate=3e-3"]]
    assert found["chosen"] in [["learning_rate=1e-3"], ["learning_rate=3e-3"]]
    config = json.loads((runs / "tuning" / "tecoa-learning_rate=3e-3" / "config.json").read_text(encoding="utf-8"))
    assert config["steps"] == 4  # half of the recipe's
    assert config["learning_rate"] == 3e-3
    assert config["data"]["left_out"] == ["other"]
    # A run of the chosen setting that lost its clean accuracy is set aside, and the next best setting taken.
    (runs / "tecoa").mkdir()
    (runs / "tecoa" / "log.jsonl").write_text('{"step": 4, "clean": 0.0}\n', encoding="utf-8")
    assert main(command) == 0
    assert len(list(runs.glob("tecoa-collapsed-*/log.jsonl"))) == 1
    tuned, found = found, json.loads((results / "tuning-tecoa.json").read_text(encoding="utf-8"))
    assert [trial["setting"] for trial in found["trials"] if trial.get("collapsed")] == [tuned["chosen"]]
    assert found["chosen"] != tuned["chosen"]
    trained = json.loads((runs / "tecoa" / "config.json").read_text(encoding="utf-8"))
    assert trained["steps"] == 8
    assert [f"learning_rate={trained['learning_rate']:.0e}".replace("e-0", "e-")] == found["chosen"]
    cells = {path.parent.name: path for path in results.glob("cells/*/*.json")}
    rows = set(cells)
    (base_row,) = rows - {"tecoa", "hierarchical", "hierarchical-cosine"}
    assert (results / "curves-other.png").stat().st_size > 5000
    count = len(list(results.glob("cells/**/*.json")))
    assert count == 4 * 3  # the base, tecoa and two heads; two radii and a level each
    for path in results.glob("cells/hierarchical-cosine/*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["encoder"]["head"] == "cosine"
    transfer = json.loads((results / "transfer.json").read_text(encoding="utf-8"))
    assert set(transfer["made_on"]) == {base_row, "tecoa", "hierarchical"}
    for kind, names in {
        "levels": {f"{row}-{mode}" for row in rows for mode in ("rollup", "prompts")},
        "retrieval": {f"{row}-{goal}" for row in rows for goal in ("away", "towards")},
        "depth": {"hierarchical"},
    }.items():
        assert {path.stem for path in (results / kind).glob("*.json")} == names
    depth = json.loads((results / "depth" / "hierarchical.json").read_text(encoding="utf-8"))
    assert set(depth["levels"]) == {"name", "subgroup", "group"}
    assert all(0 < level["norm"][1] < 1 for level in depth["levels"].values())
    assert 0 <= depth["in_order"] <= 100
    said = (results / "README.md").read_text(encoding="utf-8")
    assert "| hierarchical-cosine |" in said
    for part in ("## Transfer", "## Levels of the tree", "![levels-prompts]", "## Depth", "## Retrieval"):
        assert part in said
    assert "| hierarchical | name | 7 |" in said
    for plot in ("levels-rollup.png", "levels-prompts.png", "depth.png"):
        assert (results / plot).stat().st_size > 5000
    assert f"| tecoa | {tuned['chosen'][0]}, collapsed at full length |" in said
    assert "other subgroup fgsm linf 4/255" in said
    shipped = tmp_path / "robust"
    assert main([*command, "--part", "ship", "--shipped", str(shipped)]) == 0
    encoder = load_encoder(str(shipped))
    assert encoder.provenance["name"] == "demo-robust"
    tried = encoder.provenance["tried"][0]
    measured = encoder.provenance["robustness"]
    assert {(cell["attack"], cell["threat"]) for cell in measured} == {
        ("autoattack-ensemble", "linf 1/255"),
        ("autoattack-ensemble", "linf 4/255"),
        ("fgsm", "linf 4/255"),
    }
    assert all(0 <= cell["robust"] <= cell["clean"] for cell in measured)
    assert "apgd-ce at 2/255 on 4 pictures of other" in tried
    chosen = {}
    for method in ("tecoa", "hierarchical"):
        tuned = json.loads((results / f"tuning-{method}.json").read_text(encoding="utf-8"))
        final = tuned["final"]
        assert (final["setting"], final["attack"]) == (tuned["chosen"], "apgd-ce")
        chosen[method] = (final["robust"], final["clean"])
        assert f"{method} {final['robust']:g} (clean {final['clean']:g})" in tried
    taken = max(chosen, key=lambda method: chosen[method])
    assert encoder.digest == load_encoder(str(runs / taken / "artifact")).digest
    assert "Cells measured on: cpu." in said or torch.cuda.is_available()
    # A cell that was measured a second time elsewhere is held against the first.
    again = results / "again" / "tecoa" / cells["tecoa"].name
    again.parent.mkdir(parents=True)
    content = json.loads(cells["tecoa"].read_text(encoding="utf-8"))
    content["encoder"]["device"], content["outcomes"] = "abacus", "?" + content["outcomes"][1:]
    again.write_text(json.dumps(content), encoding="utf-8")
    assert main([*command, "--part", "report"]) == 0
    said = (results / "README.md").read_text(encoding="utf-8")
    assert f"(abacus) | 1 of {len(content['outcomes'])} |" in said
    kept = (".pt", ".safetensors", ".json")
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix in kept}
    written = {path: when for path, when in written.items() if not path.name.startswith("tuning-")}
    assert results / "levels" / "tecoa-rollup.json" in written
    capsys.readouterr()
    assert main(command) == 0
    assert "step" not in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in written}
    # A result of something else is made again.
    changed = results / "retrieval" / "tecoa-away.json"
    before = changed.read_text(encoding="utf-8")
    changed.write_text(before.replace('"key": "', '"key": "0'), encoding="utf-8")
    assert main([*command, "--part", "compare"]) == 0
    assert changed.read_text(encoding="utf-8") == before
    # What is shipped is what was measured, and what was measured is what the config asks for.
    cell = json.loads(cells["tecoa"].read_text(encoding="utf-8"))
    for path in results.glob(f"cells/{taken}/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**content, "encoder": {**cell["encoder"], "digest": "0"}}), encoding="utf-8")
    assert main([*command, "--part", "ship", "--shipped", str(shipped)]) == 1
    assert "is of another encoder" in capsys.readouterr().err
    study_file.write_text(study_file.read_text().replace('final_attack = "apgd-ce"', 'final_attack = "fgsm"'))
    assert main([*command, "--part", "ship", "--shipped", str(shipped)]) == 1
    assert "has not been measured under fgsm" in capsys.readouterr().err


def test_unknown_names_are_refused(study_file: Path, tmp_path: Path) -> None:
    text = study_file.read_text(encoding="utf-8")
    study_file.write_text(text.replace('"hierarchical"', '"hierarchial"'), encoding="utf-8")
    with pytest.raises(OptionError, match="no method 'hierarchial'"):
        load_study(str(study_file))
    assert load_study("demo").methods[0] == "simclip"
    assert json.dumps(load_study("demo").tuning.settings)
