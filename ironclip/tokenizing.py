"""What keeps open_clip's own tokenizer fit for texts from strangers: time linear in the text, memory bounded.

Its BPE looks at a whole word again for every merge (0.3 s for one word of 1,000 letters) and remembers every
word it ever saw. Here is the same BPE with a heap, and a memory that is emptied when it is full.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable
from typing import Any

import open_clip

from ironclip.errors import LabelError

MAX_WORD_CHARS = 200
_MAX_REMEMBERED = 50_000
_SHORT = 64  # longer words hardly come twice, and would make the memory large


class BoundedBpe:
    """`SimpleTokenizer.bpe`, for the same answer: a word's parts in the vocabulary, with spaces between.

    Args:
        ranks: of each pair of parts that may be joined, the lowest first.
        special: words that stay whole.
    """

    def __init__(self, ranks: dict[tuple[str, str], int], special: Iterable[str]) -> None:
        self._ranks = ranks
        self._special = {word: word for word in special}
        self.remembered = dict(self._special)

    def __call__(self, word: str) -> str:
        """Split one word."""
        known = self.remembered.get(word)
        if known is not None:
            return known
        parts = " ".join(self._join([*word[:-1], word[-1] + "</w>"]))
        if len(word) <= _SHORT:
            if len(self.remembered) >= _MAX_REMEMBERED:
                self.remembered = dict(self._special)
            self.remembered[word] = parts
        return parts

    def _join(self, parts: list[str]) -> list[str]:
        count = len(parts)
        after, before = list(range(1, count + 1)), list(range(-1, count - 1))
        heap: list[tuple[int, int, str, str]] = []

        def propose(left: int) -> None:
            if left >= 0 and after[left] < count:
                pair = (parts[left], parts[after[left]])
                if pair in self._ranks:
                    heapq.heappush(heap, (self._ranks[pair], left, *pair))

        for place in range(count - 1):
            propose(place)
        while heap:
            _, left, first, second = heapq.heappop(heap)
            right = after[left]
            if right >= count or parts[left] != first or parts[right] != second:
                continue  # one of the two has been joined with its other neighbour meanwhile
            parts[left], parts[right] = first + second, ""
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            propose(before[left])
            propose(left)
        return [part for part in parts if part]


class CopyableLock:
    """A lock that a deep copy of its owner replaces by a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> CopyableLock:
        return CopyableLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def bound_tokenizer(tokenizer: Any) -> None:
    """Give open_clip's own tokenizer the bounded BPE; Hugging Face's have a fast one of their own."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer) and not isinstance(tokenizer.bpe, BoundedBpe):
        special = (word for word, whole in tokenizer.cache.items() if word == whole)
        tokenizer.bpe = BoundedBpe(tokenizer.bpe_ranks, special)


def check_words(tokenizer: Any, text: str) -> None:
    """Refuse a text with a word that is none.

    A word is what open_clip's tokenizer takes for one: letters, or signs, with nothing between them.

    Raises:
        LabelError: a word is longer than MAX_WORD_CHARS.
    """
    if len(text) <= MAX_WORD_CHARS or not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return
    longest = max((len(word) for word in tokenizer.pat.findall(text)), default=0)
    if longest > MAX_WORD_CHARS:
        raise LabelError(
            f"A text has a word of {longest} characters, at most {MAX_WORD_CHARS} are read: put spaces into "
            f"{text[:60]!r}, or shorten it.",
            limit=MAX_WORD_CHARS,
        )
