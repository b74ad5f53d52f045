"""What each dtype costs on this CPU, and how far it drifts: `python -m benchmarks.dtypes`.

An image tower's forward, and its gradient with respect to the picture, in every form that a service can pin. All forms
are timed in turns in one run, and the best round of each counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.cola import timed
from ironclip.encoder import Encoder
from ironclip.loading import DEMO_FOLDER, load_encoder
from ironclip.preprocessing import load_image, to_float
from training.jsonfile import write_json
from training.provenance import made_on

FORMS = ("float32", "bfloat16", "bfloat16 by PyTorch", "int8")


def forms(encoder: Encoder) -> dict[str, Encoder]:
    """The encoder in each of FORMS; by PyTorch alone means without `ironclip.upcast`."""
    made = {name: encoder.served(getattr(torch, name)) for name in FORMS if " " not in name}
    return {**made, FORMS[2]: encoder.astype(torch.bfloat16).requires_grad_(False)}


def measure(spec: str, batches: list[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of a batch by form, and each form's least cosine with float32's features."""
    encoder = load_encoder(spec, device="cpu")
    made = forms(encoder)
    files = sorted((DEMO_FOLDER / "samples").glob("*.[jp][pn]g"))
    pictures = to_float(torch.stack([encoder.preprocessing(load_image(file))[0] for file in files]))
    with torch.inference_mode():
        features = {name: one.encode_image(pictures) for name, one in made.items()}
    result: dict[str, Any] = {
        "encoder": spec,
        "arithmetic": {name: str(one.arithmetic).removeprefix("torch.") for name, one in made.items()},
        "pictures": len(files),
        "min_cosine": {
            name: round(float(cosine_similarity(found, features["float32"]).min()), 6)
            for name, found in features.items()
        },
        "batches": [],
    }
    for size in batches:
        batch = pictures.repeat(-(-size // len(pictures)), 1, 1, 1)[:size]
        parts: dict[str, Callable[[], object]] = {}
        for name, one in made.items():
            parts[f"forward {name}"] = partial(_forward, one, batch)
            parts[f"gradient {name}"] = partial(_gradient, one, batch)
        seconds = timed(parts, rounds, batch.device)
        milliseconds = {
            what: {name: round(1000 * seconds[f"{what} {name}"], 3) for name in made}
            for what in ("forward", "gradient")
        }
        result["batches"].append({"batch": size, "ms": milliseconds})
    return result


@torch.inference_mode()
def _forward(encoder: Encoder, pictures: Tensor) -> Tensor:
    return encoder.encode_image(pictures)


def _gradient(encoder: Encoder, pictures: Tensor) -> Tensor:
    images = pictures.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder.encode_image(images).sum(), images)
    return gradient


def main() -> None:
    """Measure, print, and keep as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dtypes", description=__doc__)
    parser.add_argument("--encoders", nargs="*", default=["random:ViT-B-32", "demo-vit", "demo-robust"])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dtypes.json"))
    arguments = parser.parse_args()
    found = []
    for spec in arguments.encoders:
        found.append(measure(spec, arguments.batches, arguments.rounds))
        print(f"{spec}, milliseconds a batch:")
        for one in found[-1]["batches"]:
            for what, times in one["ms"].items():
                said = ", ".join(
                    f"{name} {value:.1f} ({times['float32'] / value:.2f}x)" for name, value in times.items()
                )
                print(f"  {what:8} of {one['batch']:3}: {said}")
        print(f"  least cosine with float32: {found[-1]['min_cosine']}")
    capability = torch.backends.cpu.get_cpu_capability()
    write_json(arguments.out, {**made_on(torch.device("cpu")), "cpu": capability, "encoders": found})
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
