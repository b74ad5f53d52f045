"""Things that wait, by class and order: what towers and decoder queue by. Nothing here locks, or knows a clock."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from service.urgency import CLASSES

Item = TypeVar("Item")

# So many places of what was taken out are left in a class, beside twice as many as there are items.
_SPARE = 64


class ByUrgency(Generic[Item]):
    """Items by class and order; what is taken out leaves its place, which is tidied up later.

    Attributes:
        added: how many items ever came.
    """

    def __init__(self) -> None:
        self.added = 0
        self._items: dict[int, Item] = {}
        self._heaps: list[list[tuple[float, int]]] = [[] for _ in CLASSES]

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, identity: int) -> bool:
        return identity in self._items

    def __getitem__(self, identity: int) -> Item:
        return self._items[identity]

    def values(self) -> list[Item]:
        """All items, as they came."""
        return list(self._items.values())

    def add(self, rank: int, order: float, item: Item) -> int:
        """Put an item into a class; returns what it is known by."""
        identity = self.added
        self.added += 1
        self._items[identity] = item
        heapq.heappush(self._heaps[rank], (order, identity))
        return identity

    def discard(self, identity: int) -> Item | None:
        """Take an item out, and return it; None if it is not there any more."""
        item = self._items.pop(identity, None)
        for rank, heap in enumerate(self._heaps):
            if len(heap) > 2 * len(self._items) + _SPARE:
                self._heaps[rank] = [pair for pair in heap if pair[1] in self._items]
                heapq.heapify(self._heaps[rank])
        return item

    def first(self, rank: int) -> tuple[float, int] | None:
        """Order and number of a class's first item."""
        heap = self._heaps[rank]
        while heap and heap[0][1] not in self._items:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def foremost(self) -> tuple[int, float, int] | None:
        """Class, order and number of the first item of the first class that has any."""
        firsts = ((rank, self.first(rank)) for rank in range(len(CLASSES)))
        return next(((rank, *first) for rank, first in firsts if first is not None), None)

    def pairs(self, rank: int) -> Iterator[tuple[float, int]]:
        """Order and number of each item of a class, in no order."""
        return (pair for pair in self._heaps[rank] if pair[1] in self._items)
