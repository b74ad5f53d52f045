"""What a Classifier asks of a defence, and what a defence is told of the encoder that it stands in front of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol

from torch import Tensor

from ironclip.errors import OptionError, shown
from ironclip.textbank import TextBank

# Pixels [n, 3, R, R] in [0, 1] -> features [n, dim], not normalised; differentiable.
Encode = Callable[[Tensor], Tensor]


class HeadRule(Protocol):
    """The encoder's native rule: features [..., dim] and a bank -> logits [..., K]."""

    @property
    def scale(self) -> Tensor:
        """What a cosine head multiplies cosines with (100 for OpenAI's CLIP), a scalar."""

    def __call__(self, features: Tensor, bank: TextBank) -> Tensor:
        """Logits of the labels."""


class Defence(Hashable, Protocol):
    """One defence with its options; immutable. All that it decides follows from pixels, bank and options."""

    @property
    def name(self) -> str:
        """Its key in DEFENCES."""

    @property
    def random(self) -> bool:
        """It draws: with another `seed` it may decide otherwise. An honest attacker averages over seeds."""

    @property
    def differentiable(self) -> bool:
        """Gradients that reach the pixels are exact. If not, they are a backward pass differentiable approximation
        (BPDA, Athalye et al. 2018) that the defence brings along."""

    @property
    def optimising(self) -> bool:
        """It takes gradients of its own to decide, so it cannot run in inference mode."""

    @property
    def reads_descriptions(self) -> bool:
        """It compares with more than the labels' prompts, so its text banks hold the descriptions too."""

    @property
    def reads_labels(self) -> bool:
        """Its vector of a picture depends on the labels, so there is none without a label set."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Types of head that it serves."""

    @property
    def view_count(self) -> int:
        """Views whose features it decides from."""

    @property
    def cost(self) -> int:
        """Work for one picture in forwards of the image tower (a backward counts two): what it is charged for."""

    def comparisons(self, labels: int, longest: int) -> int:
        """Work of deciding one picture beside the forwards, in products of a view with a text (about a nanosecond each
        on one core), against so many labels with at most so many texts each; 0 where it is not worth counting."""

    def options(self) -> dict[str, Any]:
        """All options with their values, for answers and cache keys."""

    def reseeded(self, seed: int) -> Defence:
        """The same with other draws, whose `prepare` comes to the same; itself where it draws nothing."""

    def preparation(self) -> Defence:
        """The same with every option at its default that `prepare` does not look at: two whose preparations are alike
        share their state."""

    def prepare(self, bank: TextBank) -> Any:
        """State that depends on the text bank and `preparation` alone; made once per bank; what takes memory tells its
        tensors by `tensors()`. Raises OptionError if the two do not fit."""

    def make_views(self, pixels: Tensor, encode: Encode) -> Tensor:
        """[N, 3, R, R] in [0,1] -> [N, view_count, 3, R, R]; ``encode`` is for defences that look before they leap."""

    def logits(self, features: Tensor, bank: TextBank, state: Any, head: HeadRule) -> Tensor:
        """Features of the views [N, view_count, dim], not normalised -> logits [N, K]."""

    def vector(self, features: Tensor, bank: TextBank | None, state: Any, head: HeadRule) -> Tensor:
        """Features of the views -> one unit vector a picture, [N, dim]; ``bank`` may be None unless `reads_labels`."""


def check_number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Raise OptionError unless an option is a number (a whole one) in [low, high]."""
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # NaN is in no range; and an integer may have more digits than a float, or than can be printed.
    if not number or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise OptionError(
            f"{name} is {kind} in {low:g} to {high:g}, not {shown(value)}.", pointer=f"/defence/{name}", limit=high
        )


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise OptionError unless an option is one of ``choices``."""
    if value not in choices:
        raise OptionError(
            f"{name} is one of {', '.join(choices)}, not {str(value)[:40]!r}.", pointer=f"/defence/{name}"
        )
