"""Text banks of label sets, encoded a few texts at a time through the text tower's queue, in turns.

A label set may make 100,000 prompts. So that it delays nobody by more than its share, its texts go to the tower
in small parts; whoever else waits, with a bank or with texts, has a turn between two of them. A bank that nobody
waits for any more (its task is cancelled) ends with the part under way, and so does the whole at a stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import torch
from torch import Tensor

from ironclip.encoder import Encoder
from ironclip.errors import Overloaded
from ironclip.labels import LabelSet
from ironclip.textbank import BankTexts, TextBank
from service.urgency import CURRENT, INTERACTIVE, Urgency

_MEMORY = 0.9  # weight of the past in the running mean of seconds per prompt
# What was encoded of the last set that was given up is kept within these bounds: a caller whose deadline is too
# short for the whole of it gets there by asking again.
_LEAST_KEPT, _KEPT_BYTES = 500, 128 * 1024 * 1024
_PAUSE = 0.05  # before asking again while the tower's queue is full, seconds

Encode = Callable[[Sequence[str]], Awaitable[list[Tensor | Exception]]]


class Banks:
    """Builds the text banks of one encoder.

    Args:
        name: the encoder's, for messages.
        encoder: whose banks they are.
        encode: the features of a few texts, or what is wrong with each.
        part: texts in one call of `encode`.
        max_ahead: prompts that a bank may have to wait for, at most.
    """

    def __init__(self, name: str, encoder: Encoder, encode: Encode, *, part: int, max_ahead: int) -> None:
        self.name = name
        self.max_ahead = max_ahead
        self._encoder = encoder
        self._encode = encode
        self._part = part
        self._left: dict[object, int] = {}  # prompts still to encode, by bank
        self._turn = asyncio.Lock()  # wakes those who wait in the order in which they came
        self._seconds, self._prompts = 0.0, 0.0
        self._moved = time.monotonic()
        self._given_up: tuple[object, Tensor, int] | None = None  # whose, features, how many are there

    @property
    def queued(self) -> int:
        """Prompts of all banks that are still to encode."""
        return sum(self._left.values())

    @property
    def estimated_wait_seconds(self) -> float:
        """How long it takes, at the measured rate, until all banks asked for are there."""
        return self.queued * self._seconds_per_prompt

    @property
    def stalled_seconds(self) -> float:
        """Seconds since a part was encoded while there is work; 0 when there is none."""
        return time.monotonic() - self._moved if self._left else 0.0

    async def build(self, label_set: LabelSet, *, descriptions: bool = False, tenant: str = "") -> TextBank:
        """Encode a label set; callers see to it that each set is asked for once.

        What was encoded of a set that was given up is taken up again for the same tenant alone.

        Raises:
            LabelError: a text is too long.
            Overloaded: too much is ahead of it; `retry_after` is when that should be done.
            NotReady: stopping.
        """
        # Counted before the prompts are made: that alone takes a moment, and memory, for a large set.
        ticket, size = object(), prompts_of(label_set, descriptions)
        self._admit(size)
        if not self._left:
            self._moved = time.monotonic()
        self._left[ticket] = size
        try:
            needed = await asyncio.to_thread(BankTexts.of, self._encoder, label_set, descriptions=descriptions)
            features = await self._features(ticket, needed, tenant)
        finally:
            del self._left[ticket]
        return await asyncio.to_thread(needed.bank, self._encoder, features)

    @property
    def _seconds_per_prompt(self) -> float:
        return self._seconds / self._prompts if self._prompts else 0.001

    def _admit(self, size: int) -> None:
        # Taking turns, a bank waits for as much of each other one as it has itself: a small one hardly at all.
        ahead = sum(min(left, size) for left in self._left.values())
        if ahead > self.max_ahead:
            raise Overloaded(
                f"{ahead} prompts of other label sets are to be encoded for {self.name} before these {size}; at most "
                f"{self.max_ahead} may be (32 times IRONCLIP_MAX_QUEUE).",
                limit_name="prompts",
                retry_after=ahead * self._seconds_per_prompt,
                limit=self.max_ahead,
            )

    async def _features(self, ticket: object, needed: BankTexts, tenant: str) -> Tensor:
        texts, whose = needed.texts, (tenant, needed.label_set.digest, needed.descriptions)
        # Longest first: what is too long is found at once, and texts of like length share a batch.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        features, done = torch.empty(len(texts), self._encoder.dim), 0
        if self._given_up is not None and self._given_up[0] == whose:
            _, features, done = self._given_up
            self._given_up = None
        self._left[ticket] = len(texts) - done
        try:
            while done < len(order):
                places = order[done : done + self._part]
                features[places] = torch.stack(await self._encode_part([texts[place] for place in places]))
                done += len(places)
                self._left[ticket] = len(order) - done
        except asyncio.CancelledError:
            if done >= _LEAST_KEPT and features.nbytes <= _KEPT_BYTES:
                self._given_up = (whose, features, done)
            raise
        return features

    async def _encode_part(self, texts: list[str]) -> list[Tensor]:
        async with self._turn:
            start = time.monotonic()
            # Whoever has its turn keeps all others waiting, the urgent among them.
            urgency = CURRENT.set(Urgency(INTERACTIVE))
            try:
                outcomes = await self._patiently(texts)
            finally:
                CURRENT.reset(urgency)
            self._moved = time.monotonic()
            self._seconds = _MEMORY * self._seconds + self._moved - start
            self._prompts = _MEMORY * self._prompts + len(texts)
        rows: list[Tensor] = []
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            rows.append(outcome)
        return rows

    async def _patiently(self, texts: list[str]) -> list[Tensor | Exception]:
        # The bank was admitted; that others fill the tower's queue at the moment is no reason to give it up.
        while True:
            try:
                return await self._encode(texts)
            except Overloaded:
                await asyncio.sleep(_PAUSE)


def prompts_of(label_set: LabelSet, descriptions: bool) -> int:
    """Texts of a set, those that two labels share counted twice."""
    per_label = max(len(label_set.templates), 1)
    prompts = sum(len(label.prompts) or per_label for label in label_set.labels)
    return prompts + (sum(len(label.descriptions) for label in label_set.labels) if descriptions else 0)
