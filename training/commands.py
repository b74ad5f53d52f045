"""What each command of `python -m training` does; each imports its own parts, so that `--help` is quick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ironclip.encoder import Encoder
    from training.robustness import Cell


def _cell(arguments: argparse.Namespace) -> Cell:
    from ironclip.attacks import ThreatModel
    from training.config import read_overrides
    from training.robustness import Cell

    return Cell(arguments.attack, ThreatModel("linf", arguments.eps / 255), read_overrides(arguments.set))


def _served(spec: str, arguments: argparse.Namespace) -> Encoder:
    """An encoder in the form that the service runs, in the dtype and with the head asked for."""
    import torch

    from ironclip.head import Head
    from ironclip.loading import load_encoder

    encoder: Encoder = load_encoder(spec, device=arguments.device).served(getattr(torch, arguments.dtype))
    if arguments.head == "cosine":
        encoder.head = Head()
    return encoder


def transfer(arguments: argparse.Namespace) -> None:
    """Examples made on each encoder, answered by each."""
    from training.evaluate import transfer_emoji
    from training.examples import share_table

    encoders = {spec: _served(spec, arguments) for spec in arguments.encoders}
    where = (arguments.data, arguments.results, arguments.vendor)
    result = transfer_emoji(encoders, *where, _cell(arguments), arguments.count)
    print(share_table(result["made_on"], "accuracy: made on, answered by", "robust"))
    print(share_table(result["made_on"], "fooled, of those both had right", "fooled"), end="")


def levels(arguments: argparse.Namespace) -> None:
    """Each level of the tree attacked, each scored."""
    from training.evaluate import levels_emoji
    from training.examples import share_table

    where = (arguments.data, arguments.results, arguments.vendor)
    result = levels_emoji(
        _served(arguments.encoder, arguments), *where, _cell(arguments), arguments.count, mode=arguments.mode
    )
    rows = {"(clean)": result["clean"], **result["attacked"], "(worst of all)": result["worst"]}
    print(share_table(rows, "accuracy: attacked, scored"))
    print(share_table(result["carried"], "wrong now, of those right before"))
    print("severity of the leaf's mistakes:", {level or "clean": value for level, value in result["severity"].items()})


def retrieval(arguments: argparse.Namespace) -> None:
    """Image-text recall under attacks on the embedding."""
    from training.evaluate import emoji_pairs
    from training.retrieval import caption_classifier, read_pairs, retrieval

    encoder = _served(arguments.encoder, arguments)
    if arguments.pairs:
        pairs = read_pairs(arguments.pairs, encoder.preprocessing, arguments.count)
    else:
        pairs = emoji_pairs(encoder, arguments.data, arguments.vendor, arguments.count)
    classifier = caption_classifier(encoder, pairs.captions)
    result = retrieval(classifier, pairs, arguments.goal, _cell(arguments), arguments.results)
    print(f"{'':24} {'recall@1':>9} {'@5':>7} {'@10':>7}")
    for state in ("clean", "attacked"):
        for way, ranks in result[state].items():
            print(f"{state + ' ' + way:24} " + " ".join(f"{ranks[rank]['percent']:8.1f}" for rank in ranks))
    if "target" in result:
        print(f"{'target among the first':24} " + " ".join(f"{s['percent']:8.1f}" for s in result["target"].values()))


def study(arguments: argparse.Namespace) -> None:
    """Tune, train, measure and report all methods."""
    from training.study import study
    from training.study_config import load_study

    where = (arguments.runs, arguments.results, arguments.shipped)
    study(load_study(arguments.config), arguments.part, arguments.only, *where, device=arguments.device)


def defences(arguments: argparse.Namespace) -> None:
    """Climb the ladder of attacks on defences at decision time, or report what it has found so far."""
    from training.ladder import climb, load_ladder

    config = load_ladder(arguments.config)
    if arguments.report:
        from training.ladder_report import write_report

        command = f"python -m training defences --config {arguments.config}"
        print(write_report(config, arguments.results, arguments.results.parent, command))
        return
    climb(
        config,
        arguments.results,
        arguments.made,
        encoders=arguments.encoders,
        rows=arguments.rows,
        rungs=arguments.rungs,
        device=arguments.device,
    )


def build(arguments: argparse.Namespace) -> None:
    """Build a data set from its packages."""
    from training.emoji.build import build_data

    build_data(arguments.out, arguments.size)


def pretrain(arguments: argparse.Namespace) -> None:
    """Contrastive pre-training."""
    from training.config import load_config
    from training.pretrain import PretrainConfig, pretrain

    config = load_config(PretrainConfig, arguments.config, arguments.overrides)
    folder = arguments.run or Path("runs") / config.name
    _tell(pretrain(config, folder), folder)


def robust(arguments: argparse.Namespace) -> None:
    """Robust training by the method that the command names."""
    from training.recipe import load_recipe
    from training.train import train

    config = load_recipe(arguments.command, arguments.config, arguments.overrides)
    folder = arguments.run or Path("runs") / config.name
    _tell(train(config, folder), folder)


def _tell(reached: Path, folder: Path) -> None:
    """Print where a run has got to; one that was asked to stop before its end must not look finished to who started it.

    Raises:
        KeyboardInterrupt: the run has no artifact yet. A Job of Kubernetes would take status 0 for the end of the work.
    """
    print(reached, flush=True)
    if reached == folder:
        raise KeyboardInterrupt


def export(arguments: argparse.Namespace) -> None:
    """An unfinished run's artifact, or an encoder for transformers."""
    if arguments.encoder:
        from ironclip.loading import load_encoder
        from training.transformers_export import export_transformers

        for note in export_transformers(load_encoder(arguments.encoder), arguments.out):
            print(f"note: {note}")
        print(arguments.out)
        return
    import json

    from training.config import from_mapping
    from training.pretrain import PretrainConfig, export_run, start

    content = json.loads((arguments.run / "config.json").read_text(encoding="utf-8"))
    print(export_run(start(from_mapping(PretrainConfig, content), arguments.run), arguments.out))


