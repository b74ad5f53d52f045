"""The ladder of defences: it climbs, goes on where it was stopped, and says no more than its cells do."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ironclip.attacks import ThreatModel
from ironclip.classifier import Classifier, predict
from ironclip.defences import make_defence
from ironclip.encoder import Encoder
from ironclip.errors import OptionError
from ironclip.labels import LabelSet
from training import fresh, ladder
from training.__main__ import main
from training.emoji.pictures import manifest_names, read_manifest
from training.fresh import Stage, measure_fresh
from training.jsonfile import write_json
from training.ladder import LadderConfig, climb, described_labels, folder_of, load_ladder, results_of
from training.ladder_cells import Ladder, pair_of, read_ladder
from training.ladder_gates import doubts, gate_in_words
from training.ladder_report import ladder_table, waiting, write_report
from training.ladder_words import ladder_words
from training.robustness import FOOLED, HELD, WRONG, Cell, Sample, defence_form

SHORT = (Stage(1, 4, "ce"), Stage(2, 3, "margin"))
NAMES = ["carrot", "kale", "cat", "dog", "rocket"]


@pytest.fixture
def ladder_file(demo_data: Path, tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of few pictures, of which the undefended encoder has some right and COLA others; attacks are short."""

    def right(encoder: Encoder, data: Path, vendor: str, count: int) -> Sample:
        names = described_labels(manifest_names(read_manifest(data)))
        pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
        answers = [
            predict(Classifier(encoder, names, defence=make_defence(name)), pixels).logits.argmax(1)
            for name in ("none", "cola")
        ]
        return Sample(vendor, pixels, torch.where(torch.arange(count) % 2 == 0, answers[0], answers[1]))

    monkeypatch.setattr(ladder, "emoji_sample", right)
    monkeypatch.setattr(ladder, "measure_fresh", partial(measure_fresh, stages=SHORT))
    monkeypatch.setitem(ladder.SEEING, "ensemble", "pgd")
    path = tmp_path / "ladder.toml"
    path.write_text(
        f"""
encoders = ["{tiny_artifact}"]
data = "{demo_data}"
vendor = "other"
count = 6
eps = [48.0]
rungs = ["transfer-pgd", "white-box", "fresh", "ensemble"]
only = {{ ensemble = ["none", "ttc"] }}
defences.none.name = "none"
defences.cola.name = "cola"
defences.cola-product = {{ name = "cola", coupling = "product" }}
defences.ttc.name = "ttc"
""",
        encoding="utf-8",
    )
    return path


def outcomes_of(results: Path) -> dict[str, Any]:
    parts = ("outcomes", "clean", "robust", "key")
    return {
        f"{row}/{stem}": [cell[part] for part in parts]
        for rows in results_of(results).values()
        for row, cells in rows.items()
        for stem, cell in cells.items()
    }


