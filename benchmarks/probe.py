"""A probe against torchattacks' implementation of the same attack: `python -m benchmarks.probe`.

Both look for the smallest radius that breaks the decision about each sample of the demo, by APGD-CE of 100 steps (Croce
and Hein 2020) from 1/255 to 32/255, judged by the picture rounded to 8 bits: torchattacks by bisection, the probe as it
always does. They take turns picture by picture. The aim: smallest radii at most 2 % larger on average, in less time.
torchattacks is not among the project's packages: `pip install --no-deps torchattacks`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ironclip.attacks import ThreatModel
from ironclip.attacks.eight_bit import in_8_bits
from ironclip.classifier import Classifier
from ironclip.labels import LabelSet
from ironclip.loading import DEMO_FOLDER, load_encoder
from ironclip.preprocessing import load_image, to_float
from ironclip.probe import ProbeOptions, probe
from training.jsonfile import write_json
from training.provenance import made_on

MOST, STEPS = 32, 100


def _theirs() -> Any:
    try:
        return importlib.import_module("torchattacks")
    except ModuleNotFoundError:
        raise SystemExit("torchattacks is not there: pip install --no-deps torchattacks") from None


def bisected(classifier: Classifier, image: Tensor, label: int) -> tuple[int, int]:
    """The smallest radius at which torchattacks' APGD-CE breaks a uint8 picture (MOST + 1: none), and its attacks."""
    low, high, attacks = 0, MOST + 1, 0
    while high - low > 1:
        middle = (low + high) // 2
        attack = _theirs().APGD(classifier, eps=middle / 255, steps=STEPS, loss="ce", seed=0)
        found = attack(to_float(image[None]).to(classifier.encoder.device), torch.tensor([label]))
        picture = in_8_bits(found, image[None], ThreatModel("linf", middle / 255))[0]
        broken = _answer(classifier, picture) != label
        low, high = (low, middle) if broken else (middle, high)
        attacks += 1
    return high, attacks


@torch.no_grad()
def _answer(classifier: Classifier, picture: Tensor) -> int:
    return int(classifier(to_float(picture[None]).to(classifier.encoder.device)).argmax())


def measure(spec: str) -> dict[str, Any]:
    """Smallest radii and seconds of both, a sample a row."""
    paths = sorted(path for path in (DEMO_FOLDER / "samples").iterdir() if path.suffix != ".md")
    names = [path.stem.replace("-", " ") for path in paths]
    encoder = load_encoder(spec).served()
    classifier = Classifier(encoder, LabelSet.parse(names))
    options = ProbeOptions(attack="apgd-ce", max_eps=MOST, seconds=3600)
    rows = []
    for path, name in zip(paths, names, strict=True):
        image, _ = encoder.preprocessing(load_image(path))
        label = _answer(classifier, image)
        began = time.perf_counter()
        found = probe(classifier, image, options)
        middle = time.perf_counter()
        theirs, attacks = bisected(classifier, image, label)
        ended = time.perf_counter()
        ours = found["broken_at"] or MOST + 1
        row = {"sample": name, "ours": ours, "torchattacks": theirs, "gradients": found["cost"]["gradients"]}
        row |= {"their_gradients": attacks * (STEPS + 1)}
        row |= {"seconds": round(middle - began, 2), "their_seconds": round(ended - middle, 2)}
        print(f"{spec}: {json.dumps(row)}", flush=True)
        rows.append(row)
    return {
        "encoder": spec,
        "mean_radius": round(fmean(row["ours"] for row in rows), 3),
        "their_mean_radius": round(fmean(row["torchattacks"] for row in rows), 3),
        "time_share": round(sum(row["seconds"] for row in rows) / sum(row["their_seconds"] for row in rows), 3),
        "rows": rows,
    }


def main() -> None:
    """Measure; print, and keep as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--encoders", nargs="+", default=["demo", "demo-robust"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/probe.json"))
    arguments = parser.parse_args()
    found = [measure(spec) for spec in arguments.encoders]
    for one in found:
        print(
            f"{one['encoder']}: smallest radius {one['mean_radius']} / 255 on average, torchattacks "
            f"{one['their_mean_radius']} / 255, in {100 * one['time_share']:.0f} % of its time"
        )
    result = {
        "attack": f"APGD-CE, {STEPS} steps, radii 1 to {MOST}",
        **made_on(torch.device("cpu")),
        "torchattacks": _theirs().__version__,
        "encoders": found,
    }
    write_json(arguments.out, result)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
