"""Recall items made in the model's own tokenizer: an answer that stands in the context, at a chosen length in tokens.

Six families. `passkey`: a number in repeated filler (Mohtashami and Jaggi 2023). `needle`: a sentence in prose (Kamradt 2023,
RULER's single needle). `needles`: a haystack made of needles (RULER's multi-key needle). `phone_book` and `ngram_lookup`: Jelassi
et al. 2024, "Repeat After Me". `mqar_text`: multi-query associative recall (Arora et al. 2024) on words of one token.

Every item is a function of (family, length, index): the same for every model that shares a tokenizer, so items pair.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from bench.convert.rendered import SYLLABLES

ROOM = 32
"""Tokens of an item's length that are left for the answer."""
DEPTHS = 8
"""Places at which the answer stands, spread evenly over the context; item i takes place i modulo this."""
FILLER = "The grass is green. The sky is blue. The sun is bright. Here we go and there we come back again. "
ASKED_BEFORE = 4
"""Queries that are asked and answered before the one that is scored in `mqar_text`."""
NGRAM = 6
"""Length of the n-gram that `ngram_lookup` repeats to ask for what followed it."""


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        text: the prompt, without trailing space.
        answer: what must follow, without leading space.
        max_length: tokens that prompt and answer may have together.
        distance: tokens between the answer's place in the context and the end of the prompt.
        chance: how often a guess among the answers that stand in the context is right.
    """

    text: str
    answer: str
    max_length: int
    distance: int
    chance: float


@dataclass(frozen=True)
class Draft:
    """A context in parts, of which one holds the answer; as many parts are taken as fit.

    Args:
        head: before the context.
        parts: the haystack, at least as many as can fit.
        needle: the part that holds the answer, or None if it is one of `parts`, at `place`.
        place: where the needle stands, as a share of the parts.
        ask: from the parts that were kept and the needle's index to (question, answer).
    """

    head: str
    parts: list[str]
    needle: str | None
    place: float
    ask: Callable[[list[str], int], tuple[str, str]]


class Maker:
    """Makes items for one tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        prose: sentences for the haystack of `needle`.
    """

    def __init__(self, tokenizer: Any, prose: list[str]) -> None:
        self.tokenizer, self.prose = tokenizer, prose
        self.words = one_token_words(tokenizer)

    def items(self, family: str, lengths: list[int], count: int) -> list[dict[str, Any]]:
        """`count` items at each length, as plain dictionaries.

        Raises:
            ValueError: a length is too short for the family's question.
        """
        draft = FAMILIES[family]
        found: list[dict[str, Any]] = []
        for length in lengths:
            for index in range(count):
                draw = np.random.default_rng([*family.encode(), length, index])
                place = (index % DEPTHS + 0.5) / DEPTHS
                found.append(asdict(self._fit(draft(self, draw, length, place), length)))
        return found

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _fit(self, draft: Draft, length: int) -> Item:
        """Keeps as many parts as fit the length, needle and question included."""
        sizes = self.tokenizer(draft.parts, add_special_tokens=False, verbose=False)["input_ids"]
        ends = np.cumsum([len(ids) for ids in sizes])
        budget = length - ROOM
        keep = len(draft.parts)
        while True:
            fixed = self.count(draft.head + (draft.needle or "") + draft.ask(draft.parts[:1], 0)[0])
            keep = min(keep, int(np.searchsorted(ends, budget - fixed, side="right")))
            if keep < 1:
                raise ValueError(f"a length of {length} tokens leaves no room for the question; the shortest is about 128")
            item = self._assemble(draft, keep, length)
            over = self.count(item.text) - (length - ROOM)
            if over <= 0:
                return item
            budget -= over

    def _assemble(self, draft: Draft, keep: int, length: int) -> Item:
        parts = draft.parts[:keep]
        at = int(draft.place * keep)
        if draft.needle is not None:
            parts = [*parts[:at], draft.needle, *parts[at:]]
        question, answer = draft.ask(parts, at)
        text = draft.head + "".join(parts) + question
        distance = self.count("".join(parts[at:]) + question)
        chance = 0.0 if draft.needle is not None else 1 / keep
        return Item(text=text, answer=answer, max_length=length, distance=distance, chance=chance)


@cache
def _names() -> list[str]:
    return [(a + b + c).capitalize() for a in SYLLABLES[:24] for b in SYLLABLES[8:24] for c in SYLLABLES[::5]]


def one_token_words(tokenizer: Any, at_least: int = 512) -> list[str]:
    """Words that are one token after a space; where the vocabulary has too few, words made of syllables.

    Args:
        tokenizer: a fast tokenizer.
        at_least: words needed.
    """
    decoded = tokenizer.batch_decode([[index] for index in range(min(len(tokenizer), 60_000))])
    found = list(dict.fromkeys(word for word in decoded if re.fullmatch(r" [a-z]{3,8}", word)))
    again = tokenizer(found, add_special_tokens=False)["input_ids"] if found else []
    kept = [word[1:] for word, ids in zip(found, again, strict=True) if len(ids) == 1]
    return kept if len(kept) >= at_least else [name.lower() for name in _names()]


def _choose(draw: np.random.Generator, names: list[str], count: int) -> list[str]:
    """Different names, as far as there are enough."""
    return [names[i] for i in draw.choice(len(names), size=min(count, len(names)), replace=False)]


def _passkey(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    key = str(draw.integers(10_000, 99_999))
    question = "\nWhat is the pass key? The pass key is"
    head = "There is important information hidden in the text below. Find it and remember it.\n"
    needle = f"The pass key is {key}. Remember it. {key} is the pass key. "
    return Draft(head, [FILLER] * (length // 8), needle, place, lambda parts, at: (question, key))


def _needle(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    name, number = _choose(draw, _names(), 1)[0], str(draw.integers(1_000, 9_999))
    sentence = f"The secret number of {name} is"
    start = int(draw.integers(len(maker.prose)))
    prose = [maker.prose[(start + i) % len(maker.prose)] + " " for i in range(length // 8)]
    return Draft("", prose, f"{sentence} {number}. ", place, lambda parts, at: (f"\nQuestion: {sentence}", number))


def _needles(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    names = _choose(draw, _names(), length // 8)
    numbers = [str(number) for number in draw.integers(1_000, 9_999, len(names))]
    lines = [f"The secret number of {name} is {number}.\n" for name, number in zip(names, numbers, strict=True)]
    return Draft("", lines, None, place, lambda parts, at: (f"\nThe secret number of {names[at]} is", numbers[at]))


def _phone_book(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    firsts, lasts = (_choose(draw, _names(), length // 8) for _ in range(2))
    names = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    numbers = [f"{draw.integers(100, 999)}-{draw.integers(1_000, 9_999)}" for _ in names]
    lines = [f"{name}: {number}\n" for name, number in zip(names, numbers, strict=True)]
    return Draft("Phone book\n\n", lines, None, place, lambda parts, at: (f"\n{names[at]}:", numbers[at]))


def _mqar_text(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    keys = _choose(draw, maker.words, length // 3)
    values = _choose(draw, maker.words, len(keys))
    lines = [f" {key} {value}\n" for key, value in zip(keys, values, strict=True)]
    order = draw.permutation(len(keys))

    def ask(parts: list[str], at: int) -> tuple[str, str]:
        before = [lines[i] for i in order if i < len(parts) and i != at][:ASKED_BEFORE]
        return "\n" + "".join(before) + f" {keys[at]}", values[at]

    return Draft("", lines, None, place, ask)


def _ngram_lookup(maker: Maker, draw: np.random.Generator, length: int, place: float) -> Draft:
    words = [" " + word for word in draw.choice(maker.words, size=length)]

    def ask(parts: list[str], at: int) -> tuple[str, str]:
        start = min(at, len(parts) - NGRAM - 2)
        asked = "".join(words[start : start + NGRAM])
        return "\n\n" + asked[1:], words[start + NGRAM].strip()

    return Draft("", words, None, place, ask)


FAMILIES: dict[str, Callable[[Maker, np.random.Generator, int, float], Draft]] = {
    "passkey": _passkey,
    "needle": _needle,
    "needles": _needles,
    "phone_book": _phone_book,
    "mqar_text": _mqar_text,
    "ngram_lookup": _ngram_lookup,
}
