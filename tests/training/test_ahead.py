"""Batches prepared ahead come in order, and neither an error nor an early end leaves a thread behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from ironclip.errors import OptionError
from training.ahead import one_ahead


def _numbers(count: int, drawn: list[int], fails: bool = False) -> Iterator[int]:
    for number in range(count):
        drawn.append(number)
        yield number
    if fails:
        raise OptionError("no more")


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "one-ahead"]


def test_in_order_and_no_further_than_two_ahead() -> None:
    drawn: list[int] = []
    for number in one_ahead(_numbers(50, drawn)):
        assert len(drawn) <= number + 3
        assert drawn[number] == number
    assert drawn == list(range(50))
    assert not _threads()


def test_an_error_comes_after_what_was_before_it() -> None:
    items = one_ahead(_numbers(5, [], fails=True))
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(OptionError, match="no more"):
        next(items)
    assert not _threads()


def test_an_early_end_stops_the_thread() -> None:
    drawn: list[int] = []
    for number in one_ahead(_numbers(1000, drawn)):
        if number == 3:
            break
    gc.collect()
    assert not _threads()
    assert len(drawn) < 10
