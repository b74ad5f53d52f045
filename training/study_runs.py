"""A study's trainings: settings tried with a vendor left out, methods trained with the best, the best one shipped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ironclip.artifact import update_meta
from ironclip.attacks import ThreatModel
from ironclip.errors import OptionError
from ironclip.loading import load_encoder
from training.config import from_mapping
from training.emoji.pictures import manifest_names, read_manifest
from training.evaluate import emoji_classifier, emoji_sample
from training.jsonfile import read_json, write_json
from training.recipe import RobustConfig, load_recipe
from training.robust_run import essence
from training.robustness import Cell, key_of, measure
from training.study_cells import in_short, read_cells
from training.study_config import StudyConfig
from training.train import train


def best(trials: Sequence[Mapping[str, Any]], base_clean: float, clean_loss: float) -> Mapping[str, Any]:
    """The most robust trial of those that keep clean accuracy; where none does, the one that keeps most of it.

    A setting that collapsed at full length is passed over.
    """
    trials = [trial for trial in trials if not trial.get("collapsed")] or trials
    kept = [trial for trial in trials if trial["clean"] >= base_clean - clean_loss]
    if kept:
        return max(kept, key=lambda trial: (trial["robust"], trial["clean"]))
    return max(trials, key=lambda trial: trial["clean"])


def tune(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path, device: str = "auto") -> None:
    """Try the settings of ``methods``, in order, until one does worse than the best before it.

    ``results/tuning-METHOD.json`` holds the trials and the chosen one. A trial that was made or measured otherwise than
    the config has it now is made again. The chosen one is measured under the final attack too, which `ship` goes by.
    """
    tuning = config.tuning
    others = ("settings", "clean_loss", "final_attack", "note")
    measured = {key: value for key, value in tuning.__dict__.items() if key not in others}
    measured["dtype"] = config.dtype

    for method in methods:
        path = results / f"tuning-{method}.json"
        earlier = read_json(path) or {"trials": []}
        before = {trial.get("key"): trial for trial in earlier["trials"]}
        base = load_recipe(method, config.recipe, []).base
        digest = load_encoder(base).digest
        found: dict[str, Any] = {
            "method": method,
            "measured": measured,
            "base": _score(config, base, tuning.attack, runs, device),
            "trials": [],
        }
        for setting in tuning.settings:
            recipe = load_recipe(method, config.recipe, setting)
            part = {"budget": recipe.budget * tuning.share, "steps": int(recipe.steps * tuning.share)}
            shorter = [f"{key}={value}" for key, value in part.items() if value]
            left_out = [f'data.left_out=["{tuning.vendor}"]', f"data.path={config.data}", "evaluate_count=0"]
            trial = load_recipe(method, config.recipe, [*setting, *shorter, *left_out])
            content = {"recipe": essence(trial), "measured": measured, "base": digest}
            key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
            if key not in before:
                artifact = train(trial, _trial_folder(runs, method, setting))
                if artifact.name != "artifact":
                    raise KeyboardInterrupt  # asked to stop
                before[key] = {
                    "setting": list(setting),
                    "key": key,
                    **_score(config, str(artifact), tuning.attack, runs, device),
                }
            found["trials"].append(before[key])
            chosen = best(found["trials"], found["base"]["clean"], tuning.clean_loss)
            found["chosen"] = chosen["setting"]
            write_json(path, found)
            if chosen is not before[key]:
                break
        found["final"] = _final(config, method, {**found, "final": earlier.get("final")}, runs, device)
        write_json(path, found)
        print(f"{method}: {found['chosen']} of {len(found['trials'])} settings", flush=True)


def _score(config: StudyConfig, spec: str, attack: str, runs: Path, device: str) -> dict[str, Any]:
    """An encoder on the vendor left out: clean and robust accuracy (percent)."""
    tuning, data = config.tuning, Path(config.data)
    encoder = load_encoder(spec, device=device).served(getattr(torch, config.dtype))
    classifier = emoji_classifier(encoder, manifest_names(read_manifest(data)))
    sample = emoji_sample(encoder, data, tuning.vendor, tuning.count)
    cell = Cell(attack, ThreatModel("linf", tuning.eps / 255))
    path = runs / "tuning" / f"{key_of(classifier, sample, cell)[:24]}.json"
    found = measure(classifier, sample, cell, path)
    return {part: found[part] for part in ("clean", "robust", "robust_interval")}


def _wanted(config: StudyConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the final measurement of a tuned method must be of."""
    trial = _chosen(found)
    attack = config.tuning.final_attack or config.tuning.attack
    return {"trial": trial["key"], "setting": trial["setting"], "attack": attack}


def _final(config: StudyConfig, method: str, found: Mapping[str, Any], runs: Path, device: str) -> dict[str, Any]:
    """The chosen trial of a tuned method under the final attack, and which they are; kept where they are the same."""
    wanted = _wanted(config, found)
    earlier = found.get("final") or {}
    if {key: earlier.get(key) for key in wanted} == wanted:
        return dict(earlier)
    artifact = _trial_folder(runs, method, wanted["setting"]) / "artifact"
    return {**wanted, **_score(config, str(artifact), wanted["attack"], runs, device)}


