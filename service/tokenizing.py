"""Texts to token ids, in a thread of their own: a few at a time, so that requests take turns.

A thread cannot be cancelled. What a caller no longer waits for ends with the few texts under way, and nothing
else of the service (files, plans) runs in this thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from ironclip.encoder import Encoder
from ironclip.errors import LabelError, NotReady, Overloaded

_TURN = 16  # texts after which another request has its turn
_MEMORY = 0.9  # weight of the past in the running mean of seconds per text


class Tokenizing:
    """An encoder's tokenizer as coroutines see it.

    Args:
        name: for messages and the thread's name.
        encoder: its tokenizer is used.
        max_queue: texts waiting with which no further request is taken.
    """

    def __init__(self, name: str, encoder: Encoder, max_queue: int) -> None:
        self.name = name
        self.max_queue = max_queue
        self.queued = 0
        self._encoder = encoder
        # Its thread starts with the first text.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"tokens-{name}")
        self._stopping = threading.Event()
        self._seconds, self._texts = 0.0, 0.0

    async def rows(self, texts: Sequence[str], *, truncate: bool = False) -> list[Tensor | LabelError]:
        """Token ids of each text, int64 [context_length], or why it has none.

        Raises:
            Overloaded: too many texts wait; `retry_after` is when there should be room.
            NotReady: stopping.
        """
        if self.queued >= self.max_queue:
            raise Overloaded(
                f"{self.queued} texts wait for the {self.name} tokenizer, the limit is {self.max_queue} "
                f"(8 times IRONCLIP_MAX_QUEUE).",
                limit_name="tokens",
                retry_after=self.queued * self._seconds / self._texts if self._texts else 1,
                limit=self.max_queue,
            )
        left = len(texts)
        self.queued += left
        rows: list[Tensor | LabelError] = []
        try:
            for start in range(0, len(texts), _TURN):
                part = texts[start : start + _TURN]
                done = await asyncio.wrap_future(self._submit(part, truncate))
                rows += done
                self.queued -= len(part)
                left -= len(part)
        finally:
            self.queued -= left
        return rows

    def stop(self) -> None:
        """End with the text under way; whatever waits is told NotReady."""
        self._stopping.set()
        self._thread.shutdown(wait=False)

    def _submit(self, texts: Sequence[str], truncate: bool) -> Future[list[Tensor | LabelError]]:
        try:
            return self._thread.submit(self._tokenize, texts, truncate)
        except RuntimeError:
            raise NotReady("The service is stopping.") from None

    def _tokenize(self, texts: Sequence[str], truncate: bool) -> list[Tensor | LabelError]:
        start = time.perf_counter()
        rows: list[Tensor | LabelError] = []
        for text in texts:
            if self._stopping.is_set():
                raise NotReady("The service is stopping.")
            try:
                rows.append(self._encoder.tokenize([text], truncate=truncate)[0])
            except LabelError as error:
                rows.append(error)
        self._seconds = _MEMORY * self._seconds + time.perf_counter() - start
        self._texts = _MEMORY * self._texts + len(texts)
        return rows
