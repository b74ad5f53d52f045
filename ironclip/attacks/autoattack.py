"""AutoAttack (Croce and Hein 2020): attacks of different kinds, one after the other, on what the last left standing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ironclip.attacks.apgd import APGD, APGDT
from ironclip.attacks.contract import Answer, Attack, Problem, Query, Steps
from ironclip.attacks.fab import FAB
from ironclip.attacks.square import Square
from ironclip.errors import OptionError

Version = Literal["standard", "ensemble", "rest", "rand"]


@dataclass(frozen=True)
class AutoAttack:
    """The composition; parameter-free but for its size.

    Attributes:
        version: ``standard``: APGD-CE, APGD-T, FAB-T, Square. ``ensemble``: APGD-CE and APGD-T, as the CLIP robustness
            papers report. ``rest``: FAB-T and Square, what standard has beside them; on what the ensemble left standing
            it comes to the same as standard. ``rand``, for random models: APGD-CE and APGD-DLR, whose gradients the
            oracle averages.
        iterations: of each gradient attack.
        queries: of Square.
        classes: targets of APGD-T and FAB-T.
        seed: of all of them.
    """

    version: Version = "standard"
    iterations: int = 100
    queries: int = 5000
    classes: int = 9
    seed: int = 0
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.version not in ("standard", "ensemble", "rest", "rand"):
            raise OptionError(f"version is standard, ensemble, rest or rand, not {str(self.version)[:40]!r}.")

    @property
    def name(self) -> str:
        """``autoattack`` for the standard version."""
        return "autoattack" if self.version == "standard" else f"autoattack-{self.version}"

    @property
    def parts(self) -> tuple[Attack, ...]:
        """The attacks in their order."""
        ce = APGD("ce", self.iterations, seed=self.seed)
        if self.version == "rand":
            return (ce, APGD("dlr", self.iterations, seed=self.seed))
        targeted = APGDT(self.classes, self.iterations, seed=self.seed)
        if self.version == "ensemble":
            return (ce, targeted)
        rest = (FAB(self.classes, self.iterations, seed=self.seed), Square(self.queries, seed=self.seed))
        return rest if self.version == "rest" else (ce, targeted, *rest)

    def steps(self, problem: Problem) -> Steps:
        """See `Attack`."""
        images, fooled = problem.images.clone(), problem.done
        step = 0
        for part in self.parts:
            going = part.steps(replace(problem, active=~fooled))
            answer: Answer | None = None
            while True:
                try:
                    query: Query = next(going) if answer is None else going.send(answer)
                except StopIteration as stop:
                    left = ~fooled
                    images[left] = stop.value[left]
                    break
                answer = yield replace(query, step=step, part=part.name)
                step += 1
                inside = problem.threat.contains(problem.images[query.items], query.pixels)
                new = answer.fooled & inside & ~fooled[query.items]
                images[query.items[new]] = query.pixels[new]
                fooled[query.items[new]] = True
        return images
