"""Many pictures through few requests at a time: outcomes in order, memory bounded by what is under way."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from ironclip_client.errors import ImageError, IronclipError, TooLarge, UnexpectedAnswer, UsageError
from ironclip_client.images import Encoded, ImageSource, read_image

T = TypeVar("T")
R = TypeVar("R")
# Of the pictures in one request: half of what a service takes in a body, if it is not set otherwise.
_MOST_BYTES = 32 * 1024 * 1024
_LARGE = 64 * 1024  # a smaller picture is hardly what makes a request too large


def checked(value: int, name: str) -> int:
    """A number of things; raises UsageError below 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is a whole number of at least 1, not {value!r}.")
    return value


def parts(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """The values in lists of this size, the last one shorter, read as they are asked for."""
    rest = iter(values)
    return iter(lambda: list(itertools.islice(rest, size)), [])


def readable(images: Iterable[ImageSource]) -> tuple[list[Encoded], list[ImageError | None]]:
    """The pictures that can be read, and for each picture its error, or None for one that can."""
    good: list[Encoded] = []
    outcomes: list[ImageError | None] = []
    for image in images:
        try:
            good.append(read_image(image))
            outcomes.append(None)
        except (OSError, UsageError) as error:
            outcome = ImageError(f"The picture cannot be read: {error}")
            outcome.__cause__ = error
            outcomes.append(outcome)
    return good, outcomes


class Shares(Generic[R]):
    """Pictures in requests that are not too large: cut by their bytes, and in halves where that is not enough.

    Ask with what `next` gives, until it gives nothing, and say by `answered` or `refused` what came of it.

    Args:
        pictures: all of them.

    Attributes:
        found: the answers so far, in the order of the pictures.
    """

    def __init__(self, pictures: list[Encoded]) -> None:
        self.found: list[R | IronclipError] = []
        cut: list[list[Encoded]] = []
        size = 0
        for picture in pictures:
            if not cut or size + len(picture.data) > _MOST_BYTES:
                cut.append([])
                size = 0
            cut[-1].append(picture)
            size += len(picture.data)
        self._left = cut[::-1]
        self._asked: list[Encoded] = []

    def next(self) -> list[Encoded]:
        """The pictures of the next request; none when all are answered."""
        self._asked = self._left.pop() if self._left else []
        return self._asked

    def answered(self, answers: Iterable[R | IronclipError]) -> None:
        """The answers to the last request; raises UnexpectedAnswer if they are more or fewer than its pictures."""
        found = list(answers)
        if len(found) != len(self._asked):
            raise UnexpectedAnswer(f"{len(self._asked)} pictures were sent, and {len(found)} answers came.")
        self.found += found

    def refused(self, error: TooLarge) -> None:
        """The last request was too large; raises the error again where it is not for its pictures."""
        middle = len(self._asked) // 2
        if middle:
            self._left += [self._asked[middle:], self._asked[:middle]]
        elif len(self._asked[0].data) >= _LARGE and not error.errors:  # which would point to labels or options
            self.found.append(error)
        else:
            raise error


def filled(outcomes: list[ImageError | None], found: Iterable[T | IronclipError]) -> list[T | IronclipError]:
    """The outcomes, with the answers to those that were sent in their places."""
    answers = iter(found)
    return [next(answers) if outcome is None else outcome for outcome in outcomes]


def in_order(ask: Callable[[list[T]], list[R]], chunks: Iterator[list[T]], concurrency: int) -> Iterator[R]:
    """What `ask` says of each chunk, in order, with so many at work at a time."""
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="ironclip-client")
    waiting: deque[Future[list[R]]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(ask, chunk))
            # As many again may wait behind the oldest, so that one slow request does not leave the others idle.
            while waiting and (waiting[0].done() or len(waiting) >= 2 * concurrency):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        # Whoever stops early does not wait for what nobody wants; what is on its way ends in its own time.
        pool.shutdown(wait=False, cancel_futures=True)


async def in_order_async(
    ask: Callable[[list[T]], Awaitable[list[R]]], chunks: Iterator[list[T]], concurrency: int
) -> AsyncIterator[R]:
    """As `in_order`, with tasks of this event loop."""
    turns = asyncio.Semaphore(concurrency)
    waiting: deque[asyncio.Task[list[R]]] = deque()

    async def one(chunk: list[T]) -> list[R]:
        async with turns:
            return await ask(chunk)

    try:
        for chunk in chunks:
            waiting.append(asyncio.create_task(one(chunk)))
            while waiting and (waiting[0].done() or len(waiting) >= 2 * concurrency):
                for outcome in await waiting.popleft():
                    yield outcome
            # Reading the pictures is work: the requests under way get their turn in between.
            await asyncio.sleep(0)
        while waiting:
            for outcome in await waiting.popleft():
                yield outcome
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
