"""Success rates against an independent implementation, on the demo encoder (torchattacks; skipped where absent)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ironclip
from ironclip.attacks import ThreatModel, WhiteBox, classification, drive, make_attack
from ironclip.classifier import Classifier
from ironclip.labels import LabelSet
from ironclip.loading import load_encoder
from ironclip.preprocessing import load_image, to_float

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed: make setup installs it")
pytestmark = pytest.mark.slow
SAMPLES = sorted((Path(ironclip.__file__).parent / "demo" / "samples").glob("*.[jpw]*"))
LABELS = [path.stem.replace("-", " ") for path in SAMPLES]


@pytest.fixture(scope="module")
def problem() -> tuple[Classifier, Tensor, Tensor]:
    """48 views of the sample pictures, and what the undisturbed demo says of them."""
    encoder = load_encoder("demo")
    classifier = Classifier(encoder, LabelSet.parse([*LABELS, "house", "tree", "shoe", "clock"])).eval()
    pictures = to_float(torch.stack([encoder.preprocessing(load_image(path))[0] for path in SAMPLES]))
    views = torch.cat([pictures.roll((dy, dx), (2, 3)) for dy in (-4, 4) for dx in (-3, 3)])
    with torch.no_grad():
        return classifier, views, classifier(views).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("name", "options", "theirs", "arguments"),
    [
        ("pgd", {"iterations": 10}, ("PGD", "PGDL2"), {"steps": 10}),
        ("apgd-ce", {"iterations": 20}, ("APGD", "APGD"), {"steps": 20, "loss": "ce"}),
        ("apgd-dlr", {"iterations": 20}, ("APGD", "APGD"), {"steps": 20, "loss": "dlr"}),
        ("apgd-t", {"iterations": 10}, ("APGDT", "APGDT"), {"steps": 10, "n_classes": 16}),
        ("square", {"queries": 300}, ("Square", "Square"), {"n_queries": 300}),
    ],
)
def test_it_fools_as_many(
    problem: tuple[Classifier, Tensor, Tensor],
    norm: Any,
    name: str,
    options: dict[str, Any],
    theirs: tuple[str, str],
    arguments: dict[str, Any],
) -> None:
    classifier, images, labels = problem
    # Without gradients a few hundred queries reach nothing at the others' radii.
    linf, l2 = (12 / 255, 3.0) if name == "square" else (1.5 / 255, 0.35)
    threat = ThreatModel(norm, linf if norm == "linf" else l2)
    ours = drive(make_attack(name, options), one := classification(images, labels, threat), WhiteBox(classifier, one))
    if name == "pgd":
        step = min(2.5 * threat.eps / 10, threat.eps)
        other = getattr(torchattacks, theirs[norm == "l2"])(classifier, eps=threat.eps, alpha=step, **arguments)
    else:
        kind = "Linf" if norm == "linf" else "L2"
        other = getattr(torchattacks, theirs[0])(classifier, norm=kind, eps=threat.eps, seed=0, **arguments)
    adversarial = other(images, labels)
    with torch.no_grad():
        said = classifier(adversarial).argmax(1)
    reference = (said != labels).float().mean().item()
    found = ours.fooled.float().mean().item()
    assert 0.05 < reference < 0.99, "choose an eps at which the comparison says something"
    assert found > reference - 0.08
