"""`evaluate`: how often the served Classifier is right, per vendor and level of the tree, as it is and attacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ironclip.classifier import Classifier, LevelMode, predict
from ironclip.encoder import Encoder
from ironclip.hierarchy import LabelTree
from ironclip.labels import LabelSet
from training.data import LabelledImages
from training.depth import depth_profile
from training.emoji.pictures import VendorImages, load_vendor, manifest_names, read_manifest
from training.emoji.taxonomy import Name
from training.examples import examples, level_matrix, transfer_matrix
from training.gates import check
from training.jsonfile import finished, write_json
from training.retrieval import Pairs
from training.robustness import Cell, Sample, fixed_sample, key_of, measure_all, named

TEMPLATES = ("an emoji of {}",)
FLAGS = "flags"


def emoji_tree(names: Sequence[Name]) -> LabelTree:
    """The three-level tree name > subgroup > group as the library reads it."""
    parents = {name.label: name.subgroup for name in names} | {name.subgroup: name.group for name in names}
    return LabelTree.parse({"levels": ["name", "subgroup", "group"], "parents": parents})


def _pixels(images: LabelledImages, batch_size: int = 256) -> Tensor:
    """All pictures as uint8 [N, 3, R, R]."""
    parts = torch.split(torch.arange(len(images)), batch_size)
    return torch.cat([(images.images(part.tolist()) * 255).round().to(torch.uint8) for part in parts])


def _share(hits: Tensor) -> float:
    return round(100 * hits.float().mean().item(), 2) if len(hits) else float("nan")


def _top(logits: Tensor, target: Tensor, k: int) -> Tensor:
    return (logits.topk(k, dim=-1).indices == target[:, None]).any(-1)


def score_vendor(classifiers: dict[LevelMode, Classifier], images: LabelledImages, keep: Tensor) -> dict[str, Any]:
    """Scores of one vendor's pictures over all labels.

    Args:
        classifiers: for each way to score levels, a Classifier over the names in the order of ``images.classes``.
        images: the pictures; ``labels`` index the names.
        keep: bool [names]: which names' pictures count; all names stay labels.

    Returns:
        Percentages ``top1``, ``top5``, and ``LEVEL_rollup`` / ``LEVEL_prompts`` for the upper levels; ``pictures``.
    """
    chosen = keep[images.labels]
    labels = images.labels[chosen]
    pixels = _pixels(images)[chosen]
    scores: dict[str, Any] = {"pictures": int(chosen.sum())}
    for mode, classifier in classifiers.items():
        decision = predict(classifier, pixels)
        if mode == "rollup":
            scores["top1"] = _share(_top(decision.logits, labels, 1))
            scores["top5"] = _share(_top(decision.logits, labels, 5))
        for level, logits in decision.levels.items():
            if level != "name":
                target = classifier.levels[level].index[labels]
                scores[f"{level}_{mode}"] = _share(_top(logits, target, 1))
    return scores


def evaluate_emoji(encoder: Encoder, data: Path, vendors: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate on vendors of the demo data set: every name a label, prompt ``an emoji of {}``.

    Args:
        encoder: what is evaluated.
        data: folder that `build-data` wrote.
        vendors: which; the test vendors if empty.

    Returns:
        vendor -> {"without_flags": scores, "flags": scores}, see `score_vendor`.
    """
    manifest = read_manifest(data)
    names = manifest_names(manifest)
    rollup = emoji_classifier(encoder, names)
    # The bank of the names serves both.
    prompts = Classifier(encoder, rollup.label_set, rollup.bank, tree=emoji_tree(names), levels="prompts")
    classifiers: dict[LevelMode, Classifier] = {"rollup": rollup, "prompts": prompts}
    flags = torch.tensor([name.group == FLAGS for name in names])
    results: dict[str, Any] = {}
    for vendor in _vendors(manifest, vendors):
        images = VendorImages(load_vendor(data, manifest, vendor)[0], names, encoder.preprocessing)
        results[vendor] = {"without_flags": score_vendor(classifiers, images, ~flags)}
        if bool(flags[images.labels].any()):
            results[vendor]["flags"] = score_vendor(classifiers, images, flags)
    return results


def emoji_classifier(encoder: Encoder, names: Sequence[Name], levels: LevelMode = "rollup") -> Classifier:
    """The Classifier over all names, prompt ``an emoji of {}``, with the tree's levels."""
    label_set = LabelSet.parse([name.label for name in names], list(TEMPLATES))
    return Classifier(encoder, label_set, tree=emoji_tree(names), levels=levels)


