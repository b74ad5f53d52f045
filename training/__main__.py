"""Make encoders and measure them.

Robust training: python -m training METHOD --config CONFIG, where METHOD is simclip, fare, tecoa, pmg_aft, agft, hpt_gpd
or hierarchical and CONFIG a name in training/configs/robust (start with demo) or a .toml file. Under torchrun the
processes share each batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ironclip.dtypes import DTYPES
from ironclip.errors import IronclipError
from training import commands

# Command -> where its configs lie, and what it does. Kept beside METHODS by a test: --help loads no torch.
TRAINING = {
    "pretrain": ("pretrain", "contrastive pre-training of a small CLIP from scratch"),
    "simclip": ("robust", "Sim-CLIP: Siamese cosine with stop-gradient, no labels"),
    "fare": ("robust", "FARE: keep the clean features under attack, no labels"),
    "tecoa": ("robust", "TeCoA: cross-entropy of class texts on adversarial pictures"),
    "pmg_aft": ("robust", "PMG-AFT: TeCoA guided by the pre-trained model"),
    "agft": ("robust", "AGFT: the original's softened answer as the target"),
    "hpt_gpd": ("robust", "HPT-GPD: distil a proxy of another architecture"),
    "hierarchical": ("robust", "the hierarchical method: every level of class trees, hyperbolic head"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    added = parser.add_subparsers(dest="command", required=True)
    build = added.add_parser("build-data", help="build a data set from its packages")
    build.add_argument("data", choices=["demo"])
    build.add_argument("--out", type=Path, default=Path("data/demo"))
    build.add_argument("--size", type=int, default=96, help="side of the stored pictures in pixels")
    for name, (kind, purpose) in TRAINING.items():
        train = added.add_parser(name, help=f"{purpose}; resumes by itself")
        train.add_argument("--config", required=True, help=f"a name in training/configs/{kind}, or a .toml file")
        # torchrun would read --run as an option of its own.
        train.add_argument("--run", "--folder", type=Path, default=None, help="run folder (default runs/NAME)")
        train.add_argument(
            "overrides", nargs="*", metavar="key=value", help="fields of the config, nested ones by dots"
        )
    export = added.add_parser("export", help="an unfinished run's artifact, or an encoder in another form")
    what = export.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, help="a pre-training run: its artifact as far as it has got")
    what.add_argument("--encoder", help="an encoder spec, for --to")
    export.add_argument("--to", choices=["transformers"], default="transformers", help="a CLIPModel folder")
    export.add_argument("--out", type=Path, required=True)
    score = added.add_parser("evaluate", help="score an encoder on the demo data set's vendors")
    score.add_argument("--encoder", required=True, help="an encoder spec: demo, a folder, ...")
    score.add_argument("--data", type=Path, default=Path("data/demo"))
    score.add_argument("--vendors", nargs="*", default=[], help="default: the test vendors")
    score.add_argument("--json", type=Path, default=None, help="write the scores here")
    score.add_argument("--into-artifact", action="store_true", help="write the scores into the folder's ironclip.json")
    score.add_argument("--attack", nargs="*", default=[], help="attack the encoder instead: names of ironclip.attacks")
    score.add_argument("--eps", nargs="*", type=float, default=[1, 2, 4], help="L-inf radii in 1/255 (default 1 2 4)")
    score.add_argument("--count", type=int, default=500, help="pictures of each vendor that are attacked")
    _served(score)
    score.add_argument("--level", default="", help="level of the tree that is attacked and scored")
    score.add_argument("--mode", choices=["rollup", "prompts"], default="rollup", help="how upper levels are scored")
    score.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the attacks")
    score.add_argument("--suite", default="", help="the papers' sets instead: a name in training/configs/suites")
    score.add_argument("--root", type=Path, default=Path("data"), help="folder of the suite's sets")
    score.add_argument("--results", type=Path, default=Path("runs/robustness"), help="folder of the attacks' results")
    crossed = added.add_parser("transfer", help="examples made on each encoder, answered by each")
    crossed.add_argument("--encoders", nargs="+", required=True, help="encoder specs")
    _attacked(crossed)
    levels = added.add_parser("levels", help="each level of the tree attacked, each scored")
    levels.add_argument("--encoder", required=True)
    levels.add_argument("--mode", choices=["rollup", "prompts"], default="prompts", help="how upper levels are scored")
    _attacked(levels)
    finding = added.add_parser("retrieval", help="image-text recall under attacks on the embedding")
    finding.add_argument("--encoder", required=True)
    finding.add_argument(
        "--goal", choices=["away", "caption", "towards"], default="away", help="see training.retrieval"
    )
    finding.add_argument("--pairs", type=Path, help="a folder of pictures with captions.json, in place of --vendor")
    _attacked(finding)
    finding.set_defaults(attack="apgd")
    whole = added.add_parser("study", help="tune, train and measure all methods alike, in resumable parts")
    whole.add_argument("--config", required=True, help="a name in training/configs/study, or a .toml file")
    whole.add_argument(
        "--part",
        nargs="*",
        choices=["tune", "train", "evaluate", "compare", "report", "ship"],
        default=[],
        help="default: all in this order but ship, which copies the best encoder into the package",
    )
    whole.add_argument("--only", nargs="*", default=[], metavar="METHOD", help="these methods (default: the study's)")
    whole.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the trainings")
    whole.add_argument("--results", type=Path, default=Path("docs/robustness"), help="folder of what was found")
    whole.add_argument("--shipped", type=Path, default=Path("ironclip/demo/robust"), help="where ship puts the best")
    _device(whole, "where encoders are measured: auto (a GPU where there is one), cpu, cuda:N; training takes a GPU")
    ladder = added.add_parser("defences", help="defences at decision time, under attacks that do and do not see them")
    ladder.add_argument("--config", required=True, help="a name in training/configs/defences, or a .toml file")
    ladder.add_argument("--encoders", nargs="*", default=[], help="only these of the config's")
    ladder.add_argument("--rows", nargs="*", default=[], help="only these defences of the config's")
    ladder.add_argument("--rungs", nargs="*", default=[], help="only these rungs")
    ladder.add_argument("--results", type=Path, default=Path("docs/defences/cells"), help="folder of the cells")
    ladder.add_argument("--made", type=Path, default=Path("runs/defences"), help="folder of adversarial examples")
    ladder.add_argument(
        "--report", action="store_true", help="measure nothing; write README.md and plots beside the results' folder"
    )
    _device(ladder)
    domain = added.add_parser("domain", help="measure and store the domain threshold of an artifact")
    domain.add_argument("--artifact", type=Path, required=True)
    domain.add_argument("--data", type=Path, default=Path("data/demo"))
    domain.add_argument("--photos", type=Path, required=True, help="a folder of photographs, searched in depth")
    golden = added.add_parser("golden", help="put golden features into an artifact that was saved without")
    golden.add_argument("artifact", type=Path, help="its folder")

    demo = added.add_parser("demo", help="write label sets, tree and sample pictures of the demo")
    demo.add_argument("--data", type=Path, default=Path("data/demo"))
    demo.add_argument("--out", type=Path, default=Path("ironclip/demo"))
    trees = added.add_parser("trees", help="write the demo's further label trees: WordNet's, and one by clustering")
    trees.add_argument("--encoder", default="demo", help="whose text features are clustered")
    trees.add_argument("--data", type=Path, default=Path("data/demo"))
    trees.add_argument("--out", type=Path, default=Path("ironclip/demo/trees"))
    figure = added.add_parser("figure", help="draw the README's picture of test-vendor predictions")
    figure.add_argument("--encoder", default="demo")
    figure.add_argument("--data", type=Path, default=Path("data/demo"))
    figure.add_argument("--out", type=Path, default=Path("docs/predictions.png"))
    return parser


def _attacked(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("data/demo"))
    parser.add_argument("--vendor", default="emojione", help="whose pictures (default emojione)")
    parser.add_argument("--attack", default="apgd-ce", help="a name of ironclip.attacks (default apgd-ce)")
    parser.add_argument("--eps", type=float, default=2.0, help="L-inf radius in 1/255 (default 2)")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the attack")
    parser.add_argument("--results", type=Path, default=Path("runs/robustness"), help="folder of examples and results")
    _served(parser)


def _served(parser: argparse.ArgumentParser) -> None:
    _device(parser)
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="what the attacked encoder computes in, as the service would (default float32)",
    )
    parser.add_argument(
        "--head",
        choices=["native", "cosine"],
        default="native",
        help="decide by the encoder's own head, or by cosines whatever it has (default native)",
    )


def _device(
    parser: argparse.ArgumentParser, purpose: str = "auto (a GPU where there is one), cpu, cuda or cuda:N"
) -> None:
    parser.add_argument("--device", default="auto", help=purpose)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "build-data": commands.build,
    "pretrain": commands.pretrain,
    **{name: commands.robust for name, (kind, _) in TRAINING.items() if kind == "robust"},
    "export": commands.export,
    "evaluate": commands.evaluate,
    "transfer": commands.transfer,
    "levels": commands.levels,
    "retrieval": commands.retrieval,
    "study": commands.study,
    "defences": commands.defences,
    "domain": commands.domain,
    "golden": commands.golden,
    "demo": commands.demo,
    "trees": commands.trees,
    "figure": commands.figure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors raised on purpose are printed in one line and give exit status 1."""
    arguments = _parser().parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except IronclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