def evaluate(arguments: argparse.Namespace) -> None:
    """Accuracy on the demo's vendors or a suite, as it is or attacked."""
    from ironclip.artifact import update_meta
    from ironclip.errors import OptionError
    from training.config import read_overrides
    from training.evaluate import attack_emoji, attack_summary, evaluate_emoji, summary
    from training.jsonfile import write_json

    if arguments.suite:
        _suite(arguments, _served(arguments.encoder, arguments))
        return
    if arguments.attack:
        options = read_overrides(arguments.set)
        found = attack_emoji(
            _served(arguments.encoder, arguments),
            arguments.data,
            arguments.results,
            arguments.attack,
            arguments.eps,
            vendors=arguments.vendors,
            count=arguments.count,
            level=arguments.level,
            mode=arguments.mode,
            options=options,
        )
        print(attack_summary(found))
        return
    if arguments.into_artifact and (arguments.head, arguments.dtype) != ("native", "float32"):
        raise OptionError("an artifact's scores are those of its own head in float32: leave out --head and --dtype")
    encoder = _served(arguments.encoder, arguments)
    results = evaluate_emoji(encoder, arguments.data, arguments.vendors)
    print(summary(results))
    if arguments.json:
        pictures = encoder.provenance.get("data", {}).get("pictures", {})
        made = {
            "spec": arguments.encoder,
            "digest": encoder.digest,
            "dtype": arguments.dtype,
            "head": arguments.head,
            "config": encoder.provenance.get("config"),
            "training_pictures": {key: entry["pictures"] for key, entry in pictures.items()},
        }
        write_json(arguments.json, {"encoder": made, "scores": results})
    if arguments.into_artifact:
        update_meta(arguments.encoder, scores=results)


def _suite(arguments: argparse.Namespace, encoder: Encoder) -> None:
    from training.config import read_overrides
    from training.evaluate import attack_summary
    from training.suites import averages, evaluate_suite, load_suite

    found, missing = evaluate_suite(
        encoder,
        load_suite(arguments.suite),
        arguments.root,
        arguments.results,
        arguments.attack or ["pgd"],
        arguments.eps,
        count=arguments.count,
        options=read_overrides(arguments.set),
    )
    if found:
        print("\n".join([attack_summary(found), *averages(found)]))
    if missing:
        print(f"not below {arguments.root}, left out: {', '.join(missing)}")


def domain(arguments: argparse.Namespace) -> None:
    """Measure and store the domain threshold of an artifact."""
    from training.domain import measure_domain

    print(measure_domain(arguments.artifact, arguments.data, arguments.photos))


def golden(arguments: argparse.Namespace) -> None:
    """Put golden features into an artifact that was saved without."""
    from ironclip.artifact import add_golden
    from ironclip.loading import load_encoder

    add_golden(arguments.artifact, load_encoder(str(arguments.artifact)))
    print(f"{arguments.artifact}: golden features added")


def demo(arguments: argparse.Namespace) -> None:
    """Write the demo's label sets, tree and sample pictures."""
    from training.demo_files import write_demo_files

    write_demo_files(arguments.data, arguments.out)


def trees(arguments: argparse.Namespace) -> None:
    """Write the demo's further trees."""
    from ironclip.loading import load_encoder
    from training.emoji.trees import write_trees

    write_trees(load_encoder(arguments.encoder), arguments.data, arguments.out)


def figure(arguments: argparse.Namespace) -> None:
    """Draw the README's picture."""
    from training.figure import draw_predictions

    draw_predictions(arguments.encoder, arguments.data, arguments.out)
