"""`python -m service probe`: one probe from the shell, without a server."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ironclip.dtypes import DTYPES
from ironclip.errors import ImageInvalid, IronclipError, OptionError

_BAR = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("image", type=Path, help="a JPEG, PNG or WebP file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", nargs="+", metavar="LABEL", help="the labels to choose from")
    what.add_argument("--label-set", help="a label set that ships with Ironclip, or a JSON file of one")
    what.add_argument("--embedding", action="store_true", help="attack the vector instead of a decision")
    parser.add_argument("--templates", nargs="+", help="prompt templates with {} for the name")
    parser.add_argument("--encoder", default="demo", help="an encoder spec: demo, a folder, ViT-B-32/openai, ...")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="what is served")
    parser.add_argument("--defence", default="none", help='a name, or JSON such as {"name": "cola", "views": 3}')
    parser.add_argument("--tree", type=Path, help="a label tree, as JSON or lines of `child parent`")
    parser.add_argument("--level", default="", help="the level of the tree that is attacked")
    parser.add_argument("--levels", choices=["rollup", "prompts"], default="rollup", help="how a level is scored")
    parser.add_argument("--label", help="the true label (default: what the picture is answered with)")
    parser.add_argument("--target", help="a label that must be reached")
    parser.add_argument("--cosine-below", type=float, default=0.5, help="with --embedding: when it counts as broken")
    parser.add_argument("--norm", choices=["linf", "l2"], default="linf")
    parser.add_argument("--eps", nargs="*", type=float, default=[], help="radii (linf: 1/255); default: search")
    parser.add_argument("--max-eps", type=float, default=0.0, help="upper end of the search")
    parser.add_argument("--effort", choices=["quick", "standard", "thorough"], default="quick")
    parser.add_argument("--attack", default="", help="in place of the effort's, as --defence: a name, or with options")
    parser.add_argument("--seconds", type=float, default=60.0, help="wall clock at most (default 60)")
    parser.add_argument("--draws", choices=["fixed", "fresh"], default="fixed", help="of a defence that draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.add_argument("--out", type=Path, help="write adversarial.png and perturbation.png into this folder")


def run(arguments: argparse.Namespace) -> int:
    """Run the probe and print what it found; returns the exit status: 1 for a fault of the input."""
    try:
        found = _probed(arguments)
    except (IronclipError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    pictures = found.pop("artefacts", {})
    if arguments.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print(in_words(found))
    if arguments.out is not None:
        _write(arguments.out, pictures)
    return 0


def _probed(arguments: argparse.Namespace) -> dict[str, Any]:
    # Torch takes seconds to import: not for --help.
    import torch

    from ironclip.classifier import Classifier
    from ironclip.loading import load_encoder
    from ironclip.preprocessing import load_image
    from ironclip.probe import ProbeOptions, Target, VectorTarget, probe
    from service.plans import parse_defence

    options = ProbeOptions(
        norm=arguments.norm,
        eps=tuple(arguments.eps),
        max_eps=arguments.max_eps,
        effort=arguments.effort,
        attack=_object(arguments.attack, "--attack"),
        seconds=arguments.seconds,
        draws=arguments.draws,
        seed=arguments.seed,
    )
    defence = parse_defence(_object(arguments.defence, "--defence"))
    label_set, tree = _labels(arguments)
    try:
        image = load_image(arguments.image)
    except FileNotFoundError:
        raise ImageInvalid(f"There is no file {str(arguments.image)!r}.") from None
    encoder = load_encoder(arguments.encoder, device=arguments.device)
    pixels, warned = encoder.preprocessing(image)
    serving = encoder.served(getattr(torch, arguments.dtype))
    served = Classifier(serving, label_set, tree=tree, levels=arguments.levels, defence=defence)
    attacked = served if serving.dtype == torch.float32 else served.over(encoder.served(torch.float32))
    target: Target = Target(attacked, served, level=arguments.level)
    if arguments.embedding:
        target = VectorTarget(attacked, served, cosine_below=arguments.cosine_below)
    progress = None if arguments.json or not sys.stderr.isatty() else _show
    found = probe(target, pixels, options, label=arguments.label, target_label=arguments.target, progress=progress)
    if progress is not None:
        print("\r" + 60 * " " + "\r", end="", file=sys.stderr)
    found["preprocessing"] = {"warnings": warned}
    return found


def _labels(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from ironclip.hierarchy import LabelTree
    from ironclip.labels import LabelSet
    from ironclip.loading import DEMO_FOLDER

    tree = None
    if arguments.tree is not None:
        text = arguments.tree.read_text(encoding="utf-8")
        tree = LabelTree.parse(_object(text, "--tree"))
    if arguments.embedding:
        return LabelSet.parse(["picture"]), None
    if arguments.labels is not None:
        return LabelSet.parse(arguments.labels, arguments.templates), tree
    path = DEMO_FOLDER / "label_sets" / f"{arguments.label_set}.json"
    if not path.is_file():
        path = Path(arguments.label_set)
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in (DEMO_FOLDER / "label_sets").glob("*.json")))
        raise OptionError(f"There is no label set {arguments.label_set!r}; there are: {known}, or a JSON file's path.")
    content = _object(path.read_text(encoding="utf-8"), "--label-set")
    if not isinstance(content, dict):
        raise OptionError(f'{path} holds no label set: {{"labels": [...], "templates"?: [...]}}.')
    return LabelSet.parse(content.get("labels"), arguments.templates or content.get("templates")), tree


def _object(text: str, name: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f"{name} is no JSON: {error}.") from None


def _show(one: Any) -> None:
    broken = "-" if one.broken_at is None else f"{one.broken_at:g}"
    print(f"\r{one.gradients} gradients, robust to {one.robust_to:g}, broken at {broken}   ", end="", file=sys.stderr)


def in_words(found: dict[str, Any]) -> str:
    """What a probe found, for a terminal."""
    lines = []
    clean = found["clean"]
    if clean:
        lines.append(f"as it is: {clean['label']} ({clean['score']:.3f})")
        if not clean["correct"]:
            lines.append(f"which is not what was asked about: {found['label']}")
    column = "score of the label" if clean else "cosine"
    if found["points"]:
        lines.append(f"{'eps':>7}  {'':7} {column}")
    for point in found["points"]:
        value = point.get("score_of_label", point.get("cosine"))
        state = {True: "broken", False: "held", None: "?"}[point["broken"]]
        bar = "#" * round(_BAR * max(0.0, min(1.0, value or 0.0)))
        said = f" {point['label']} {point['score']:.3f}" if "label" in point else ""
        shown = "      " if value is None else f"{value:.3f}"
        lines.append(f"{point['eps']:7g}  {state:7} {shown} {bar:{_BAR}}{said}")
    unit, broken = found["unit"], found["broken_at"]
    end = "nothing broke it" if broken is None else f"broken at {broken:g}"
    lines.append(f"robust to {found['robust_to']:g}, {end} ({found['norm']}, in {unit} at {found['resolution']} px)")
    cost = found["cost"]
    lines.append(f"{cost['gradients']} gradients in {cost['seconds']:.1f} s by {found['attack']['name']}")
    lines += [f"note: {warning['detail']}" for warning in found["warnings"]]
    lines.append(found["statement"])
    return "\n".join(lines)


def _write(folder: Path, pictures: dict[str, Any]) -> None:
    from ironclip.probe import png

    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(png(picture))
        print(folder / f"{name}.png")
    if not pictures:
        print("nothing broke it: there is no picture to write", file=sys.stderr)
