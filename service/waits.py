"""For how long what was asked of a tower waited in its queue, told to whoever times the whole."""

from __future__ import annotations

from contextvars import ContextVar


class Wait:
    """The longest wait within one block of a request; None before there was any."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds: float | None = None


# Of the block that is timed; None where nobody asks.
CURRENT: ContextVar[Wait | None] = ContextVar("wait", default=None)


def note(seconds: float) -> None:
    """Tell the block that is timed, if one is, of a wait that is over."""
    wait = CURRENT.get()
    if wait is not None:
        wait.seconds = max(wait.seconds or 0.0, seconds)