def attack_emoji(
    encoder: Encoder,
    data: Path,
    folder: Path,
    attacks: Sequence[str],
    radii: Sequence[float],
    *,
    vendors: Sequence[str] = (),
    count: int = 500,
    level: str = "",
    mode: LevelMode = "rollup",
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Attack an encoder on vendors' pictures, flags left out; one file a cell in ``folder``, finished ones are kept.

    Args:
        encoder: what is attacked, as the Classifier over all names.
        data: folder that `build-data` wrote.
        folder: of the results.
        attacks: names in ATTACKS.
        radii: L-inf, in units of 1/255.
        vendors: which; the test vendors if empty.
        count: pictures of each vendor, the same ones for every encoder.
        level: of the tree that is attacked and scored; the names if empty.
        mode: how it is scored, by the names' probabilities or by its own prompts.
        options: of the attacks.

    Returns:
        The cells' results, see `robustness.measure`.
    """
    manifest = read_manifest(data)
    classifier = emoji_classifier(encoder, manifest_names(manifest), mode if level else "rollup")
    results = []
    for vendor in _vendors(manifest, vendors):
        sample = emoji_sample(encoder, data, vendor, count)
        results += measure_all(classifier, sample, folder, attacks, radii, level=level, options=options)
    return results


def emoji_sample(encoder: Encoder, data: Path, vendor: str, count: int) -> Sample:
    """``count`` pictures of a vendor, flags left out, the same for every encoder of one preprocessing."""
    manifest = read_manifest(data)
    names = manifest_names(manifest)
    kept = torch.tensor([name.group != FLAGS for name in names])
    images = VendorImages(load_vendor(data, manifest, vendor)[0], names, encoder.preprocessing)
    return fixed_sample(vendor, images, count, keep=kept)


def transfer_emoji(
    encoders: Mapping[str, Encoder],
    data: Path,
    folder: Path,
    vendor: str,
    cell: Cell,
    count: int,
    path: Path | None = None,
) -> dict[str, Any]:
    """`examples.transfer_matrix` of several encoders over all names, on one vendor's pictures."""
    names = manifest_names(read_manifest(data))
    classifiers = {name: emoji_classifier(encoder, names) for name, encoder in encoders.items()}
    sample = emoji_sample(next(iter(encoders.values())), data, vendor, count)
    return transfer_matrix(classifiers, sample, cell, folder, path=path)


def levels_emoji(
    encoder: Encoder,
    data: Path,
    folder: Path,
    vendor: str,
    cell: Cell,
    count: int,
    mode: LevelMode,
    path: Path | None = None,
) -> dict[str, Any]:
    """`examples.level_matrix` of one encoder over names, subgroups and groups."""
    names = manifest_names(read_manifest(data))
    classifier = emoji_classifier(encoder, names, mode)
    sample = emoji_sample(encoder, data, vendor, count)
    return level_matrix(classifier, emoji_tree(names).bind(classifier.names), sample, cell, folder, path=path)


def depth_emoji(
    encoder: Encoder, data: Path, folder: Path, vendor: str, cell: Cell, count: int, path: Path
) -> dict[str, Any]:
    """`depth.depth_profile` of an encoder with a hyperbolic head on the examples of its level matrix, and how made.

    It is written to ``path``, and not computed again where it lies there.
    """
    classifier = emoji_classifier(encoder, manifest_names(read_manifest(data)), "prompts")
    sample = emoji_sample(encoder, data, vendor, count)
    key = key_of(classifier, sample, cell)
    if (found := finished(path, key)) is not None:
        return found
    made = {level: examples(classifier, sample, replace(cell, level=level), folder) for level in classifier.levels}
    shown = {"name": sample.name, "digest": sample.digest, "pictures": len(sample.labels)}
    how = {"key": key, "sample": shown, "encoder": named(encoder), **cell.to_json()}
    result = {**how, **depth_profile(classifier, sample, made)}
    write_json(path, result)
    return result


def emoji_pairs(encoder: Encoder, data: Path, vendor: str, count: int) -> Pairs:
    """Pictures of a vendor, each captioned with its name in the demo's template."""
    names = manifest_names(read_manifest(data))
    sample = emoji_sample(encoder, data, vendor, count)
    present, columns = torch.unique(sample.labels, return_inverse=True)
    captions = tuple(TEMPLATES[0].format(names[index].label) for index in present.tolist())
    return Pairs(vendor, sample.pixels, captions, columns[:, None] == torch.arange(len(captions)))


def _vendors(manifest: Mapping[str, Any], chosen: Sequence[str]) -> list[str]:
    return list(chosen) or [key for key, entry in manifest["vendors"].items() if entry["role"] == "test"]


def attack_summary(results: Sequence[Mapping[str, Any]]) -> str:
    """A line a cell, then what makes the numbers doubtful."""
    lines = [f"{'vendor':22} {'attack':22} {'threat':14} {'clean':>7} {'robust':>7}  95 % interval"]
    for result in results:
        low, high = result["robust_interval"]
        lines.append(
            f"{result['sample']['name']:22} {result['attack']:22} {result['threat']['label']:14} "
            f"{result['clean']:7.1f} {result['robust']:7.1f}  {low:.1f} to {high:.1f}"
        )
    for name in dict.fromkeys(result["sample"]["name"] for result in results):
        doubts = check([result for result in results if result["sample"]["name"] == name])
        lines += [f"doubtful, {name}: {doubt}" for doubt in doubts]
    return "\n".join(lines)


def summary(results: dict[str, Any]) -> str:
    """A table of the scores without flags, one line a vendor."""
    columns = ("pictures", "top1", "top5", "subgroup_prompts", "subgroup_rollup", "group_prompts", "group_rollup")
    lines = [" ".join([f"{'vendor':22}", *(f"{column:>16}" for column in columns)])]
    for vendor, parts in results.items():
        for part, scores in parts.items():
            title = vendor if part == "without_flags" else f"{vendor} (flags)"
            lines.append(" ".join([f"{title:22}", *(f"{scores[column]:>16}" for column in columns)]))
    return "\n".join(lines)