def test_it_climbs_goes_on_and_reports(
    ladder_file: Path, tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "docs" / "cells"
    command = ["defences", "--config", str(ladder_file), "--results", str(results), "--made", str(tmp_path / "made")]
    assert main(command) == 0
    found = outcomes_of(results)
    rows = ["none", "cola", "cola-product", "ttc"]
    assert set(found) == {
        *(f"{row}/{rung}-48" for row in rows for rung in ("transfer-pgd", "white-box")),
        *(f"{row}/fresh-48" for row in rows[1:]),  # `none` draws nothing
        *(f"{row}/ensemble-48" for row in ("none", "ttc")),
    }
    assert (results / folder_of(str(tiny_artifact)) / "none").is_dir()
    assert [path.name for path in tiny_artifact.iterdir() if path.is_dir()] == []
    assert not list(results.rglob("*.partial.json"))
    assert all(found[f"{row}/white-box-48"][1] >= 50 for row in ("none", "cola"))
    assert FOOLED in "".join(outcomes for outcomes, *_ in found.values())
    assert all(0 <= robust <= clean for _, clean, robust, _ in found.values())
    transfer = json.loads(next(results.glob("*/cola/transfer-pgd-48.json")).read_text(encoding="utf-8"))
    assert (transfer["adaptive"], transfer["defence"]) == (False, "cola")
    # Stopped at any line, it comes to the same.
    again = tmp_path / "again"
    config = load_ladder(str(ladder_file))
    for most in range(2, 40, 4):
        lines = 0

        def stop(line: str) -> None:
            nonlocal lines
            lines += 1
            if lines > most:  # noqa: B023
                raise KeyboardInterrupt

        with suppress(KeyboardInterrupt):
            climb(config, again / "cells", again / "made", say=stop)
    assert outcomes_of(again / "cells") == found
    written = {path: path.stat().st_mtime_ns for path in results.rglob("*.json")}
    assert main([*command, "--report"]) == 0
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*.json")} == written
    said = (tmp_path / "docs" / "README.md").read_text(encoding="utf-8")
    assert "| `cola-product` |" in said
    assert "transfer: PGD-10" in said
    assert f"python -m training defences --config {ladder_file}" in said
    assert len(list((tmp_path / "docs").glob("ladder-*.png"))) == 1
    for wrong in (["--rows", "colla"], ["--rungs", "gray-box"], ["--encoders", "demo"]):
        assert main([*command, *wrong]) == 1
        assert f"{wrong[1]!r}; there are: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('rungs = ["gray-box"]', "no rung 'gray-box'; there are: transfer-pgd"),
        ('only = { gray-box = ["none"] }', "no rung 'gray-box'"),
        ('only = { fresh = ["colla"] }', "only.fresh: there is no row 'colla'; there are: none"),
        ('only = { fresh = "none" }', "only.fresh is a list of rows, not 'none'"),
        ("radii = { gray-box = [2.0] }", "no rung 'gray-box'"),
        ("radii = { fresh = [3.0] }", "radii.fresh is a list of radii of eps, [2.0], not [3.0]"),
        ("radii = { fresh = 2.0 }", "radii.fresh is a list of radii of eps, [2.0], not 2.0"),
        ('defences.cola.name = "colla"', "no defence 'colla'; there are: none, cola"),
        ("defences.cola.views = 3", "no defence 'None'"),
        ('defences.cola = { name = "cola", vieuws = 3 }', "vieuws"),
        ('defences.cola = "cola"', "defences.cola is a table"),
        ("epsilon = 3", "unknown key"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'{line}\nencoders = ["demo"]\ndefences.none.name = "none"\n', encoding="utf-8")
    with pytest.raises(OptionError) as caught:
        load_ladder(str(path))
    assert says in str(caught.value)


@pytest.fixture
def random_decision(tiny_encoder: Encoder) -> tuple[Classifier, Sample]:
    """A decision by crops, and ten pictures labelled by it, one of them wrongly."""
    classifier = Classifier(tiny_encoder, LabelSet.parse(NAMES), defence=make_defence("cola", {"views": 3}))
    pixels = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    labels = predict(classifier, pixels).logits.argmax(1)
    labels[0] = (labels[0] + 1) % len(NAMES)
    return classifier, Sample("noise", pixels, labels)


def test_what_is_dear_is_planned_for_some_rows_and_radii(tmp_path: Path) -> None:
    config = LadderConfig(
        ("demo",),
        {"none": {"name": "none"}, "cola": {"name": "cola"}},
        eps=(1.0, 2.0),
        only={"ensemble": ["cola"]},
        radii={"ensemble": [2.0], "fresh": [1.0]},
    )
    cells = [
        (rung, row, eps)
        for rung in ("white-box", "ensemble", "fresh")
        for row in config.defences
        for eps in config.eps
        if config.planned(row, rung, eps)
    ]
    white = [("white-box", row, eps) for row in ("none", "cola") for eps in (1.0, 2.0)]
    assert cells == [*white, ("ensemble", "cola", 2.0), ("fresh", "cola", 1.0)]  # `none` draws nothing
    left = waiting(Ladder(config, {}), "demo", 1.0)
    assert not [line for line in left if line.startswith("APGD ensemble")]


def test_fresh_draws_are_judged_by_draws_that_nobody_has_seen(
    random_decision: tuple[Classifier, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, sample = random_decision
    seeds: list[int] = []
    reseeded = Classifier.reseeded

    def logged(self: Classifier, seed: int) -> Classifier:
        seeds.append(seed)
        return reseeded(self, seed)

    monkeypatch.setattr(Classifier, "reseeded", logged)
    wide = Cell("eot-pgd", ThreatModel("linf", 64 / 255))
    result = measure_fresh(classifier, sample, wide, tmp_path / "wide.json", stages=SHORT, progress=lambda _: None)
    assert result["robust"] < result["clean"]
    assert result["worst"] <= result["robust"]
    assert FOOLED in result["outcomes"]
    assert result["outcomes"][0] == WRONG
    judges, choosers = set(fresh._TEST), set(fresh._VALIDATION)
    attack = {seed for seed in seeds if seed} - judges - choosers
    assert judges <= set(seeds)
    assert choosers <= set(seeds)
    assert judges.isdisjoint(choosers)
    assert attack
    assert max(attack) < min(choosers | judges)
    nothing = Cell("eot-pgd", ThreatModel("linf", 0.0))
    none = measure_fresh(classifier, sample, nothing, tmp_path / "none.json", stages=SHORT, progress=lambda _: None)
    assert none["robust"] == none["clean"] == result["clean"]


def test_fresh_draws_go_on_where_they_were_stopped(random_decision: tuple[Classifier, Sample], tmp_path: Path) -> None:
    classifier, sample = random_decision
    cell = Cell("eot-pgd", ThreatModel("linf", 64 / 255))
    tried = (torch.roll(sample.pixels, 1, 0),)

    def run(name: str, say: Callable[[str], None]) -> dict[str, Any]:
        path = tmp_path / name
        return measure_fresh(classifier, sample, cell, path, candidates=tried, stages=SHORT, batch_size=4, progress=say)

    whole = run("whole.json", lambda _: None)
    assert {WRONG, FOOLED} <= set(whole["outcomes"])
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("parts.json", stop)
    assert not (tmp_path / "parts.json").exists()
    parts = run("parts.json", said.append)
    assert [line.split(":")[1].split(",")[0].strip() for line in said] == ["4/10", "8/10", "10/10"]
    for part in ("outcomes", "clean", "robust", "worst", "gradients", "key"):
        assert parts[part] == whole[part], part
    assert not (tmp_path / "parts.partial.json").exists()


CONFIG = LadderConfig(
    ("demo",),
    {
        "none": {"name": "none"},
        "cola": {"name": "cola"},
        "cola-product": {"name": "cola", "coupling": "product"},
        "clipure": {"name": "clipure"},
    },
    eps=(1.0, 2.0),
    only={"autoattack": ["none", "cola"], "fresh": ["cola"]},
)


def put(folder: Path, row: str, rung: str, eps: float, outcomes: str, **more: Any) -> None:
    """Write a cell as the ladder would."""
    threat = {"norm": "linf", "eps": eps / 255, "label": f"linf {eps:g}/255"}
    attack = ladder.TRANSFER[rung] if rung in ladder.TRANSFER else (ladder.SEEING.get(rung, "eot-pgd"), {})
    cell = {
        "encoder": {"digest": "d", "dtype": "bfloat16", "device": "cpu"},
        "sample": {"name": "emojione", "digest": "s", "pictures": len(outcomes)},
        "commit": "c" * 40,
        "attack": attack[0],
        "options": attack[1],
        "threat": threat,
        "level": "",
        "defence_options": defence_form(CONFIG.defence(row)),
        **({"examples": ladder.WHOLE} if rung in ladder.TRANSFER else {}),
        "robust": 100 * outcomes.count(HELD) / len(outcomes),
        "unreliable": [],
        "outcomes": outcomes,
    }
    write_json(folder / "demo" / row / f"{rung}-{eps:g}.json", {**cell, **more})


def of(held: int, fooled: int) -> str:
    return HELD * held + FOOLED * fooled + WRONG * (100 - held - fooled)


def read(folder: Path) -> Ladder:
    return read_ladder(folder, CONFIG)


def test_what_is_missing_is_a_dash_and_not_spoken_of(tmp_path: Path) -> None:
    assert ladder_words(read(tmp_path), "demo", 2.0) == []
    assert "| `cola` |" + " - |" * 9 in ladder_table(read(tmp_path), "demo", 2.0)
    assert "Nothing has been computed yet." in write_report(CONFIG, tmp_path, tmp_path).read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.png"))
    put(tmp_path, "cola", "white-box", 2.0, of(10, 50))
    # Nothing to hold it against.
    assert ladder_words(read(tmp_path), "demo", 2.0) == []
    row = "| `cola` | 60.0 (50 to 69) | - | - | - | 10.0 | - | - | - | 10.0 (6 to 17), white box alone |"
    assert row in ladder_table(read(tmp_path), "demo", 2.0)
    assert "AutoAttack: all rows" in waiting(read(tmp_path), "demo", 2.0)
    assert "white box (draws known): `none`, `cola-product`, `clipure`" in waiting(read(tmp_path), "demo", 2.0)
    put(tmp_path, "cola", "ensemble", 2.0, of(10, 50)[::-1])
    put(tmp_path, "cola", "autoattack", 2.0, of(10, 50))
    assert "| 0.0 (0 to 4) |\n" in ladder_table(read(tmp_path), "demo", 2.0)
    put(tmp_path, "cola", "ensemble", 2.0, of(10, 50), encoder={"digest": "other", "dtype": "bfloat16"})
    with pytest.raises(OptionError, match="differ in the encoder's digest"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("row", "rung", "more", "what"),
    [
        ("cola", "white-box", {"defence_options": ["cola", {"views": "9"}]}, "defence"),
        ("cola", "transfer-pgd", {"options": {"iterations": 10}}, "attack"),
        ("cola", "transfer-apgd", {"examples": "up to the boundary"}, "way of making examples"),
        ("none", "autoattack", {"threat": {"label": "linf 1/255"}}, "radius"),
    ],
)
def test_cells_of_another_plan_are_not_shown_under_this_one(
    row: str, rung: str, more: dict[str, Any], what: str, tmp_path: Path
) -> None:
    put(tmp_path, row, rung, 2.0, of(10, 50))
    read(tmp_path)
    put(tmp_path, row, rung, 2.0, of(10, 50), **more)
    with pytest.raises(OptionError, match=f"{rung}-2.json was made with another {what}: delete it"):
        read(tmp_path)


def test_cells_made_otherwise_or_again_are_named(tmp_path: Path) -> None:
    native = {"digest": "d", "dtype": "bfloat16", "device": "cpu", "arithmetic": "bfloat16"}
    put(tmp_path / "cells", "none", "white-box", 2.0, of(5, 55), encoder=native, key="one")
    put(tmp_path / "cells", "none", "ensemble", 2.0, of(5, 55), encoder=native, key="two")
    put(tmp_path / "cells", "cola", "white-box", 2.0, of(5, 55), encoder={**native, "arithmetic": "float32"}, key="x")
    report = partial(write_report, CONFIG, tmp_path / "cells", tmp_path)
    said = report().read_text(encoding="utf-8")
    assert (
        "products of the same numbers made in float32 and rounded (`ironclip.upcast`): `demo cola white-box-2`." in said
    )
    assert "Made again" not in said
    wide = {**native, "arithmetic": "float32"}
    put(tmp_path / "again", "none", "white-box", 2.0, of(5, 55), encoder=wide, key="one")
    other = of(5, 55).replace(HELD, FOOLED, 1)
    assert other != of(5, 55)
    put(tmp_path / "again", "none", "ensemble", 2.0, other, encoder=wide, key="two")
    # Of another key: not the same cell.
    put(tmp_path / "again", "cola", "white-box", 2.0, of(0, 60), encoder=wide, key="y")
    said = report().read_text(encoding="utf-8")
    assert f"products in float32: 2 cells; of their {2 * len(other)} outcomes 1 came out otherwise." in said


def test_words_say_what_the_intervals_say(tmp_path: Path) -> None:
    for eps in (1.0, 2.0):
        put(tmp_path, "none", "transfer-pgd", eps, of(5, 55))
        put(tmp_path, "none", "white-box", eps, of(4, 56))
        put(tmp_path, "cola", "transfer-pgd", eps, of(40, 20))
        put(tmp_path, "cola", "white-box", eps, of(5, 55))
    spoken = "\n".join(ladder_words(read(tmp_path), "demo", 2.0))
    blind, seen = (next(line for line in spoken.splitlines() if part in line) for part in ("transfer", "sees it"))
    assert "PGD-10 40.0 %, where `none` has 5.0 % (+35.0 points" in blind
    assert "not told apart" not in blind
    assert "5.0 %, where `none` has 4.0 % (+1.0 points" in seen
    assert "not told apart" in seen
    assert "`cola` 60.0 % (the same pictures)" in spoken
    for unsaid in ("CLIPure", "draws anew", "coupling"):
        assert unsaid not in spoken
    draws = {"draws": {"validation": 5, "test": 10}, "clean": 60.0, "worst": 2.0}
    put(tmp_path, "cola", "fresh", 2.0, of(30, 30), **draws)
    put(tmp_path, "cola-product", "white-box", 2.0, of(5, 55))
    put(tmp_path, "clipure", "white-box", 2.0, of(4, 56))
    spoken = "\n".join(ladder_words(read(tmp_path), "demo", 2.0))
    assert "2.0 % under all of them" in spoken
    assert "0 of 100 outcomes differ" in spoken
    assert "all 100 outcomes over every radius: here it changes no decision" in spoken
    put(tmp_path, "clipure", "transfer-pgd", 2.0, of(8, 52))
    spoken = "\n".join(ladder_words(read(tmp_path), "demo", 2.0))
    assert "changes no decision" not in spoken
    assert "**CLIPure under transfer**" in spoken
    # One picture in two hundred more is not told apart; a fifth of them less is.
    assert pair_of(of(51, 9), of(50, 10)).word == "not told apart"
    assert pair_of(of(20, 40), of(40, 20)).word == "less"


def test_gates_doubt_what_cannot_be(tmp_path: Path) -> None:
    put(tmp_path, "none", "white-box", 1.0, of(10, 50))
    put(tmp_path, "none", "white-box", 2.0, of(4, 56))
    put(tmp_path, "cola", "transfer-pgd", 1.0, of(20, 40))
    put(tmp_path, "cola", "white-box", 1.0, of(10, 50))
    put(tmp_path, "cola", "fresh", 1.0, of(18, 42))
    assert doubts(read(tmp_path)) == []
    put(tmp_path, "none", "white-box", 2.0, of(14, 46))
    put(tmp_path, "cola", "transfer-pgd", 2.0, of(30, 30))
    put(tmp_path, "cola", "white-box", 1.0, of(24, 36))
    put(tmp_path, "cola", "ensemble", 1.0, of(26, 30))
    put(tmp_path, "cola", "fresh", 1.0, of(22, 38), unreliable=["blind"])
    said = "\n".join(doubts(read(tmp_path)))
    for part in (
        "none: autoattack-rand at linf 2/255 leaves more standing than autoattack-rand at linf 1/255",
        "cola: white box (draws known) leaves 4.0 % standing that transfer: PGD-10 fells at 1/255",
        "cola: APGD ensemble leaves 2.0 % standing that white box (draws known) fells at 1/255",
        "transfer: PGD-10 leaves 30.0 % at 2/255, more than 20.0 % at 1/255",
        "fresh draws (EOT) hold 22.0 %, less than where the draws are known: 24.0 %",
        "fresh draws (EOT) hold 22.0 %, transfer: PGD-10 20.0 %",
        "4 pictures are right before the attack in some cells and wrong in others",
        "eot-pgd at linf 1/255: blind",
    ):
        assert part in said, part


def test_a_gate_that_lets_something_through_is_a_doubt(tmp_path: Path) -> None:
    """At 16/255 a ball holds pictures of anything: what stands there stands by the attack's fault."""
    config = replace(CONFIG, gate=16.0)
    planned = [
        (rung, eps) for rung in config.rungs for eps in config.radii_of(rung) if config.planned("cola", rung, eps)
    ]
    assert ("white-box", 16.0) in planned
    assert [rung for rung, eps in planned if eps == 16] == ["white-box"]
    put(tmp_path, "none", "white-box", 16.0, of(0, 60))
    said = write_report(config, tmp_path, tmp_path / "docs").read_text(encoding="utf-8")
    assert "At 16/255" in said
    assert "leaves 0.0 % of `demo` at most (`none`, of 1 rows)" in said
    assert not doubts(read_ladder(tmp_path, config))
    put(tmp_path, "cola", "white-box", 16.0, of(3, 57))
    assert "3.0 % of `demo` at most (`cola`, of 2 rows)" in gate_in_words(read_ladder(tmp_path, config))
    assert any("3.0 % hold, more than 1 %" in line for line in doubts(read_ladder(tmp_path, config)))
    assert not gate_in_words(read(tmp_path))
