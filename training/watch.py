"""What is looked at while a run goes: speed beside the floor, clean and robust accuracy of the Classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ironclip.attacks import PGD
from ironclip.classifier import Classifier
from training.robustness import attack_batch
from training.sources import Source
from training.throughput import Floor

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from training.recipe import RobustConfig


class Watch:
    """Measures a run on a fixed sample, shared among the ranks.

    Args:
        source: where the sample comes from, see `Source.probe`.
        config: of the run.
        fabric: the processes.
    """

    def __init__(self, source: Source, config: RobustConfig, fabric: Fabric) -> None:
        self._config, self._fabric = config, fabric
        pixels, labels = source.probe(max(1, config.evaluate_count), config.seed)
        mine = torch.arange(len(labels))[fabric.global_rank :: fabric.world_size]
        self._pixels, self._labels, self._keys = pixels[mine], labels[mine], mine
        self._seconds: list[float] = []

    def took(self, seconds: float) -> None:
        """Note the length of a step."""
        self._seconds.append(seconds)

    def speed(self, floor: Floor) -> dict[str, float]:
        """Mean over the steps since the last call: pictures a second over all ranks, and the floor's share of a step.

        The floor was timed once at the start; on a machine whose speed changes its share means little.
        """
        mean = sum(self._seconds) / max(1, len(self._seconds))
        self._seconds = []
        return {"images_per_second": self._config.batch_size / mean, "of_floor": floor.step / mean}

    def scores(self, classifier: Classifier, batch_size: int = 128) -> dict[str, float]:
        """Percent of the sample that ``classifier`` has right as it is, and under PGD at the training radius."""
        config, device = self._config, self._fabric.device
        attack = PGD(iterations=max(1, config.evaluate_iterations), seed=config.seed)
        counts = torch.zeros(3, dtype=torch.float64, device=device)
        classifier.eval()
        for start in range(0, len(self._labels), batch_size):
            rows = slice(start, start + batch_size)
            images, labels = self._pixels[rows].to(device), self._labels[rows].to(device)
            right, fooled, _ = attack_batch(
                classifier, images, labels, attack, config.attack.threat, keys=self._keys[rows].to(device)
            )
            counts += torch.tensor([right.sum(), right.sum() - fooled.sum(), len(labels)]).to(counts)
        if self._fabric.world_size > 1:
            counts = torch.as_tensor(self._fabric.all_reduce(counts, reduce_op="sum"))
        right_count, held, count = counts.tolist()
        return {"clean": 100 * right_count / max(1.0, count), "robust": 100 * held / max(1.0, count)}