def train_methods(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path, device: str = "auto") -> None:
    """Train ``methods`` with their chosen settings, to ``runs/METHOD/artifact``; finished ones are kept.

    A setting that did well for a short while may collapse at full length. Such a run is set aside, the trial is marked
    in ``results/tuning-METHOD.json``, and the method is trained with the next best setting.

    Raises:
        OptionError: a method whose settings have not been chosen, or whose artifact was made with others.
    """
    for method in methods:
        path = results / f"tuning-{method}.json"
        while True:
            found = read_json(path) or {}
            if "chosen" not in found:
                raise OptionError(f"{method} has no chosen setting: run `study --part tune --only {method}` first")
            recipe = load_recipe(method, config.recipe, [*found["chosen"], f"data.path={config.data}"])
            trial = _chosen(found)
            stopped = False
            if not _collapsed(runs / method, trial["clean"]):  # a run that was stopped may have
                stopped = _train_one(recipe, runs / method, results / "cells" / method)
            if not _collapsed(runs / method, trial["clean"]):
                break
            (runs / method).rename(runs / f"{method}-collapsed-{trial['key']}")
            trial["collapsed"] = True
            found["chosen"] = best(found["trials"], found["base"]["clean"], config.tuning.clean_loss)["setting"]
            found["final"] = _final(config, method, found, runs, device)
            write_json(path, found)
            print(f"{method}: {trial['setting']} collapsed at full length; next: {found['chosen']}", flush=True)
        if stopped:
            raise KeyboardInterrupt


def _trial_folder(runs: Path, method: str, setting: Sequence[str]) -> Path:
    return runs / "tuning" / "-".join([method, *setting])


def _chosen(found: Mapping[str, Any]) -> dict[str, Any]:
    """The trial of a tuned method's chosen setting."""
    (trial,) = (trial for trial in found["trials"] if trial["setting"] == found["chosen"])
    return trial  # type: ignore[no-any-return]


def _train_one(recipe: RobustConfig, folder: Path, cells: Path) -> bool:
    """Train to the end unless it is there already; whether the run was asked to stop."""
    if (folder / "artifact" / "ironclip.json").is_file():
        made = from_mapping(RobustConfig, read_json(folder / "config.json") or {})
        if essence(made) != essence(recipe):
            raise OptionError(
                f"{folder} was trained with other settings than are chosen now: delete or rename it, and {cells}"
            )
        return False
    return train(recipe, folder) == folder


def _collapsed(folder: Path, expected: float) -> bool:
    """Whether the clean accuracy last seen in a run is less than half of what a trial of its setting had (percent)."""
    log = folder / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    seen = [entry["clean"] for line in lines if "clean" in (entry := json.loads(line))]
    return bool(seen) and seen[-1] < expected / 2


def ship(config: StudyConfig, methods: Sequence[str], runs: Path, results: Path, folder: Path) -> None:
    """Copy the artifact of the best method to ``folder``, which names it after itself (``demo-robust`` in ``robust``).

    Best is what the vendor left out says (`best`, over the chosen trials under the final attack). What the study has
    measured of the encoder goes along, as ``robustness``.

    Raises:
        OptionError: a method that has not been tuned, measured and trained; cells of another encoder.
    """
    tuning = config.tuning
    trials: list[dict[str, Any]] = []
    base = 0.0
    for method in methods:
        found = read_json(results / f"tuning-{method}.json") or {}
        if "chosen" not in found or not (runs / method / "artifact" / "ironclip.json").is_file():
            raise OptionError(f"{method} has not been tuned and trained: the best cannot be told before")
        base, final, wanted = found["base"]["clean"], found.get("final") or {}, _wanted(config, found)
        if {key: final.get(key) for key in wanted} != wanted:
            raise OptionError(
                f"{method}'s choice has not been measured under {wanted['attack']}: run `study --part tune --only "
                f"{method}` again"
            )
        trials.append({**_chosen(found), **final, "method": method})
    taken = best(trials, base, tuning.clean_loss)["method"]
    made = runs / taken / "artifact"
    cells = read_cells(results).get(taken, [])
    if {cell["encoder"]["digest"] for cell in cells} - {load_encoder(str(made)).digest}:
        raise OptionError(f"{results / 'cells' / taken} is of another encoder than {made}: delete those cells")
    folder.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        shutil.copy2(path, folder / path.name)
    measured = f"{trials[0]['attack']} at {tuning.eps:g}/255 on {tuning.count} pictures of {tuning.vendor}, left out"
    compared = ", ".join(f"{trial['method']} {trial['robust']:g} (clean {trial['clean']:g})" for trial in trials)
    said = f"Percent held under {measured}, at {tuning.share:g} of the budget, base clean {base:g}: {compared}"
    update_meta(
        folder,
        robustness=[in_short(cell) for cell in cells],
        name=f"demo-{folder.name}",
        description=f"demo made robust by {taken}, whose trial was the most robust on a vendor left out of the trials",
        tried=[said, *([tuning.note] if tuning.note else [])],
    )
    print(f"{taken} -> {folder}", flush=True)
