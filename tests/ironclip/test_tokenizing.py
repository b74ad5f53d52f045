"""Texts from strangers: open_clip's tokens, in linear time and bounded memory."""

from __future__ import annotations

import random
import time

import open_clip
import pytest

from ironclip import tokenizing
from ironclip.encoder import Encoder
from ironclip.errors import LabelError
from tests.conftest import make_tiny_encoder


def test_the_tokens_are_open_clips(tiny_encoder: Encoder) -> None:
    plain = open_clip.SimpleTokenizer(context_length=24)
    generator = random.Random(0)
    alphabets = (
        "abcdefghijklmnopqrstuvwxyz",
        "aaab",
        "!?.,'-",
        "äöüßéñ",
        "犬猫のはが",
        "собака",
        "🥕🐶❤️",
        "ab1 's <end_of_text>",
    )
    for _ in range(400):
        letters = generator.choice(alphabets)
        text = "".join(generator.choice(letters) for _ in range(generator.randint(1, 60)))
        assert tiny_encoder.tokenizer.encode(text) == plain.encode(text), text


@pytest.mark.parametrize("truncate", [False, True])
def test_an_endless_word_is_refused(tiny_encoder: Encoder, truncate: bool) -> None:
    with pytest.raises(LabelError, match="a word of 1000 characters") as caught:
        tiny_encoder.tokenize(["a dog", "ab" * 500], truncate=truncate)
    assert caught.value.limit == 200
    assert tiny_encoder.tokenize(["hm" * 100], truncate=True).shape == (1, 24)


def test_the_longest_words_cost_milliseconds(tiny_encoder: Encoder) -> None:
    """Whoever sends a thousand texts of them would keep a core busy long after the answer."""
    generator = random.Random(1)
    words = [["".join(generator.choices("etaoinshr犬猫", k=195)) for _ in range(5)] for _ in range(10)]
    start = time.process_time()
    tiny_encoder.tokenize([" ".join(text) for text in words], truncate=True)
    assert time.process_time() - start < 0.5  # 50 words; open_clip's own way takes 1.5 s


def test_words_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_tiny_encoder()
    monkeypatch.setattr(tokenizing, "_MAX_REMEMBERED", 100)
    before = encoder.tokenize(["a dog <end_of_text>"]).tolist()
    for i in range(300):
        word = "".join(chr(97 + int(digit)) for digit in str(10_000 + i))
        encoder.tokenize([f"a {word}"])
    tokenizer = encoder.tokenizer
    assert len(tokenizer.bpe.remembered) <= 100
    assert len(tokenizer.cache) < 10
    assert encoder.tokenize(["a dog <end_of_text>"]).tolist() == before
